"""Changing a vm: what is stored when it is accepted, and what is refused by which name."""

from dataclasses import replace
from typing import Any

import pytest

from tests.api.kit import GIB, INVENTORY, Api
from trimtab_controller.store import describe, host_reports, schema
from trimtab_protos.messages import GuestQemu

VMS = "/v1/projects/p1/vms"
MAC = "52:54:00:00:00:09"


async def running(api: Api, **fields: Any) -> dict[str, Any]:
    """A vm as it is once its host has said that it runs; nobody works on it."""
    vm = await api.make_vm("web1", vcpus=2, vcpus_max=4, memory_max_mib=1024, **fields)
    await api.end_operations()
    seen = schema.vm.update().where(schema.vm.c.id == vm["id"]).values(observed_state="running", host_id=api.ids["node1"])
    await api.write(lambda session: session.execute(seen))
    reached = {"network_id": api.ids["default"], "host_id": api.ids["node1"], "state": "ready"}
    table = schema.network_host
    await api.write(lambda session: session.execute(table.delete().where(table.c.network_id == reached["network_id"])))
    await api.write(lambda session: session.execute(table.insert().values(reached)))
    return vm


async def make_volume(api: Api, name: str) -> None:
    body = {"name": name, "size_bytes": GIB}
    answer = await api.call("p1-operator", "POST", "/v1/projects/p1/volumes", json=body)
    assert answer.status_code == 202, answer.text
    await api.end_operations()
    there = schema.volume.update().values(observed_state="present", host_id=api.ids["node1"])
    await api.write(lambda session: session.execute(there))


async def test_a_resize_stores_the_wish_and_charges_it_at_once(api_on_each: Api) -> None:
    api = api_on_each
    vm = await running(api)
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:resize", json={"vcpus": 4})
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.resize")
    shape = (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()["shape"]
    assert (shape["vcpus"], shape["next_vcpus"], shape["next_memory_mib"]) == (2, 4, 0)
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    assert project["vcpus_used"] == 4
    (stored,) = await api.rows(schema.operation, kind="vm.resize")
    assert stored["params"] == {
        "vm_id": vm["id"], "vcpus": 4, "memory_mib": 512, "when": "auto", "before_vcpus": 0, "before_memory_mib": 0,
    }  # fmt: skip


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("resize", {}, 400, "resize-empty"),
    ("resize", {"vcpus": 5}, 400, "beyond-maximum"),
    ("resize", {"memory_mib": 2048, "when": "live"}, 400, "beyond-maximum"),
    ("resources", {}, 400, "resources-empty"),
    ("resources", {"balloon_min_mib": 1024}, 400, "balloon-above-memory"),
    ("resources", {"balloon_min_mib": 256}, 400, "balloon-impossible"),  # it can be given memory while it runs
    ("ha", {}, 400, "ha-empty"),
    ("ha", {"start_order": 2}, 400, "start-order-alone"),
    ("ha", {"start_group": "", "start_order": 2}, 400, "start-order-alone"),
    ("attach", {}, 400, "device-missing"),
    ("attach", {"volume": "data", "network": {"network": "p2-net"}}, 404, "network-not-found"),
    ("attach", {"volume": "data", "network": {"network": "default", "mac": MAC}}, 409, "mac-taken"),
    ("attach", {"volume": "none", "network": {"network": "default"}}, 404, "volume-not-found"),
    ("attach", {"volume": "none"}, 404, "volume-not-found"),
    ("attach", {"volume": "web1-root"}, 409, "volume-attached"),
    ("attach", {"network": {"network": "p2-net"}}, 404, "network-not-found"),
    ("attach", {"network": {"network": "default", "mac": MAC}}, 409, "mac-taken"),
    ("detach", {}, 400, "device-missing"),
    ("detach", {"volume": "web1-root"}, 409, "volume-boots"),
    ("detach", {"volume": "data"}, 404, "volume-not-attached"),
    ("detach", {"nic": "nic-none"}, 404, "nic-not-found"),
    ("cdrom", {"iso": "debian"}, 400, "image-not-an-iso"),
    ("cdrom", {}, 409, "no-cdrom"),
]


@pytest.mark.parametrize(("verb", "body", "status", "code"), REFUSED, ids=[f"{verb}-{code}" for verb, _, _, code in REFUSED])
async def test_a_change_that_cannot_be_is_refused_by_name(
    api: Api, verb: str, body: dict[str, Any], status: int, code: str
) -> None:
    await running(api, networks=[{"network": "default", "mac": MAC}])
    await make_volume(api, "data")
    before = [await api.rows(table) for table in (schema.vm, schema.volume, schema.nic)]
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:{verb}", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert [await api.rows(table) for table in (schema.vm, schema.volume, schema.nic)] == before, "nothing of it was stored"


