"""Snapshots, clones and templates at the API: what is stored when they are accepted, and what is refused by which name."""

from typing import Any

import pytest

from tests.api.kit import Api
from tests.api.test_vm_changes import running
from trimtab_controller.store import schema

VMS = "/v1/projects/p1/vms"
TEMPLATES = "/v1/projects/p1/templates"


SURVIVAL: dict[str, Any] = {"ha": "restart", "priority": 5, "start_delay_s": 20, "start_group": "shop", "start_order": 2}


async def kept_vm(api: Api) -> dict[str, Any]:
    """A running vm whose disk is there."""
    vm = await running(api, **SURVIVAL)
    there = schema.volume.update().values(observed_state="present", host_id=api.ids["node1"])
    await api.write(lambda session: session.execute(there))
    return vm


async def test_a_snapshot_is_stored_with_its_layers_and_shown_in_the_tree(api_on_each: Api) -> None:
    api = api_on_each
    vm = await kept_vm(api)
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1/snapshots", json={"name": "before"})
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "snapshot.create"), answer.text
    (row,) = await api.rows(schema.snapshot)
    (layer,) = await api.rows(schema.volume_layer)
    (operation,) = await api.rows(schema.operation, kind="snapshot.create")
    assert (row["state"], row["vm_id"]) == ("making", vm["id"])
    assert operation["params"]["layers"] == {layer["volume_id"]: layer["id"]}
    (shown,) = (await api.call("p1-viewer", "GET", f"{VMS}/web1/snapshots")).json()["items"]
    assert (shown["name"], shown["state"], shown["is_current"], shown["disk_count"]) == ("before", "making", False, 1)
    one = await api.call("p1-viewer", "GET", f"{VMS}/web1/snapshots/before")
    assert one.json() == shown


