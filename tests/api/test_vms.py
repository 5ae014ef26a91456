"""Creating vms and their verbs: what is stored, what is refused, by which name."""

from functools import partial
from typing import Any

import pytest

from tests.api.kit import GIB, Api
from trimtab_controller.store import networks, schema

VMS = "/v1/projects/p1/vms"


async def test_create_stores_vm_root_volume_nic_operation_and_event_at_once(api_on_each: Api) -> None:
    api = api_on_each
    body = {
        "name": "web1",
        "image": "debian",
        "vcpus": 2,
        "memory_mib": 512,
        "disk_bytes": 2 * GIB,
        "networks": [{"network": "default", "ip": "10.20.0.5"}],
        "labels": {"tier": "web"},
    }
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert answer.status_code == 202, answer.text
    vm, operation = answer.json()["vm"], answer.json()["operation"]
    assert operation["kind"] == "vm.create"
    assert operation["state"] == "queued"
    assert operation["subject"] == {"id": vm["id"], "name": "web1"}
    assert vm["desired"] == {"power": "running"}
    assert vm["observed"]["state"] == "absent"
    assert vm["operation"]["id"] == operation["id"]
    assert [(one["name"], one["size_bytes"]) for one in vm["volumes"]] == [("web1-root", 2 * GIB)]
    assert vm["nics"][0]["addresses"] == ["10.20.0.5/24"]
    assert vm["nics"][0]["mac"].startswith("52:54:00:")
    assert api.nudges == [], "nobody can drive it before the leader placed it, and the leader looks by itself"
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    used = {name: project[f"{name}_used"] for name in ("vms", "vcpus", "memory_mib", "disk_bytes")}
    assert used == {"vms": 1, "vcpus": 2, "memory_mib": 512, "disk_bytes": 2 * GIB}
    (event,) = await api.rows(schema.event, operation_id=operation["id"])
    assert event["kind"] == "operation.accepted"
    (row,) = await api.rows(schema.vm, id=vm["id"])
    assert "10.20.0.5/24" in row["seed"]["network_yaml"]  # else nothing would tell the guest
    (stored,) = await api.rows(schema.operation, id=operation["id"])
    assert stored["params"] == {"vm_id": vm["id"], "start": True, "to_host_id": ""}


