"""Adopting and releasing over the API: a dry run lists everything, an adoption takes everything in one transaction or nothing."""

from dataclasses import replace
from typing import Any

import pytest

from tests.api.kit import GIB, Api
from trimtab_controller.core import cpu_features
from trimtab_controller.store import schema
from trimtab_protos.adoption_messages import Described, DescribedDisk, DescribedNic, DomainDescription
from trimtab_protos.messages import DomainState

VMS = "/v1/projects/p1/vms"
MAC = "52:54:00:0f:0a:01"
LEGACY = DomainDescription(
    uuid="3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d0e",
    name="legacy-db",
    machine="pc-i440fx-7.2",
    cpu_mode="custom",
    cpu_model="qemu64",
    vcpus=2,
    vcpus_max=2,
    memory_mib=512,
    memory_max_mib=512,
    disks=(DescribedDisk(target="hda", path="/srv/trimtab/db.qcow2", format="qcow2", bus="ide", size_bytes=GIB),),
    nics=(DescribedNic(mac=MAC, model="rtl8139", bridge="br0"),),
    kept=("devices/sound (ich9)",),
    original_xml="<domain/>",
)


async def legacy_on_node1(api: Api, **changes: Any) -> DomainDescription:
    described = replace(LEGACY, **changes)
    pools = await api.rows(schema.pool, name="local")
    where = {"pool_id": pools[0]["id"], "host_id": api.ids["node1"]}
    disks = tuple(replace(disk, path=disk.path.replace("/srv/trimtab", pools[0]["path"])) for disk in described.disks)
    described = replace(described, disks=disks)
    api.consoles.domains["legacy-db"] = Described(described, described)
    there = schema.pool_host
    space = schema.pool_space
    figures = {"capacity_bytes": 100 * GIB, "available_bytes": 100 * GIB, "claimed_bytes": 0}
    for table, more in ((there, {"state": "ready"}), (space, figures)):
        gone = table.delete().where(table.c.pool_id == where["pool_id"], table.c.host_id == where["host_id"])
        await api.write(lambda session, gone=gone: session.execute(gone))
        await api.write(lambda session, table=table, more=more: session.execute(table.insert().values(**where, **more)))
    host = schema.host
    limits = {
        "vcpus_limit": 8,
        "memory_limit_mib": 4096,
        "unmanaged_vcpus": 8,
        "unmanaged_memory_mib": 4096,
        "connectivity": "up",
    }
    inventory = {
        "machines": ["pc-q35-7.1", "pc-q35-7.2"],
        "cpu_model": "Nehalem",
        "usable_cpu_models": ["Nehalem", "qemu64"],
        "cpu_features": ["aes", "vmx"],
        "capabilities": ["all-cpu-features"],
    }
    await api.write(
        lambda session: session.execute(host.update().where(host.c.name == "node1").values(**limits, inventory=inventory))
    )
    network = schema.network
    await api.write(
        lambda session: session.execute(network.update().where(network.c.name == "default").values(kind="bridge", bridge="br0"))
    )
    return described


async def adopt(api: Api, *, caller: str = "admin", dry: bool = False, **fields: Any) -> Any:
    params = {"validate_only": "true"} if dry else {}
    return await api.call(caller, "POST", f"{VMS}:adopt", json={"host": "node1", "domain": "legacy-db"} | fields, params=params)


async def test_a_dry_run_says_what_becomes_of_it_and_changes_nothing(api: Api) -> None:
    await legacy_on_node1(api)
    answer = await adopt(api, dry=True)
    assert answer.status_code == 200, answer.text
    shown = answer.json()["adoption"]
    assert (shown["machine"], shown["kept"], shown["refusals"]) == ("pc-q35-7.2", ["devices/sound (ich9)"], [])
    assert [(disk["target"], disk["bus"], disk["pool"]) for disk in shown["disks"]] == [("hda", "sata", "local")]
    assert [(nic["mac"], nic["model"], nic["network"]) for nic in shown["nics"]] == [(MAC, "e1000e", "default")]
    changes = " ".join(shown["changes_at_next_stop"])
    assert "pc-i440fx-7.2 becomes pc-q35-7.2" in changes
    assert "sata instead of ide" in changes
    assert await api.rows(schema.vm) == []