async def test_a_pool_whose_reserve_would_be_eaten_takes_no_snapshot(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    await kept_vm(api)
    table = schema.pool_space
    await api.write(lambda session: session.execute(table.update().values(available_bytes=(5 << 30) + (256 << 20))))
    memory = await api.call("p1-operator", "POST", f"{VMS}/web1/snapshots", json={"name": "doing", "has_memory": True})
    assert (memory.status_code, memory.json()["code"]) == (409, "pool-full"), memory.text
    assert "trimtab vm snapshot delete" in memory.json()["detail"]
    disks = await api.call("p1-operator", "POST", f"{VMS}/web1/snapshots", json={"name": "before"})
    assert disks.status_code == 202, "its disks fit"
    await api.end_operations()
    await api.write(lambda session: session.execute(table.update().values(available_bytes=1 << 30)))
    nothing = await api.call("p1-operator", "POST", f"{VMS}/web1/snapshots", json={"name": "after"})
    assert nothing.json()["code"] == "pool-full"


REFUSED: list[tuple[str, str, dict[str, Any] | None, int, str]] = [
    ("POST", "web1/snapshots", {}, 400, "request-invalid"),
    ("POST", "web1/snapshots", {"name": "UPPER"}, 400, "request-invalid"),
    ("POST", "web1/snapshots/none:revert", {}, 404, "snapshot-not-found"),
    ("DELETE", "web1/snapshots/none", None, 404, "snapshot-not-found"),
    ("POST", "web1:clone", {"name": "web1"}, 409, "vm-exists"),
    ("POST", "web1:clone", {"name": "web2", "snapshot": "none"}, 404, "snapshot-not-found"),
    ("POST", "none:clone", {"name": "web2"}, 404, "vm-not-found"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), REFUSED)
async def test_what_cannot_be_is_refused_by_name(
    api: Api, method: str, path: str, body: dict[str, Any] | None, status: int, code: str
) -> None:
    await kept_vm(api)
    answer = await api.call("p1-operator", method, f"{VMS}/{path}", **({"json": body} if body is not None else {}))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert await api.rows(schema.snapshot) == []
    assert len(await api.rows(schema.vm)) == 1


@pytest.mark.parametrize("is_linked", [True, False])
async def test_a_clone_is_another_vm_that_waits_for_a_snapshot_of_its_source(api_on_each: Api, is_linked: bool) -> None:
    api = api_on_each
    source = await kept_vm(api)
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:clone", json={"name": "web2", "linked": is_linked})
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.create"), answer.text
    (snapshot,) = await api.rows(schema.snapshot)
    (taking,) = await api.rows(schema.operation, kind="snapshot.create")
    made = next(one for one in await api.rows(schema.operation, kind="vm.create") if one["subject_name"] == "web2")
    assert snapshot["is_temporary"]
    assert (made["params"]["after_operation_id"], taking["params"]["wakes"]) == (taking["id"], made["id"])
    vms = {row["name"]: row for row in await api.rows(schema.vm)}
    volumes = {row["vm_id"]: row for row in await api.rows(schema.volume)}
    assert vms["web2"]["uuid"] != vms["web1"]["uuid"]
    assert vms["web2"]["vcpus"] == vms["web1"]["vcpus"]
    assert {name: vms["web2"][name] for name in SURVIVAL} == SURVIVAL
    assert f"instance-id: {vms['web2']['id']}" in vms["web2"]["seed"]["meta_yaml"]
    assert "machine-id" in vms["web2"]["seed"]["user_yaml"]
    own = volumes[vms["web2"]["id"]]
    assert own["parent_volume_id"] == (volumes[source["id"]]["id"] if is_linked else None)
    assert made["params"]["copies"] == ({} if is_linked else {own["id"]: [volumes[source["id"]]["id"], ""]})
    refused = await api.call("p1-operator", "DELETE", f"{VMS}/web1")
    assert (refused.status_code, refused.json().get("code")) == ((409, "vm-has-clones") if is_linked else (202, None))


async def test_a_template_gives_many_vms_in_one_request_all_or_none(api_on_each: Api) -> None:
    api = api_on_each
    await kept_vm(api)
    made = await api.call("p1-operator", "POST", TEMPLATES, json={"name": "web", "from_vm": "web1"})
    assert made.status_code == 202, made.text
    assert (made.json()["template"]["revision"], made.json()["template"]["state"]) == (1, "importing")
    early = await api.call("p1-operator", "POST", f"{TEMPLATES}/web:create-vms", json={"name_pattern": "w-{n}", "count": 2})
    assert (early.status_code, early.json()["code"]) == (409, "image-not-ready")
    image = schema.image.update().values(state="ready", virtual_size_bytes=1 << 20)
    await api.end_operations()
    await api.write(lambda session: session.execute(image))
    path = f"{TEMPLATES}/web:create-vms"
    same = await api.call("p1-operator", "POST", path, json={"name_pattern": "same", "count": 2})
    assert (same.status_code, same.json()["code"]) == (400, "name-pattern")
    taken = await api.call("p1-operator", "POST", path, json={"name_pattern": "web{n}", "count": 3})
    assert (taken.status_code, taken.json()["code"]) == (409, "vm-exists")
    assert len(await api.rows(schema.vm)) == 1, "all or none"
    answer = await api.call("p1-operator", "POST", path, json={"name_pattern": "web-{n}", "count": 20})
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "template.create-vms"), answer.text
    (parent,) = await api.rows(schema.operation, kind="template.create-vms")
    children = [row for row in await api.rows(schema.operation, kind="vm.create") if row["subject_name"] != "web1"]
    assert {row["id"] for row in children} == set(parent["params"]["operation_ids"])
    assert {row["subject_name"] for row in children} == {f"web-{n}" for n in range(1, 21)}
    assert all({name: row[name] for name in SURVIVAL} == SURVIVAL for row in await api.rows(schema.vm))
    refused = await api.call("p1-operator", "DELETE", f"{TEMPLATES}/web")
    assert (refused.status_code, refused.json()["code"]) == (409, "template-in-use")
    base = await api.call("p1-operator", "DELETE", "/v1/projects/p1/images/web-v1")
    assert (base.status_code, base.json()["code"]) == (409, "image-in-use")
    assert (await api.call("p1-viewer", "GET", f"{TEMPLATES}/web")).json()["revision"] == 1
