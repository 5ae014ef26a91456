"""Pools, networks, images, volumes, hosts: made, shown, and not removed while something depends on them."""

from datetime import timedelta
from typing import Any

import pytest

from tests.api.kit import GIB, Api
from trimtab_controller.store import certificates, host_reports, hosts, schema
from trimtab_protos.messages import Inventory, PoolObservation
from trimtab_protos.network_messages import Bridge

P1 = "/v1/projects/p1"


async def test_a_pool_shows_its_hosts_and_space(api: Api) -> None:
    made = await api.call("admin", "POST", "/v1/pools", json={"name": "fast", "path": "/srv/fast", "is_default": True})
    assert made.status_code == 202, made.text
    pool = made.json()["pool"]

    def report(session: Any) -> None:
        values = {"pool_id": pool["id"], "host_id": api.ids["node1"]}
        session.execute(schema.pool_host.insert().values(state="ready", observed_at=api.clock.now(), **values))
        space = {"capacity_bytes": 100, "available_bytes": 60, "claimed_bytes": 10, "observed_at": api.clock.now()}
        session.execute(schema.pool_space.insert().values(**values, **space))

    await api.write(report)
    shown = (await api.call("fleet-viewer", "GET", "/v1/pools/fast")).json()
    assert shown["is_default"]
    assert [(one["host"], one["state"], one["space"]["available_bytes"]) for one in shown["hosts"]] == [("node1", "ready", 60)]
    assert shown["space"]["capacity_bytes"] == 100
    second = await api.call("admin", "POST", "/v1/pools", json={"name": "other", "path": "/srv/o", "is_default": True})
    assert second.json()["code"] == "pool-default-taken"
    same_path = await api.call("admin", "POST", "/v1/pools", json={"name": "other", "path": "/srv/fast"})
    assert same_path.json()["code"] == "pool-path-taken"
    assert "trimtab pool get fast" in same_path.json()["detail"]
    same_name = await api.call("admin", "POST", "/v1/pools", json={"name": "fast", "path": "/srv/o"})
    assert same_name.json()["code"] == "pool-exists"


async def test_a_pool_with_volumes_or_the_last_copy_of_an_image_stays(api: Api) -> None:
    image = await api.call("admin", "DELETE", "/v1/pools/local")
    assert image.json()["code"] == "pool-not-empty"
    assert "images debian, p2-image" in image.json()["detail"]
    await api.make_vm("web1")
    volume = await api.call("admin", "DELETE", "/v1/pools/local")
    assert "volumes web1-root" in volume.json()["detail"]


async def test_a_network_in_use_stays(api: Api) -> None:
    body = {"name": "lan", "kind": "nat", "subnet": "10.30.0.0/24", "dhcp": True}
    made = await api.call("p1-operator", "POST", f"{P1}/networks", json=body)
    assert made.status_code == 202, made.text
    await api.end_operations()
    await api.make_vm("web1", networks=[{"network": "lan"}])
    used = await api.call("p1-operator", "DELETE", f"{P1}/networks/lan")
    assert (used.status_code, used.json()["code"]) == (409, "network-in-use")
    assert "web1" in used.json()["detail"]
    names = [one["name"] for one in (await api.call("p1-viewer", "GET", f"{P1}/networks")).json()["items"]]
    assert names == ["default", "lan"]
    shared = [one["name"] for one in (await api.call("nobody", "GET", "/v1/networks")).json()["items"]]
    assert shared == ["default"]


async def test_a_network_on_a_bridge_takes_the_fleets_administrator(api: Api) -> None:
    body = {"name": "lan", "kind": "bridge", "bridge": "br0", "bridges": {"node2": "br1"}, "vlan": 12}
    denied = await api.call("p1-admin", "POST", f"{P1}/networks", json=body)
    assert (denied.status_code, denied.json()["code"]) == (403, "role-missing")
    unknown = await api.call("admin", "POST", f"{P1}/networks", json=body | {"bridges": {"node9": "br1"}})
    assert unknown.json()["code"] == "host-not-found"
    made = await api.call("admin", "POST", f"{P1}/networks", json=body)
    assert made.status_code == 202, made.text
    hosts_shown = made.json()["network"]["hosts"]
    assert [(one["host"], one["bridge"]) for one in hosts_shown] == [("node2", "br1")]


async def test_a_network_of_ones_own_hides_a_shared_one_of_that_name(api: Api) -> None:
    body = {"name": "default", "kind": "isolated"}
    own = (await api.call("p1-operator", "POST", f"{P1}/networks", json=body)).json()["network"]
    assert (await api.call("p1-viewer", "GET", f"{P1}/networks/default")).json()["id"] == own["id"]
    other = (await api.call("p2-viewer", "GET", "/v1/projects/p2/networks/default")).json()
    assert other["id"] == api.ids["default"]
    by_id = (await api.call("p1-viewer", "GET", f"{P1}/networks/{api.ids['default']}")).json()
    assert by_id["is_shared"]