@pytest.mark.parametrize(
    ("mode", "model", "features", "kept"),
    [
        ("custom", "qemu64", ("aes", "-vmx", "?svm", "!mpx"), ["aes", "-vmx", "?svm", "-mpx"]),
        ("host-passthrough", "", ("-vmx", "+aes"), ["-vmx", "aes"]),
    ],
)
async def test_an_adopted_vm_has_the_cpu_of_its_domain_and_its_host_fits(
    api: Api, mode: str, model: str, features: tuple[str, ...], kept: list[str]
) -> None:
    await legacy_on_node1(api, cpu_mode=mode, cpu_model=model, cpu_features=features)
    answer = await adopt(api)
    assert answer.status_code == 202, answer.text
    (vm,) = await api.rows(schema.vm)
    (host,) = await api.rows(schema.host, name="node1")
    assert (vm["cpu_model"], vm["cpu_features"]) == (model or "Nehalem", kept)
    shape = (await api.call("admin", "GET", f"{VMS}/{vm['name']}")).json()["shape"]
    assert (shape["cpu_model"], shape["cpu_features"]) == (vm["cpu_model"], kept), "as `vm get` shows them"
    assert vm["cpu_model"] in host["inventory"]["usable_cpu_models"]
    assert cpu_features.missing(vm["cpu_features"], host["inventory"]["cpu_features"]) == ()


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"cpu_model": "EPYC"}, "cpu-model-unusable", "cpu_model: "),
        ({"cpu_features": ("sha-ni",)}, "cpu-features-missing", "cpu_features: "),
    ],
)
async def test_a_cpu_that_its_host_could_not_start_again_is_refused(
    api: Api, changes: dict[str, Any], code: str, field: str
) -> None:
    await legacy_on_node1(api, **changes)
    (listed,) = (await adopt(api, dry=True)).json()["adoption"]["refusals"]
    assert (listed["code"], listed["message"].startswith(field)) == (code, True)
    refused = await adopt(api)
    assert (refused.status_code, refused.json()["code"]) == (409, code)
    assert await api.rows(schema.vm) == []


async def test_an_adoption_takes_claim_mac_volume_and_quota_at_once(api_on_each: Api) -> None:
    api = api_on_each
    await legacy_on_node1(api)
    answer = await adopt(api)
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "vm.adopt"), answer.text
    (vm,) = await api.rows(schema.vm)
    assert (vm["name"], vm["origin"], vm["uuid"], vm["host_id"]) == ("legacy-db", "adopted", LEGACY.uuid, api.ids["node1"])
    (host,) = await api.rows(schema.host, name="node1")
    # It was counted as a stranger's before and is counted once now.
    assert (host["vcpus_claimed"], host["unmanaged_vcpus"]) == (2, 6)
    (nic,) = await api.rows(schema.nic)
    (volume,) = await api.rows(schema.volume)
    (claim,) = await api.rows(schema.disk_claim)
    assert (nic["mac"], volume["observed_state"], claim["size_bytes"]) == (MAC, "present", GIB)
    again = await adopt(api, name="other")
    assert (again.status_code, again.json()["code"]) == (409, "uuid-taken")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"obstacles": ("it has 2 snapshots; delete them with `virsh snapshot-delete`",)}, "domain-not-adoptable"),
    ({"disks": (DescribedDisk(target="vda", path="/elsewhere/db.qcow2", format="qcow2"),)}, "disk-outside-pools"),
    (
        {"disks": (DescribedDisk(target="vda", path="/srv/trimtab/a", problem="it lies over a backing file"),)},
        "disk-not-adoptable",
    ),
    ({"disks": (DescribedDisk(target="vda", path="/srv/trimtab/a", volume_id="vol-1"),)}, "disk-is-a-volume"),
    ({"disks": ()}, "no-disks"),
    ({"nics": (DescribedNic(mac=MAC, bridge="virbr0"),)}, "network-unknown"),
    ({"vm_id": "vm-1"}, "domain-is-ours"),
    ({"arch": "aarch64"}, "arch-unknown"),
]


