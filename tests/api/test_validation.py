"""What bad input gets: the field, the bound, an example; never a 500."""

import json
from typing import Any

import pytest

from tests.api.kit import Api

VM: dict[str, Any] = {"name": "web1", "image": "debian", "memory_mib": 512}
VMS = "/v1/projects/p1/vms"
NIC = {"network": "default"}

# (path, body, field): each is refused with 400 and names the field.
BODIES: list[tuple[str, Any, str]] = [
    (VMS, VM | {"name": "Web1"}, "name"),
    (VMS, VM | {"name": "1web"}, "name"),
    (VMS, VM | {"name": "web-"}, "name"),
    (VMS, VM | {"name": "w" * 64}, "name"),
    (VMS, VM | {"name": "web1\n"}, "name"),
    (VMS, VM | {"name": 7}, "name"),
    (VMS, VM | {"colour": "red"}, "colour"),
    (VMS, VM | {"vcpus": 0}, "vcpus"),
    (VMS, VM | {"vcpus": 1025}, "vcpus"),
    (VMS, VM | {"vcpus": "2"}, "vcpus"),
    (VMS, VM | {"vcpus": 1.5}, "vcpus"),
    (VMS, VM | {"vcpus": True}, "vcpus"),
    (VMS, VM | {"memory_mib": 15}, "memory_mib"),
    (VMS, VM | {"memory_mib": 10**30}, "memory_mib"),
    (VMS, {"name": "web1", "image": "debian"}, "memory_mib"),
    (VMS, VM | {"disk_bytes": 1000}, "disk_bytes"),
    (VMS, VM | {"disk_bytes": (1 << 30) + 1}, "disk_bytes"),
    (VMS, VM | {"firmware": "coreboot"}, "firmware"),
    (VMS, VM | {"start": "yes"}, "start"),
    (VMS, VM | {"labels": {"-bad": "x"}}, "labels.-bad.[key]"),
    (VMS, VM | {"labels": {"tier": "x" * 64}}, "labels.tier"),
    (VMS, VM | {"labels": {"tier": None}}, "labels.tier"),
    (VMS, VM | {"networks": [NIC | {"mac": "52:54:00"}]}, "networks[0].mac"),
    (VMS, VM | {"networks": [NIC, NIC | {"ip": "ten"}]}, "networks[1].ip"),
    (VMS, VM | {"networks": [NIC | {"vlan": 3}]}, "networks[0].vlan"),
    (VMS, VM | {"networks": [NIC] * 17}, "networks"),
    (VMS, VM | {"seed": {"user_data": "x" * 70_000}}, "seed.user_data"),
    (VMS, VM | {"seed": {"ssh_keys": ["rm -rf /"]}}, "seed.ssh_keys[0]"),
    (VMS, VM | {"seed": {"user_data": "a\x00b"}}, "body"),
    (VMS, VM | {"request_id": "not-a-uuid"}, "request_id"),
    (VMS, [VM], "body"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "overlay"}, "kind"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "nat"}, "subnet"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "nat", "subnet": "10.0.0.1/24"}, "subnet"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "nat", "subnet": "10.0.0.0/24", "vlan": 4095}, "vlan"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "isolated", "vlan": 5}, "vlan"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "bridge"}, "bridge"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "bridge", "bridge": "../etc"}, "bridge"),
    ("/v1/projects/p1/networks", {"name": "n", "kind": "isolated", "mtu": 100}, "mtu"),
    ("/v1/pools", {"name": "p", "path": "relative"}, "path"),
    ("/v1/pools", {"name": "p", "path": "/srv/../etc"}, "path"),
    ("/v1/pools", {"name": "p", "path": "/"}, "path"),
    ("/v1/pools", {"name": "p", "kind": "ceph", "path": "/srv"}, "kind"),
    ("/v1/pools", {"name": "p", "kind": "iscsi", "portal": "10.0.0.5:port"}, "portal"),
    ("/v1/pools", {"name": "p", "kind": "rbd", "monitors": ["10.0.0.5", "a b"]}, "monitors[1]"),
    (VMS, {"name": "v", "image": "debian", "memory_mib": 512, "start_group": "The Shop"}, "start_group"),
    (VMS, {"name": "v", "image": "debian", "memory_mib": 512, "start_group": "shop", "start_order": 1001}, "start_order"),
    (VMS, {"name": "v", "image": "debian", "memory_mib": 512, "start_group": "shop", "start_order": "1"}, "start_order"),
    (f"{VMS}/web1:ha", {"start_group": "shop-"}, "start_group"),
    (f"{VMS}/web1:ha", {"start_order": -1}, "start_order"),
    ("/v1/projects/p1/volumes", {"name": "data"}, "size_bytes"),
    ("/v1/projects/p1/volumes", {"name": "data", "size_bytes": 1 << 60}, "size_bytes"),
    ("/v1/projects/p1/volumes", {"name": "data", "image": "debian", "format": "raw"}, "format"),
    ("/v1/projects/p1/images", {"name": "i", "format": "vmdk", "source": {"upload_id": "up-x"}}, "format"),
    (
        "/v1/projects/p1/images",
        {"name": "i", "kind": "iso", "format": "raw", "source": {"host": "node1", "file_name": "x.iso"}},
        "format",
    ),
    ("/v1/projects", {"name": "p9", "quotas": {"vms": -1}}, "quotas.vms"),
    ("/v1/projects", {"name": "p9", "quotas": {"disks": 1}}, "quotas.disks"),
    ("/v1/users", {"name": "u", "kind": "robot"}, "kind"),
    ("/v1/users/nobody/tokens", {"expires_in_days": 401}, "expires_in_days"),
    ("/v1/users/nobody/tokens", {"expires_in_days": 0}, "expires_in_days"),
    ("/v1/host-tokens", {"name": "node 9"}, "name"),
    ("/v1/host-classes", {"name": "c", "vcpu_ratio_permille": 1}, "vcpu_ratio_permille"),
    ("/v1/host-classes", {"name": "c", "machine": "q35"}, "machine"),
]