async def test_a_refused_create_leaves_nothing_behind(api_on_each: Api) -> None:
    api = api_on_each
    body = {"name": "web1", "image": "debian", "memory_mib": 512, "networks": [{"network": "default", "ip": "10.99.0.5"}]}
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["field"] == "networks[0].ip"
    for table in (schema.vm, schema.volume, schema.nic, schema.operation):
        assert await api.rows(table) == []
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    assert project["vms_used"] == 0
    assert api.nudges == []


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"image": "none"}, 404, "image-not-found"),
    ({"image": "p2-image"}, 404, "image-not-found"),
    ({"image": ""}, 400, "root-missing"),
    ({"volume": "data"}, 400, "root-missing"),
    ({"pool": "none"}, 404, "pool-not-found"),
    ({"networks": [{"network": "p2-net"}]}, 404, "network-not-found"),
    ({"host_class": "none"}, 404, "host-class-not-found"),
    ({"disk_bytes": GIB // 2}, 400, "size-too-small"),
    ({"vcpus": 4, "vcpus_max": 2}, 400, "vcpus-max"),
    ({"memory_max_mib": 256}, 400, "memory-max"),
    ({"to_host": "node1"}, 403, "role-missing"),
    ({"networks": [{"network": "default", "mac": "01:00:5e:00:00:01"}]}, 400, "mac-wrong"),
    ({"networks": [{"network": "default", "ip": "10.20.0.255"}]}, 400, "address-reserved"),
    ({"networks": [{"network": "default", "ip": "10.20.0.7"}, {"network": "default", "ip": "10.20.0.7"}]}, 400, "address-twice"),
    ({"seed": {"user_data": "#cloud-config\n[: }"}}, 400, "seed-yaml"),
    ({"seed": {"network_config": "[" * 20_000}}, 400, "seed-yaml"),
    ({"seed": {"network_config": "- version: 2"}}, 400, "seed-yaml"),
    ({"seed": {"network_config": "hostname: web1"}}, 400, "seed-network-version"),
    ({"seed": {"network_config": "version: 3\nethernets: {}"}}, 400, "seed-network-version"),
    ({"seed": {"network_config": "network: [2]"}}, 400, "seed-network-version"),
    ({"name": "vm-0123456789abcdefghjkmnpqrs"}, 400, "name-like-an-id"),
]


@pytest.mark.parametrize(("fields", "status", "code"), REFUSED, ids=[f"{code}-{i}" for i, (_, _, code) in enumerate(REFUSED)])
async def test_create_refuses_by_name(api: Api, fields: dict[str, Any], status: int, code: str) -> None:
    body = {"name": "web1", "image": "debian", "memory_mib": 512, **fields}
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def test_create_names_who_has_the_name_the_address_and_the_mac(api_on_each: Api) -> None:
    api = api_on_each
    nic = {"network": "default", "ip": "10.20.0.5", "mac": "52:54:00:00:00:01"}
    await api.make_vm("web1", networks=[nic])
    again = await api.call("p1-operator", "POST", VMS, json={"name": "web1", "image": "debian", "memory_mib": 512})
    assert (again.status_code, again.json()["code"]) == (409, "vm-exists")
    body = {"name": "web2", "image": "debian", "memory_mib": 512, "networks": [{**nic, "mac": ""}]}
    address = await api.call("p1-operator", "POST", VMS, json=body)
    assert (address.status_code, address.json()["code"]) == (409, "address-taken")
    assert "vm web1" in address.json()["detail"]
    mac = await api.call("p1-operator", "POST", VMS, json=body | {"networks": [{**nic, "ip": ""}]})
    assert (mac.status_code, mac.json()["code"]) == (409, "mac-taken")
    assert "vm web1" in mac.json()["detail"]
    assert [await api.db.read(partial(networks.is_mac_taken, mac=f"52:54:00:00:00:0{n}")) for n in (1, 2)] == [True, False]


async def test_a_mac_of_an_unmanaged_domain_is_refused(api: Api) -> None:
    mac = "52:54:00:aa:bb:cc"
    values = {"host_id": api.ids["node1"], "mac": mac}
    await api.write(lambda session: session.execute(schema.unmanaged_mac.insert().values(**values)))
    body = {"name": "web1", "image": "debian", "memory_mib": 512, "networks": [{"network": "default", "mac": mac}]}
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert answer.json()["code"] == "mac-taken"
    assert "node1" in answer.json()["detail"]
    assert await api.db.read(partial(networks.is_mac_taken, mac=mac))


@pytest.mark.parametrize("resource", ["vms", "vcpus", "memory_mib", "disk_bytes"])
async def test_a_quota_refuses_and_names_quota_used_and_asked(api_on_each: Api, resource: str) -> None:
    api = api_on_each
    takes = {"vms": 1, "vcpus": 2, "memory_mib": 512, "disk_bytes": GIB}
    quota = 2 * takes[resource] - 1
    change = await api.call("admin", "PATCH", "/v1/projects/p1", json={"quotas": {resource: quota}})
    assert change.status_code == 200, change.text
    await api.make_vm("web1", vcpus=2)
    body = {"name": "web2", "image": "debian", "memory_mib": 512, "vcpus": 2}
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert (answer.status_code, answer.json()["kind"]) == (409, "quota_exceeded")
    assert answer.json()["context"] == {
        "resource": resource,
        "quota": str(quota),
        "used": str(takes[resource]),
        "asked": str(takes[resource]),
    }


async def test_a_pool_must_be_named_where_none_is_the_default(api: Api) -> None:
    made = await api.call("admin", "POST", "/v1/pools", json={"name": "fast", "path": "/srv/fast"})
    assert made.status_code == 202, made.text
    body = {"name": "web1", "image": "debian", "memory_mib": 512}
    ambiguous = await api.call("p1-operator", "POST", VMS, json=body)
    assert ambiguous.json()["code"] == "pool-ambiguous"
    assert "fast, local" in ambiguous.json()["detail"]
    named = await api.call("p1-operator", "POST", VMS, json=body | {"pool": "fast"})
    assert named.json()["vm"]["volumes"][0]["pool"] == "fast"


async def test_the_name_of_a_deleted_vm_is_free_while_its_disk_is_kept(api: Api) -> None:
    vm = await api.make_vm("web1")
    await api.end_operations()
    await api.set_vm(vm["id"], deleted_at=api.clock.now(), purge_after=api.clock.now())
    again = await api.make_vm("web1")
    assert again["volumes"][0]["name"].startswith("web1-root-")


VERBS: list[tuple[str, dict[str, Any], str, dict[str, Any], str]] = [
    ("start", {}, "vm.start", {"to_host_id": ""}, "running"),
    ("stop", {"timeout_s": 5}, "vm.stop", {"force": False, "timeout_s": 5}, "stopped"),
    ("reboot", {"force": True}, "vm.reboot", {"force": True}, "running"),
    ("pause", {}, "vm.pause", {}, "paused"),
    ("resume", {}, "vm.resume", {}, "running"),
    (
        "migrate",
        {"bandwidth_mib_s": 100},
        "vm.migrate",
        {"to_host_id": "", "bandwidth_mib_s": 100, "auto_converge": False, "allow_postcopy": False, "timeout_s": 0},
        "running",
    ),
]


@pytest.mark.parametrize(("verb", "body", "kind", "params", "desired"), VERBS, ids=[verb for verb, *_ in VERBS])
async def test_a_verb_records_the_wish_and_accepts_one_operation(
    api: Api, verb: str, body: dict[str, Any], kind: str, params: dict[str, Any], desired: str
) -> None:
    vm = await api.make_vm("web1")
    await api.end_operations()
    await api.set_vm(vm["id"], observed_state="running", host_id=api.ids["node1"])
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:{verb}", json=body)
    assert answer.status_code == 202, answer.text
    (operation,) = await api.rows(schema.operation, id=answer.json()["operation"]["id"])
    assert (operation["kind"], operation["params"]) == (kind, {"vm_id": vm["id"], **params})
    (row,) = await api.rows(schema.vm, id=vm["id"])
    assert row["desired_power"] == desired
    busy = await api.call("p1-operator", "POST", f"{VMS}/web1:start")
    assert (busy.status_code, busy.json()["code"]) == (409, "operation-in-progress")
    assert operation["id"] in busy.json()["detail"]


@pytest.mark.parametrize("verb", ["pause", "resume", "reboot", "migrate"])
async def test_a_stopped_vm_is_told_to_be_started_first(api: Api, verb: str) -> None:
    vm = await api.make_vm("web1", start=False)
    await api.end_operations()
    await api.set_vm(vm["id"], observed_state="stopped")
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:{verb}")
    assert (answer.status_code, answer.json()["code"]) == (409, "vm-not-running")


@pytest.mark.parametrize(("method", "path", "body"), [("DELETE", "web1", None), ("POST", "web1:stop", {"force": True})])
async def test_delete_and_forced_stop_take_over_from_what_is_under_way(
    api_on_each: Api, method: str, path: str, body: dict[str, Any] | None
) -> None:
    api = api_on_each
    vm = await api.make_vm("web1")
    answer = await api.call("p1-operator", method, f"{VMS}/{path}", json=body)
    assert answer.status_code == 202, answer.text
    closed = await api.call("p1-viewer", "GET", f"/v1/operations/{vm['operation']['id']}")
    assert (closed.json()["state"], closed.json()["error"]["code"]) == ("failed", "superseded")
    if method == "DELETE":  # nothing takes over from a deletion
        again = await api.call("p1-operator", method, f"{VMS}/{path}")
        assert again.json()["code"] == "operation-in-progress"


async def test_purge_is_for_what_was_deleted_and_for_an_operator(api: Api) -> None:
    vm = await api.make_vm("web1")
    await api.end_operations()
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:purge")
    assert (refused.status_code, refused.json()["code"]) == (409, "vm-not-deleted")
    assert "trimtab vm delete web1" in refused.json()["detail"]
    purge_after = api.clock.now().replace(year=api.clock.now().year + 1)
    await api.set_vm(vm["id"], deleted_at=api.clock.now(), purge_after=purge_after, desired_power="deleted")
    assert (await api.call("p1-viewer", "POST", f"{VMS}/web1:purge")).status_code == 403
    stale = await api.call("p1-operator", "POST", f"{VMS}/web1:purge", headers={"If-Match": 'W/"999"'})
    assert stale.json()["code"] == "stale-etag"
    purged = await api.call("p1-operator", "POST", f"{VMS}/web1:purge")
    assert (purged.status_code, purged.json()["operation"]["kind"]) == (202, "vm.purge")
    assert (await api.call("p1-operator", "POST", f"{VMS}/web1:undelete")).json()["code"] == "operation-in-progress"
    await api.end_operations()
    await api.set_vm(vm["id"], purged_at=api.clock.now())
    for verb in ("purge", "undelete"):
        assert (await api.call("p1-operator", "POST", f"{VMS}/{vm['id']}:{verb}")).json()["code"] == "vm-not-found"


async def test_undelete_needs_grace_and_a_free_name(api: Api) -> None:
    vm = await api.make_vm("web1")
    await api.end_operations()
    not_deleted = await api.call("p1-operator", "POST", f"{VMS}/web1:undelete")
    assert not_deleted.json()["code"] == "vm-not-deleted"
    purge_after = api.clock.now().replace(year=api.clock.now().year + 1)
    await api.set_vm(vm["id"], deleted_at=api.clock.now(), purge_after=purge_after, desired_power="deleted")
    gone = await api.call("p1-operator", "GET", f"{VMS}/web1")
    assert gone.status_code == 404
    assert "undelete" in gone.json()["detail"]
    shown = await api.call("p1-viewer", "GET", VMS, params={"show_deleted": "true"})
    assert [one["name"] for one in shown.json()["items"]] == ["web1"]
    back = await api.call("p1-operator", "POST", f"{VMS}/web1:undelete")
    assert back.json()["operation"]["kind"] == "vm.undelete"
    await api.end_operations()
    await api.make_vm("web1")
    taken = await api.call("p1-operator", "POST", f"{VMS}/{vm['id']}:undelete")
    assert taken.json()["code"] == "vm-exists"
    await api.set_vm(vm["id"], purge_after=api.clock.now())
    late = await api.call("p1-operator", "POST", f"{VMS}/{vm['id']}:undelete")
    assert late.json()["code"] == "vm-purged"


async def test_labels_are_merged_and_a_stale_etag_is_refused(api: Api) -> None:
    vm = await api.make_vm("web1", labels={"tier": "web", "old": "yes"})
    shown = await api.call("p1-viewer", "GET", f"{VMS}/web1")
    etag = shown.headers["etag"]
    assert etag == shown.json()["etag"]
    async with api.as_("p1-operator", **{"If-Match": etag}) as client:
        changed = await client.patch(f"{VMS}/web1", json={"labels": {"old": None, "new": "x"}})
        assert changed.json()["labels"] == {"tier": "web", "new": "x"}
        stale = await client.patch(f"{VMS}/{vm['id']}", json={"labels": {"new": "y"}})
        assert (stale.status_code, stale.json()["code"]) == (412, "stale-etag")
        stale_verb = await client.post(f"{VMS}/web1:stop", json={"force": True})
        assert stale_verb.status_code == 412
        wrong = await client.patch(f"{VMS}/web1", json={"labels": {}}, headers={"If-Match": "3"})
        assert wrong.json()["code"] == "etag-wrong"


async def test_the_console_is_read_from_the_host_that_has_the_vm(api: Api) -> None:
    vm = await api.make_vm("web1")
    nowhere = await api.call("p1-viewer", "GET", f"{VMS}/web1/console")
    assert nowhere.json()["code"] == "vm-not-placed"
    await api.set_vm(vm["id"], host_id=api.ids["node1"])
    down = await api.call("p1-viewer", "GET", f"{VMS}/web1/console")
    assert (down.status_code, down.headers["retry-after"]) == (503, "2")
    api.consoles.logs[vm["id"]] = b"counter 1\ncounter 2\n"
    tail = await api.call("p1-viewer", "GET", f"{VMS}/web1/console", params={"offset": -10})
    assert tail.json() == {"content_base64": "Y291bnRlciAyCg==", "next_offset": 20}


async def test_a_vm_on_a_volume_of_its_own_charges_no_disk_and_takes_the_volume(api: Api) -> None:
    made = await api.call("p1-operator", "POST", "/v1/projects/p1/volumes", json={"name": "data", "image": "debian"})
    assert made.status_code == 202, made.text
    body = {"name": "web1", "volume": "data", "memory_mib": 512}
    early = await api.call("p1-operator", "POST", VMS, json=body)
    assert early.json()["code"] == "volume-not-ready"
    await api.end_operations()
    await api.write(lambda session: session.execute(schema.volume.update().values(observed_state="present")))
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert [one["name"] for one in answer.json()["vm"]["volumes"]] == ["data"]
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    assert project["disk_bytes_used"] == GIB
    (volume,) = await api.rows(schema.volume, name="data")
    assert not volume["is_deleted_with_vm"]
    taken = await api.call("p1-operator", "DELETE", "/v1/projects/p1/volumes/data")
    assert (taken.status_code, taken.json()["code"]) == (409, "volume-attached")


async def test_an_architecture_that_no_host_runs_is_refused_at_once_with_those_that_are_there(api: Api) -> None:
    await api.equip()
    body = {"name": "arm1", "image": "debian", "memory_mib": 512, "arch": "aarch64"}
    refused = await api.call("p1-operator", "POST", VMS, json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "arch-unavailable"), refused.text
    assert "2 of x86_64" in refused.json()["detail"]
    assert await api.rows(schema.vm) == []
    (host,) = await api.rows(schema.host, name="node2")
    for inventory, status in (
        ({"arch": "aarch64", "machines": []}, 409),
        ({"arch": "aarch64", "machines": ["pc-q35-7.2"]}, 409),  # it emulates x86_64
        ({"arch": "aarch64", "machines": ["virt-8.2"]}, 202),
    ):
        told = schema.host.update().where(schema.host.c.id == host["id"]).values(inventory={**host["inventory"], **inventory})
        await api.write(lambda session, told=told: session.execute(told))
        answer = await api.call("p1-operator", "POST", VMS, json=body)
        assert answer.status_code == status, answer.text