@pytest.mark.parametrize(("changes", "code"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
async def test_what_cannot_be_adopted_is_refused_by_name_and_listed_by_a_dry_run(
    api: Api, changes: dict[str, Any], code: str
) -> None:
    await legacy_on_node1(api, **changes)
    listed = (await adopt(api, dry=True)).json()["adoption"]["refusals"]
    assert [one["code"] for one in listed] == [code]
    refused = await adopt(api)
    assert (refused.status_code, refused.json()["code"]) == (409, code)
    assert await api.rows(schema.vm) == []


async def test_a_disk_that_is_another_vms_volume_is_refused_until_that_vm_is_released(api: Api) -> None:
    await api.make_vm("web1", pool="local")
    (volume,) = await api.rows(schema.volume)
    gone = schema.volume.update().where(schema.volume.c.id == volume["id"])
    for layer in ("", ".snap-1"):
        path = f"/srv/trimtab/volumes/{volume['id']}{layer}.qcow2"
        await legacy_on_node1(api, disks=(DescribedDisk(target="vda", path=path, format="qcow2", bus="virtio", size_bytes=GIB),))
        (listed,) = (await adopt(api, dry=True)).json()["adoption"]["refusals"]
        said = "disk vda is volume web1-root of vm web1; `trimtab vm release web1` gives it up"
        assert (listed["code"], listed["message"]) == ("disk-is-a-volume", said)
        refused = await adopt(api)
        assert (refused.status_code, refused.json()["code"]) == (409, "disk-is-a-volume")
    deleted_at = api.clock.now()
    hidden = gone.values(deleted_at=deleted_at, purge_after=deleted_at)
    await api.write(lambda session: session.execute(hidden))
    assert (await adopt(api)).json()["code"] == "disk-is-a-volume", "it can come back"
    await api.write(lambda session: session.execute(gone.values(purge_after=None)))
    answer = await adopt(api)
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_disk_that_is_an_images_file_is_refused_by_the_images_name(api: Api, is_known: bool) -> None:
    image = (await api.rows(schema.image))[0]
    path = f"/srv/trimtab/images/{image['id'] if is_known else 'base'}.qcow2"
    await legacy_on_node1(api, disks=(DescribedDisk(target="vda", path=path, format="qcow2", bus="virtio", size_bytes=GIB),))
    (listed,) = (await adopt(api, dry=True)).json()["adoption"]["refusals"]
    said = f"disk vda is the file of image {image['name']}" if is_known else "the folder where pool local keeps its images"
    assert (listed["code"], said in listed["message"]) == ("disk-is-an-image", True), listed
    refused = await adopt(api)
    assert (refused.status_code, refused.json()["code"]) == (409, "disk-is-an-image")
    assert await api.rows(schema.vm) == []


async def test_no_claim_room_leaves_nothing_behind(api: Api) -> None:
    await legacy_on_node1(api, state=DomainState.RUNNING, vcpus=12, vcpus_max=12)
    refused = await adopt(api)
    assert refused.json()["code"] == "host-full"
    assert await api.rows(schema.vm) == []
    assert (await api.rows(schema.host, name="node1"))[0]["unmanaged_vcpus"] == 8


async def test_only_an_operator_of_the_fleet_adopts(api: Api) -> None:
    await legacy_on_node1(api)
    assert (await adopt(api, caller="p1-operator")).status_code == 403


async def test_a_release_is_refused_while_something_depends_on_the_vm(api: Api) -> None:
    vm = await api.make_vm("web1")
    await api.end_operations()
    nowhere = await api.call("p1-operator", "POST", f"{VMS}/web1:release")
    assert nowhere.json()["code"] == "vm-not-placed"
    table = schema.vm
    for values, code in (
        ({"backup_policy_id": "bp-1"}, "vm-backed-up"),
        ({"backup_policy_id": "", "ha": "restart"}, "vm-is-kept"),
    ):
        placed = table.update().where(table.c.id == vm["id"]).values(host_id=api.ids["node1"], **values)
        await api.write(lambda session, placed=placed: session.execute(placed))
        refused = await api.call("p1-operator", "POST", f"{VMS}/web1:release")
        assert (refused.status_code, refused.json()["code"]) == (409, code)
    await api.write(lambda session: session.execute(table.update().values(ha="none")))
    assert (await api.call("p1-operator", "POST", f"{VMS}/web1:release")).json()["operation"]["kind"] == "vm.release"
    live = await api.call("p1-operator", "POST", f"{VMS}/web1:release")
    assert live.json()["code"] == "operation-in-progress"


async def drifted(api: Api, **by_hand: Any) -> dict[str, Any]:
    """A running vm whose domain somebody changed."""
    vm = await api.make_vm("web1", vcpus=2, vcpus_max=4)
    await api.end_operations()
    table = schema.vm
    seen = {"observed_state": "running", "host_id": api.ids["node1"], "machine": "pc-q35-7.2", "cpu_model": "qemu64"}
    await api.write(lambda session: session.execute(table.update().where(table.c.id == vm["id"]).values(**seen)))
    (volume,) = await api.rows(schema.volume, vm_id=vm["id"])
    nics = await api.rows(schema.nic, vm_id=vm["id"])
    as_ours = replace(
        LEGACY,
        vm_id=vm["id"],
        machine="pc-q35-7.2",
        memory_mib=vm["shape"]["memory_mib"],
        disks=(DescribedDisk(target="vda", path="/p/volumes/v.qcow2", volume_id=volume["id"], bus="virtio", boot_order=1),),
        nics=tuple(DescribedNic(mac=nic["mac"], bridge="br0") for nic in nics),
    )
    api.consoles.domains[vm["id"]] = Described(replace(as_ours, **by_hand), as_ours)
    return vm


async def test_a_vm_as_it_shall_be_has_no_differences(api: Api) -> None:
    await drifted(api)
    shown = (await api.call("p1-viewer", "GET", f"{VMS}/web1:diff")).json()
    assert (shown["is_drifted"], shown["differences"], shown["is_original_in_force"]) == (False, [], False)
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "revert"})
    assert refused.json()["code"] == "nothing-to-reconcile"