async def test_an_image_with_clones_stays(api: Api) -> None:
    await api.make_vm("web1")
    used = await api.call("admin", "DELETE", f"{P1}/images/debian")
    assert (used.status_code, used.json()["code"]) == (409, "image-in-use")
    assert "web1-root" in used.json()["detail"]
    shown = (await api.call("p1-viewer", "GET", f"{P1}/images/debian")).json()
    assert (shown["is_shared"], shown["virtual_size_bytes"]) == (True, GIB)
    assert shown["replicas"] == [{"pool": "local", "host": "node1", "state": "ready"}]


IMAGES: list[tuple[str, dict[str, Any], int, str]] = [
    ("p1-operator", {"url": "https://images.example.org/x.qcow2", "sha256": "a" * 64}, 202, ""),
    ("p1-operator", {"url": "https://elsewhere.example.org/x", "sha256": "a" * 64}, 400, "url-host-not-allowed"),
    ("p1-operator", {"url": "https://me:pw@images.example.org/x", "sha256": "a" * 64}, 400, "url-wrong"),
    ("p1-operator", {"url": "https://images.example.org:99999/x", "sha256": "a" * 64}, 400, "url-wrong"),
    ("p1-operator", {"url": "https://images.example.org/x"}, 400, "source-wrong"),
    ("p1-operator", {"url": "http://images.example.org/x", "sha256": "a" * 64}, 400, "request-invalid"),
    ("p1-operator", {"url": "file:///etc/passwd", "sha256": "a" * 64}, 400, "request-invalid"),
    ("p1-operator", {"host": "node1", "file_name": "disk.qcow2"}, 403, "role-missing"),
    ("admin", {"host": "node1", "file_name": "disk.qcow2"}, 202, ""),
    ("admin", {"host": "node1", "file_name": "../disk.qcow2"}, 400, "request-invalid"),
    ("admin", {"host": "node9", "file_name": "disk.qcow2"}, 404, "host-not-found"),
]


@pytest.mark.parametrize(("caller", "source", "status", "code"), IMAGES, ids=[str(i) for i in range(len(IMAGES))])
async def test_sources_of_images(api: Api, caller: str, source: dict[str, Any], status: int, code: str) -> None:
    body = {"name": "micro", "format": "qcow2", "source": source}
    answer = await api.call(caller, "POST", f"{P1}/images", json=body)
    assert (answer.status_code, answer.json().get("code", "")) == (status, code), answer.text


async def test_shared_images_are_made_by_the_fleets_administrator(api: Api) -> None:
    source = {"url": "https://images.example.org/x.qcow2", "sha256": "a" * 64}
    body = {"name": "base", "format": "qcow2", "source": source, "is_shared": True}
    assert (await api.call("p1-admin", "POST", f"{P1}/images", json=body)).status_code == 403
    assert (await api.call("admin", "POST", f"{P1}/images", json=body)).json()["image"]["is_shared"]
    unready = {"name": "web1", "image": "base", "memory_mib": 512}
    answer = await api.call("p2-operator", "POST", "/v1/projects/p2/vms", json=unready)
    assert (answer.status_code, answer.json()["code"]) == (409, "image-not-ready")


async def test_a_volume_is_made_charged_and_removed(api: Api) -> None:
    made = await api.call("p1-operator", "POST", f"{P1}/volumes", json={"name": "data", "size_bytes": GIB})
    assert made.status_code == 202, made.text
    assert made.json()["volume"]["format"] == "qcow2"
    clone = await api.call("p1-operator", "POST", f"{P1}/volumes", json={"name": "clone", "image": "debian"})
    assert clone.json()["volume"]["image"] == "debian"
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    assert project["disk_bytes_used"] == 2 * GIB
    busy = await api.call("p1-operator", "DELETE", f"{P1}/volumes/data")
    assert busy.json()["code"] == "operation-in-progress"
    await api.end_operations()
    removed = await api.call("p1-operator", "DELETE", f"{P1}/volumes/data")
    assert removed.json()["operation"]["kind"] == "volume.delete"


INVENTORY = Inventory(
    hostname="node1",
    arch="x86_64",
    machine_id="1" * 32,
    smbios_uuid="x",
    boot_id="b",
    kernel="6.1",
    agent_version="0.1",
    libvirt_version="9.0",
    qemu_version="7.2",
    accelerator="tcg",
    cpu_vendor="AMD",
    cpu_model="EPYC",
    cpus=4,
    memory_mib=8192,
    machines=("pc-q35-7.2",),
    bridges=(Bridge(name="br0"),),
    pools=(PoolObservation(pool_id="p"),),
    digest="d1",
)


