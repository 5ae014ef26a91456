"""What a user gets for input that cannot be right: the field, the bound and an example; exit code 2; nothing sent."""

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, problem

CREATE = "vm create web1 --image debian"
REFUSED = {
    f"{CREATE} --memory 12": ("--memory", "no unit", "16MiB to 16TiB", "2GiB"),
    f"{CREATE} --memory 1MiB": ("--memory", "out of bounds", "16MiB to 16TiB"),
    f"{CREATE} --memory 17TiB": ("--memory", "out of bounds"),
    f"{CREATE} --memory 100MB": ("--memory", "whole number of MiB"),
    f"{CREATE} --memory 1Gib/s": ("--memory", "not a size"),
    f"{CREATE} --memory 1XiB": ("--memory", "'XiB' is no unit"),
    f"{CREATE} --memory -5GiB": ("--memory", "not a size"),
    f"{CREATE} --memory 1GiB --disk 65TiB": ("--disk", "1MiB to 64TiB", "20GiB"),
    f"{CREATE} --memory 1GiB --vcpus 0": ("--vcpus", "1<=x<=1024"),
    f"{CREATE} --memory 1GiB --label web": ("--label", "key=value", "tier=web"),
    f"{CREATE} --memory 1GiB --label !=web": ("--label", "1 to 63"),
    f"{CREATE} --memory 1GiB --network mac=52:54:00:00:00:01": ("--network", "network's name"),
    f"{CREATE} --memory 1GiB --network front,vlan=3": ("--network", "vlan=3", "ip=10.0.0.5"),
    f"{CREATE} --memory 1GiB --network front,ip=1.1.1.1,ip=2.2.2.2": ("--network", "given twice"),
    f"{CREATE} --memory 1GiB --firmware efi": ("--firmware", "uefi"),
    f"{CREATE} --memory 1GiB --user-data absent.yaml": ("--user-data", "absent.yaml"),
    f"{CREATE} --memory 1GiB --request-id 7": ("--request-id", "UUID"),
    f"{CREATE}": ("--memory",),
    "vm create web1 --memory 1GiB": ("--image, --volume or --iso",),
    f"{CREATE} --volume v --memory 1GiB": ("--image, --volume or --iso",),
    "vm stop web1 --grace 30": ("--grace", "no unit", "60s"),
    "vm stop web1 --grace soon": ("--grace", "not a duration"),
    "vm start web1 --timeout 8d": ("--timeout", "1s to 7d", "10m"),
    "vm update web1": ("--label key=value",),
    "vm list -l tier": ("--selector", "tier=web"),
    "vm list -o csv": ("--output", "table", "wide", "json", "yaml", "name"),
    "vm list -c ,": ("--columns", "name,host"),
    "vm console web1 --log --vnc": ("--log, --vnc and --screenshot",),
    "vm console web1 --port 5901": ("--vnc",),
    "volume create data": ("--size 20GiB",),
    "network create front": ("--bridge", "--nat", "--isolated"),
    "network create front --bridge br0 --nat": ("--bridge", "--nat", "--isolated"),
    "network create front --bridge br0 --vlan 4095": ("--vlan", "1<=x<=4094"),
    "network create front --bridge-on node1": ("--bridge-on", "node1=br0"),
    "host-class update big": ("nothing to change", "--vcpu-ratio 4"),
    "project update shop": ("nothing to change", "--vms"),
    "project update shop --memory 5": ("--memory", "no unit"),
    "audit list --since yesterday": ("--since", "2h", "2026-11-20T02:00Z"),
    "token create --expires 401d": ("--expires", "1d to 400d"),
    "image import micro ftp://images.example/a.qcow2": ("https",),
    "image import micro https://images.example/a --sha256 " + "0" * 64: ("--format",),
    "image import micro https://images.example/a.qcow2 --sha256 xyz": ("--sha256", "64 hexadecimal digits"),
    "token create --expires 36h": ("--expires", "whole days"),
    "image import micro https://images.example/a.qcow2": ("--sha256",),
    "image import micro absent.qcow2": ("absent.qcow2", "No such file"),
    "vm fly web1": ("No such command 'fly'",),
    "ship list": ("No such command 'ship'",),
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_refused_with_field_bound_and_example(trimtab: Trimtab, controller: FakeController, line: str) -> None:
    found = trimtab(*line.split())
    assert found.code == 2
    assert found.out == ""
    assert found.err.startswith("error: ")
    for part in REFUSED[line]:
        assert part in found.err
    assert controller.seen == []


def test_usage_errors_are_json_where_json_was_asked_for(trimtab: Trimtab) -> None:
    told = json.loads(trimtab("vm", "create", "web1", "--memory", "12", "-o", "json").err)
    assert (told["code"], told["kind"], told["exit_code"]) == ("usage", "invalid_request", 2)
    assert told["next"] == "trimtab vm create --help"


def test_a_private_key_is_never_sent(trimtab: Trimtab, controller: FakeController, tmp_path: Path) -> None:
    key = tmp_path / "id_ed25519"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    found = trimtab("vm", "create", "web1", "--image", "debian", "--memory", "1GiB", "--ssh-key", str(key))
    assert found.code == 2
    assert "private key" in found.err
    assert controller.seen == []


def test_a_seed_must_be_text_of_bounded_size(trimtab: Trimtab, controller: FakeController, tmp_path: Path) -> None:
    document = tmp_path / "user-data"
    line = ("vm", "create", "web1", "--image", "debian", "--memory", "1GiB", "--user-data", str(document))
    document.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in trimtab(*line).err
    document.write_bytes(b"x" * ((64 << 10) + 1))
    assert "larger than 64 KiB" in trimtab(*line).err
    assert controller.seen == []


def test_a_refusal_of_the_controller_shows_each_field_with_an_example(trimtab: Trimtab, controller: FakeController) -> None:
    refusal = problem(400, "request-invalid", "invalid_request", "2 fields are wrong")
    errors = [
        {"field": "name", "message": "does not match ^[a-z]", "example": "web1"},
        {"field": "networks[0].mac", "message": "is taken"},
    ]
    controller.on("POST", "/v1/projects/default/vms", Answer({**refusal.document, "errors": errors}, status=400))
    line = ("vm", "create", "WEB", "--image", "debian", "--memory", "1GiB")
    found = trimtab(*line)
    assert found.code == 2
    assert found.err.splitlines() == [
        "error: 2 fields are wrong",
        "  name: does not match ^[a-z] (for example web1)",
        "  networks[0].mac: is taken",
        "code: request-invalid  request: req-0f1e2d",
    ]
    told = json.loads(trimtab(*line, "-o", "json").err)
    assert told["errors"] == errors
    assert told["request_id"] == "req-0f1e2d"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request", 2),
        (404, "not_found", 4),
        (409, "already_exists", 5),
        (409, "conflict", 5),
        (412, "conflict", 5),
        (409, "no_capacity", 7),
        (409, "quota_exceeded", 8),
        (403, "permission_denied", 9),
        (401, "unauthenticated", 9),
        (429, "rate_limited", 10),
        (503, "unavailable", 10),
        (504, "deadline_exceeded", 6),
        (500, "internal", 1),
    ],
)
def test_each_kind_has_its_exit_code(trimtab: Trimtab, controller: FakeController, status: int, kind: str, code: int) -> None:
    controller.on("GET", "/v1/projects/default/vms", problem(status, "some-code", kind, "refused"))
    assert trimtab("vm", "list").code == code


@pytest.mark.parametrize(
    ("status", "code"), [(401, 9), (403, 9), (404, 4), (409, 5), (412, 5), (429, 10), (500, 1), (502, 10), (503, 10), (504, 6)]
)
def test_an_answer_that_is_no_problem_document_goes_by_its_status(
    trimtab: Trimtab, controller: FakeController, status: int, code: int
) -> None:
    controller.on("GET", "/v1/projects/default/vms", Answer("<html>a proxy's page</html>", status=status))
    found = trimtab("vm", "list")
    assert found.code == code
    assert f"status {status}" in found.err


def test_the_next_command_of_a_refusal_is_shown(trimtab: Trimtab, controller: FakeController) -> None:
    refusal = problem(409, "host-exists", "already_exists", "node4 is a member", next="trimtab host token create node4 --rejoin")
    controller.on("POST", "/v1/host-tokens", refusal)
    assert "next: trimtab host token create node4 --rejoin" in trimtab("host", "token", "create", "node4").err