async def test_what_was_changed_by_hand_is_shown_and_settled_either_way(api: Api) -> None:
    await drifted(api, vcpus=4)
    shown = (await api.call("p1-viewer", "GET", f"{VMS}/web1:diff")).json()
    assert shown["differences"] == [{"field": "vcpus", "desired": "2", "live": "4", "stored": "2"}]
    taken = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (taken.status_code, taken.json()["operation"]["kind"]) == (202, "vm.resize"), taken.text
    (project,) = await api.rows(schema.project, id=api.ids["p1"])
    assert project["vcpus_used"] == 4, "what is taken over is charged"
    await api.end_operations()
    put_back = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "revert"})
    assert put_back.json()["operation"]["kind"] == "vm.reconcile"


async def test_a_balloon_that_somebody_filled_by_hand_is_shown_and_goes_back(api: Api) -> None:
    await drifted(api, squeezed_to_mib=120)
    shown = (await api.call("p1-viewer", "GET", f"{VMS}/web1:diff")).json()
    assert shown["differences"] == [{"field": "balloon_mib", "desired": "", "live": "120", "stored": ""}]
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (refused.status_code, refused.json()["code"]) == (409, "cannot-be-accepted")
    put_back = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "revert"})
    assert put_back.json()["operation"]["kind"] == "vm.reconcile"


async def test_what_does_not_fit_the_model_is_not_accepted(api: Api) -> None:
    stray = DescribedDisk(target="vdb", path="/tmp/x.qcow2")
    await drifted(api, disks=(stray,))
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (refused.status_code, refused.json()["code"]) == (409, "cannot-be-accepted")
    assert "disk vdb" in refused.json()["detail"]


async def test_what_the_model_cannot_say_of_a_disk_is_named_and_refused(api: Api) -> None:
    (ours,) = (await drifted_disks(api)).live.disks
    await change_by_hand(api, disks=(replace(ours, cache="writeback", iops_limit=100),))
    shown = (await api.call("p1-viewer", "GET", f"{VMS}/web1:diff")).json()["differences"]
    assert [one["field"].partition(".")[2] for one in shown] == ["cache", "iops_limit"]
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (refused.status_code, refused.json()["code"]) == (409, "cannot-be-accepted")
    assert ".cache" in refused.json()["detail"]
    assert await api.rows(schema.operation, kind="volume.limit") == [], "nothing is taken over where not all can be"


async def test_limits_that_were_set_by_hand_are_the_volumes_from_now_on(api: Api) -> None:
    (ours,) = (await drifted_disks(api)).live.disks
    await change_by_hand(api, disks=(replace(ours, iops_limit=100, bandwidth_limit_bytes_s=8 << 20),))
    taken = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (taken.status_code, taken.json()["operation"]["kind"]) == (202, "volume.limit"), taken.text
    (volume,) = await api.rows(schema.volume)
    assert (volume["iops_limit"], volume["bandwidth_limit_mib_s"]) == (100, 8)


async def test_a_card_that_came_or_went_by_hand_is_the_vms_or_is_not(api: Api) -> None:
    await drifted_disks(api)
    there = {"network_id": api.ids["default"], "host_id": api.ids["node1"], "state": "ready", "bridge": "br0"}
    table = schema.network_host
    await api.write(lambda session: session.execute(table.delete().where(table.c.network_id == there["network_id"])))
    await api.write(lambda session: session.execute(table.insert().values(there)))
    await api.write(lambda session: session.execute(schema.network.update().values(kind="bridge", bridge="br0")))
    mac = "52:54:00:0a:0b:0c"
    await change_by_hand(api, nics=(DescribedNic(mac=mac, bridge="br7"),))
    refused = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert "no network of Trimtab" in refused.json()["detail"], refused.text
    await change_by_hand(api, nics=(DescribedNic(mac=mac, bridge="br0"),))
    taken = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (taken.status_code, taken.json()["operation"]["kind"]) == (202, "vm.attach"), taken.text
    assert [nic["mac"] for nic in await api.rows(schema.nic)] == [mac]
    await api.end_operations()
    await change_by_hand(api, nics=())
    taken = await api.call("p1-operator", "POST", f"{VMS}/web1:reconcile", json={"mode": "accept"})
    assert (taken.status_code, taken.json()["operation"]["kind"]) == (202, "vm.detach"), taken.text


async def drifted_disks(api: Api) -> Described:
    vm = await drifted(api)
    return api.consoles.domains[vm["id"]]


async def change_by_hand(api: Api, **by_hand: Any) -> None:
    ((vm_id, described),) = api.consoles.domains.items()
    api.consoles.domains[vm_id] = Described(replace(described.live, **by_hand), described.stored)