async def test_a_host_shows_inventory_use_certificates_and_vms(api: Api) -> None:
    host_id, now = api.ids["node1"], api.clock.now()

    def report(session: Any) -> None:
        host_reports.store_inventory(session, host_id, INVENTORY, now=now)
        certificates.record(session, serial="ab", host_id=host_id, purpose="agent", not_after=now + timedelta(days=3), now=now)

    await api.write(report)
    vm = await api.make_vm("web1")
    await api.set_vm(vm["id"], host_id=host_id, observed_state="running")
    shown = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()
    assert shown["inventory"]["bridges"][0]["name"] == "br0"
    assert shown["vcpus"]["limit"] == 16
    assert (shown["vms"], shown["vms_running"]) == (1, 1)
    assert [(one["purpose"], one["serial"]) for one in shown["certificates"]] == [("agent", "ab")]
    assert shown["certificates"][0]["renews_at"] == (now + timedelta(days=1.5)).isoformat().replace("+00:00", "Z")
    assert shown["host_class"] == hosts.DEFAULT_CLASS
    assert shown["connectivity"] == "new"
    (listed, _other) = (await api.call("fleet-viewer", "GET", "/v1/hosts")).json()["items"]
    assert listed["inventory"]["cpus"] == 4
    assert listed["inventory"]["bridges"] == []
    none = (await api.call("fleet-viewer", "GET", "/v1/hosts", params={"filter": "connectivity=up"})).json()
    assert none["items"] == []


async def test_hosts_are_cordoned_renamed_labelled_and_removed(api: Api) -> None:
    cordoned = await api.call("fleet-operator", "POST", "/v1/hosts/node1:cordon")
    assert cordoned.json()["is_cordoned"]
    assert not (await api.call("fleet-operator", "POST", "/v1/hosts/node1:uncordon")).json()["is_cordoned"]
    changed = await api.call("admin", "PATCH", "/v1/hosts/node1", json={"name": "rack1-1", "labels": {"rack": "1"}})
    assert (changed.json()["name"], changed.json()["labels"]) == ("rack1-1", {"rack": "1"})
    taken = await api.call("admin", "PATCH", "/v1/hosts/node2", json={"name": "rack1-1"})
    assert taken.status_code == 409
    vm = await api.make_vm("web1")
    await api.set_vm(vm["id"], host_id=api.ids["node2"])
    full = await api.call("admin", "DELETE", "/v1/hosts/node2")
    assert (full.status_code, full.json()["code"]) == (409, "host-not-empty")
    stale = await api.call("admin", "DELETE", "/v1/hosts/rack1-1", headers={"If-Match": 'W/"1"'})
    assert stale.status_code == 412
    removed = await api.call("admin", "DELETE", "/v1/hosts/node2", params={"keep_guests": "true"})
    assert removed.json()["operation"]["kind"] == "host.remove"
    (operation,) = await api.rows(schema.operation, kind="host.remove")
    assert operation["params"] == {"host_id": api.ids["node2"], "keep_guests": True, "force": False}


async def test_a_host_token_is_one_line_shown_once(api: Api) -> None:
    headers = {"Idempotency-Key": "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"}
    made = await api.call("admin", "POST", "/v1/host-tokens", json={"name": "node4"}, headers=headers)
    assert made.status_code == 201, made.text
    assert made.json()["token"] in made.json()["command"]
    assert "sha256:aa" in made.json()["command"]
    again = (await api.call("admin", "POST", "/v1/host-tokens", json={"name": "node4"}, headers=headers)).json()
    assert (again["id"], again["token"], again["command"]) == (made.json()["id"], "", "")
    listed = (await api.call("admin", "GET", "/v1/host-tokens")).json()["items"]
    assert [(one["name"], one["created_by"]) for one in listed] == [("node4", "admin")]
    assert (await api.call("admin", "DELETE", f"/v1/host-tokens/{made.json()['id']}")).status_code == 204
    assert (await api.call("admin", "GET", "/v1/host-tokens")).json()["items"] == []
    unknown = await api.call("admin", "POST", "/v1/host-tokens", json={"name": "node9", "rejoin": True})
    assert unknown.json()["code"] == "host-not-found"


async def test_host_classes(api: Api) -> None:
    body = {"name": "dense", "vcpu_ratio_permille": 8000, "policy": "spread"}
    made = await api.call("admin", "POST", "/v1/host-classes", json=body)
    assert made.status_code == 201, made.text
    unknown = await api.call("admin", "POST", "/v1/host-classes", json={"name": "x", "policy": "best"})
    assert unknown.json()["code"] == "policy-unknown"
    moved = await api.call("admin", "PATCH", "/v1/hosts/node1", json={"host_class": "dense"})
    assert moved.json()["host_class"] == "dense"
    used = await api.call("admin", "DELETE", "/v1/host-classes/dense")
    assert (used.status_code, used.json()["code"]) == (409, "host-class-in-use")
    changed = await api.call("admin", "PATCH", "/v1/host-classes/dense", json={"memory_reserve_mib": 2048})
    assert (changed.json()["memory_reserve_mib"], changed.json()["vcpu_ratio_permille"]) == (2048, 8000)
    assert (await api.call("admin", "DELETE", "/v1/host-classes/default")).json()["code"] == "host-class-is-default"
    assert len((await api.call("fleet-viewer", "GET", "/v1/host-classes")).json()["items"]) == 2