@pytest.mark.parametrize(("path", "body", "field"), BODIES, ids=[f"{i}-{field}" for i, (_, _, field) in enumerate(BODIES)])
async def test_a_bad_field_is_named(api: Api, path: str, body: Any, field: str) -> None:
    answer = await api.call("admin", "POST", path, json=body)
    problem = answer.json()
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["kind"] == "invalid_request"
    assert field in [entry["field"] for entry in problem["errors"]], problem
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "field", "example"),
    [
        (VM | {"name": "Web1"}, "name", "web1"),
        (VM | {"vcpus": 0}, "vcpus", 2),
        (VM | {"networks": [NIC | {"mac": "52:54:00"}]}, "networks[0].mac", "52:54:00:12:34:56"),
        (VM | {"firmware": "coreboot"}, "firmware", "bios"),
        (VM | {"priority": 5000}, "priority", 10),
        (VM | {"networks": 5}, "networks", [{"network": "default"}]),
        (VM | {"networks": ["default"]}, "networks[0]", {"network": "default"}),
        (VM | {"labels": {"tier": 5}}, "labels.tier", "web"),
        (VM | {"labels": {"-bad": "x"}}, "labels.-bad.[key]", "tier"),
        (VM | {"start": "yes"}, "start", True),
    ],
)
async def test_a_refusal_shows_an_example_of_the_field(api: Api, body: Any, field: str, example: Any) -> None:
    answer = await api.call("admin", "POST", VMS, json=body)
    shown = {entry["field"]: entry.get("example") for entry in answer.json()["errors"]}
    assert shown[field] == example


@pytest.mark.parametrize(
    ("more", "field", "message"),
    [
        ({"priority": 5000}, "priority", "Input should be less than or equal to 1000"),
        ({"networks": 5}, "networks", "Input should be a list"),
        ({"networks": ["default"]}, "networks[0]", "Input should be an object"),
        ({"networks": [NIC] * 17}, "networks", "List should have at most 16 items, not 17"),
        ({"labels": 5}, "labels", "Input should be an object"),
        ({"labels": {f"k{i}": "x" for i in range(65)}}, "labels", "Object should have at most 64 items, not more"),
    ],
)
async def test_a_refusal_tells_the_bound_in_words_of_json(api: Api, more: dict[str, Any], field: str, message: str) -> None:
    problem = (await api.call("admin", "POST", VMS, json=VM | more)).json()
    assert [(entry["field"], entry["message"]) for entry in problem["errors"]] == [(field, message)]
    assert problem["detail"] == f"{field}: {message}"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("page_size=0", "page_size"),
        ("page_size=1001", "page_size"),
        ("page_size=many", "page_size"),
        ("page_token=nonsense", "page_token"),
        ("page_token=W10", "page_token"),
        ("filter=colour=red", "filter"),
        ("filter=state", "filter"),
        ("filter=state=a,state=b", "filter"),
        ("filter=name=%00", "filter"),
        ("selector=tier", "selector"),
        ("selector=-x=1", "selector"),
        ("order_by=seed", "order_by"),
        ("order_by=name sideways", "order_by"),
        ("show_deleted=perhaps", "show_deleted"),
    ],
)
async def test_a_bad_query_is_named(api: Api, query: str, field: str) -> None:
    answer = await api.call("p1-viewer", "GET", f"{VMS}?{query}")
    assert answer.status_code == 400, answer.text
    assert [entry["field"] for entry in answer.json()["errors"]] == [field]


RAW: list[tuple[str, bytes, int, str]] = [
    ("application/json", b"{", 400, "request-invalid"),
    ("application/json", b"", 400, "request-invalid"),
    ("application/json", b"\xff\xfe", 400, "request-invalid"),
    ("application/json", b"[" * 100_000, 400, "request-refused"),
    ("application/json", b'{"name": "\\ud800"}', 400, "request-invalid"),
    ("application/json", b'{"memory_mib": NaN, "name": "a"}', 400, "request-invalid"),
    ("text/plain", b'{"name": "web1"}', 400, "request-invalid"),
    ("application/json", json.dumps({"name": "x" * (1 << 20)}).encode(), 413, "body-too-large"),
]


@pytest.mark.parametrize(
    ("media_type", "content", "status", "code"), RAW, ids=[f"{i}-{code}" for i, (_, _, _, code) in enumerate(RAW)]
)
async def test_a_body_that_is_none_is_refused(api: Api, media_type: str, content: bytes, status: int, code: str) -> None:
    answer = await api.call("p1-operator", "POST", VMS, content=content, headers={"Content-Type": media_type})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def test_a_body_in_chunks_is_bounded_too(api: Api) -> None:
    async def chunks() -> Any:
        for _ in range(200):
            yield b"x" * 10_000

    answer = await api.call("p1-operator", "POST", VMS, content=chunks(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route-not-found"),
        ("PUT", VMS, 405, "method-not-allowed"),
        ("GET", f"{VMS}/Bad_Name", 400, "request-invalid"),
        ("GET", "/v1/operations/op-1", 400, "request-invalid"),
        ("GET", "/v1/operations/op-00000000000000000000000000", 404, "operation-not-found"),
        ("POST", f"{VMS}/web1:explode", 405, "method-not-allowed"),
    ],
)
async def test_a_wrong_address_is_a_problem_too(api: Api, method: str, path: str, status: int, code: str) -> None:
    answer = await api.call("admin", method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