async def test_a_volume_and_a_card_are_attached_by_one_operation(api_on_each: Api) -> None:
    api = api_on_each
    vm = await running(api)
    await make_volume(api, "data")
    body = {"volume": "data", "network": {"network": "default", "mac": MAC}}
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:attach", json=body)
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.attach"), answer.text
    (operation,) = await api.rows(schema.operation, kind="vm.attach")
    (volume,) = await api.rows(schema.volume, name="data")
    (card,) = await api.rows(schema.nic, mac=MAC)
    assert operation["params"] == {"vm_id": vm["id"], "volume_id": volume["id"], "nic_id": card["id"]}
    assert (volume["vm_id"], card["vm_id"]) == (vm["id"], vm["id"]), "nobody else takes them meanwhile"


async def test_what_a_vm_gets_of_its_host_is_stored_shown_and_told(api: Api) -> None:
    vm = await api.make_vm("web1", memory_mib=512, balloon_min_mib=256, cpu_class="high")
    await api.end_operations()
    assert (vm["shape"]["balloon_min_mib"], vm["shape"]["cpu_class"]) == (256, "high")
    body = {"balloon_min_mib": 0, "cpu_class": "low"}
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:resources", json=body)
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.set_resources")
    shape = (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()["shape"]
    assert (shape["balloon_min_mib"], shape["cpu_class"]) == (0, "low")


async def test_a_guest_that_runs_another_qemu_than_is_installed_says_so_and_so_do_its_host_and_the_doctor(api: Api) -> None:
    vm = await running(api)
    await api.set_vm(vm["id"], observed_host_id=api.ids["node1"])
    assert (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()["observed"]["qemu"] == ""
    newer, older = "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "7.2.17 (Debian 1:7.2+dfsg-7+deb12u16)"
    told = (GuestQemu(vm_id="vm-that-left", build=older), GuestQemu(vm_id=vm["id"], build=older))
    inventory = replace(INVENTORY, hostname="node1", qemu_build=newer, guest_qemus=told, digest="upgraded")
    await api.write(lambda session: host_reports.store_inventory(session, api.ids["node1"], inventory, now=api.clock.now()))
    observed = (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()["observed"]
    assert (observed["qemu"], observed["installed_qemu"]) == (older, newer)
    host = (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()["inventory"]
    assert (host["qemu_build"], host["guest_qemus"][vm["id"]]) == (newer, older)
    found = (await api.call("fleet-viewer", "GET", "/v1/doctor")).json()["findings"]
    (finding,) = [one for one in found if one["kind"] == "guest-qemu-other"]
    assert f"these guests run another: web1 ({older}); they keep it" in finding["message"], "and not one that is elsewhere by now"


async def test_a_vm_is_kept_from_its_operations_end_on_and_let_go_of_at_once(api: Api) -> None:
    await running(api, ha="none")
    body = {"ha": "restart", "priority": 10, "start_delay_s": 30}
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:ha", json=body)
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.set_ha"), answer.text
    shown = (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()
    assert (shown["ha"], shown["priority"], shown["start_delay_s"]) == ("none", 10, 30), "its host does not know yet"
    await api.end_operations()
    await api.write(lambda session: session.execute(schema.vm.update().values(ha="restart")))
    assert (await api.call("p1-operator", "POST", f"{VMS}/web1:ha", json={"ha": "none"})).status_code == 202
    assert (await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()["ha"] == "none"


async def test_a_vm_has_its_place_in_a_start_group_from_its_creation_until_it_is_taken_out(api: Api) -> None:
    def place(vm: dict[str, Any]) -> tuple[str, int]:
        return vm["start_group"], vm["start_order"]

    assert place(await running(api, ha="restart", start_group="shop", start_order=2)) == ("shop", 2)
    assert place(await api.make_vm("web2", start_group="shop")) == ("shop", 0)
    assert place(await api.make_vm("web3")) == ("", 0)
    await api.end_operations()
    for body, after in (
        ({"start_order": 3}, ("shop", 3)),
        ({"start_group": "yard"}, ("yard", 3)),
        ({"priority": 5}, ("yard", 3)),
        ({"start_group": ""}, ("", 0)),
        ({"start_group": "shop", "start_order": 1000}, ("shop", 1000)),
    ):
        answer = await api.call("p1-operator", "POST", f"{VMS}/web1:ha", json=body)
        assert answer.status_code == 202, answer.text
        assert place((await api.call("p1-viewer", "GET", f"{VMS}/web1")).json()) == after
        await api.end_operations()


async def test_an_order_without_a_group_is_refused_where_a_vm_is_created(api: Api) -> None:
    answer = await api.call(
        "p1-operator", "POST", VMS, json={"name": "w", "image": "debian", "memory_mib": 512, "start_order": 0}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "start-order-alone")
    assert [entry["field"] for entry in answer.json()["errors"]] == ["start_order"]
    assert "--start-group NAME" in answer.json()["detail"]
    assert await api.rows(schema.vm) == []


async def test_a_vm_whose_tpm_is_on_its_host_is_not_kept(api: Api) -> None:
    await running(api)
    await api.write(lambda session: session.execute(schema.vm.update().values(has_tpm=True)))
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:ha", json={"ha": "restart"})
    assert (answer.status_code, answer.json()["code"]) == (400, "tpm-keeps-home")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"balloon_min_mib": 1024}, "balloon-above-memory"),
        ({"balloon_min_mib": 256, "memory_max_mib": 1024}, "balloon-impossible"),
        ({"balloon_min_mib": 256, "hugepages_kib": 2048}, "balloon-impossible"),
        ({"balloon_min_mib": 256, "devices": {"10de-20b0": 1}}, "balloon-impossible"),
        ({"drivers_iso": "debian"}, "image-not-an-iso"),
    ],
)
async def test_a_balloon_that_could_not_work_and_drivers_on_no_iso_are_refused(
    api: Api, fields: dict[str, Any], code: str
) -> None:
    body = {"name": "web1", "image": "debian", "memory_mib": 512, **fields}
    answer = await api.call("p1-operator", "POST", VMS, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert await api.rows(schema.vm) == []


async def test_a_host_class_says_what_classes_of_cpu_time_mean_on_its_hosts(api: Api) -> None:
    wrong = {"cpu_classes": {"low": {"weight": 10, "limit_percent": 3}}}
    assert (await api.call("admin", "PATCH", "/v1/host-classes/default", json=wrong)).json()["code"] == "limit-too-low"
    classes = {"low": {"weight": 10, "limit_percent": 50}}
    answer = await api.call("admin", "PATCH", "/v1/host-classes/default", json={"cpu_classes": classes})
    assert (answer.status_code, answer.json()["cpu_classes"]) == (200, classes)
    vm = await api.make_vm("web1", cpu_class="low")
    host_id = api.ids["node1"]
    spec = await api.write(lambda session: describe.domain_spec(session, describe.read_vm(session, vm["id"]), host_id))
    assert spec.resources is not None
    assert (spec.resources.cpu_weight, spec.resources.cpu_limit_percent) == (10, 50)


async def test_an_attached_volume_is_the_vms_at_once_and_nobody_elses(api: Api) -> None:
    vm = await running(api)
    await make_volume(api, "data")
    answer = await api.call("p1-operator", "POST", f"{VMS}/web1:attach", json={"volume": "data"})
    assert answer.status_code == 202, answer.text
    (row,) = await api.rows(schema.volume, name="data")
    assert (row["vm_id"], row["disk_index"], row["is_deleted_with_vm"]) == (vm["id"], 1, False)
    busy = await api.call("p1-operator", "POST", f"{VMS}/web1:detach", json={"volume": "data"})
    assert (busy.status_code, busy.json()["code"]) == (409, "operation-in-progress")


async def test_a_viewer_changes_nothing(api: Api) -> None:
    await running(api)
    for verb in ("resize", "attach", "detach", "cdrom"):
        answer = await api.call("p1-viewer", "POST", f"{VMS}/web1:{verb}", json={})
        assert answer.status_code == 403, verb


async def test_an_iso_needs_a_disk_size_and_firmware_follows_the_system(api: Api) -> None:
    body = {"name": "win1", "iso": "debian", "memory_mib": 4096, "os": "win11"}
    refused = await api.call("p1-operator", "POST", VMS, json=body | {"disk_bytes": GIB})
    assert refused.json()["code"] == "image-not-an-iso"
    await api.write(
        lambda session: session.execute(schema.image.update().where(schema.image.c.name == "debian").values(kind="iso"))
    )
    refused = await api.call("p1-operator", "POST", VMS, json=body)
    assert (refused.json()["code"], refused.json()["errors"][0]["field"]) == ("size-missing", "disk_bytes")
    refused = await api.call("p1-operator", "POST", VMS, json=body | {"disk_bytes": GIB, "firmware": "bios"})
    assert refused.json()["code"] == "firmware-wrong"
    refused = await api.call("p1-operator", "POST", VMS, json=body | {"disk_bytes": GIB, "os": "win12"})
    assert refused.json()["code"] == "os-unknown"
    # Its TPM's state is on one host: elsewhere the guest would not open its disk.
    refused = await api.call("p1-operator", "POST", VMS, json=body | {"disk_bytes": GIB, "tpm": True, "ha": "restart"})
    assert (refused.json()["code"], refused.json()["errors"][0]["field"]) == ("tpm-keeps-home", "ha")
    made = (await api.call("p1-operator", "POST", VMS, json=body | {"disk_bytes": GIB, "tpm": True})).json()["vm"]
    assert (made["shape"]["firmware"], made["shape"]["has_tpm"], made["cdrom"]) == ("uefi", True, "debian")
    (root,) = await api.rows(schema.volume, name="win1-root")
    assert (root["bus"], root["base_image_id"], root["size_bytes"]) == ("sata", None, GIB)
