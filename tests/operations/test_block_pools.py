"""Pools without files through the sagas: who is told their secrets, what is claimed of them, and who is not told of them at all."""

import pytest

from tests.operations.backup_kit import accept_backup, accept_restore, content_of, made_backup, ready_repo, write_to
from tests.operations.block_kit import ceph_pool, on_block_pool
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Backup, Operation, Pool, Vm
from trimtab_controller.operations import encrypted
from trimtab_controller.services import backup_restore
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.store import describe, host_reports, pools, schema, vms, volumes
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.pool_messages import IscsiSource

TARGET = "iqn.2026-01.example:san"
PASSWORD = "chap-that-nobody-reads"


@pytest.fixture
def san(story: FleetStory) -> Pool:
    source = IscsiSource(portal="10.0.0.5:3260", target=TARGET, chap_user="fleet")
    spec = pool_service.PoolSpec(
        name="san", kind="iscsi", path="", is_shared=False, is_default=False, behind=source, secret=PASSWORD
    )
    _view, operation = story.db.write(
        lambda session: pool_service.create(session, spec, actor=story.actor, now=story.clock.now(), box=story.secrets)
    )
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    found = story.db.read(lambda session: pools.find(session, "san"))
    assert found is not None
    return found


def make_volume(story: FleetStory, pool: Pool, *, unit: str, size_bytes: int = GIB) -> Operation:
    spec = volume_service.VolumeSpec(name=f"lun{unit}", size_bytes=size_bytes, pool=pool.name, format="", image="", unit=unit)
    _view, operation = story.db.write(
        lambda session: volume_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    return story.operation(operation.id)


def test_every_host_is_told_the_password_once_it_asks_and_no_marker_is_written(story: FleetStory, san: Pool) -> None:
    assert (san.is_shared, san.sharing_proven_at is not None) == (True, True)
    assert [host.volume_keys for host in story.fleet.hosts.values()] == [{san.id: PASSWORD}] * 3
    assert [call.verb for call in story.wire.calls if call.verb == "CheckPoolMarker"] == []


def test_a_host_that_joins_later_is_told_the_password_too(story: FleetStory, san: Pool) -> None:
    host_id = story.add_host("latecomer")
    prepared = story.accept("host.prepare", host_id, {"host_id": host_id}, name="latecomer")
    story.settle()
    assert story.operation(prepared.id).state is OperationState.DONE, story.operation(prepared.id).error
    assert story.hypervisor(host_id).volume_keys == {san.id: PASSWORD}
    found = {one.host_id: one.state for one in story.db.read(lambda session: pools.hosts_of(session, [san.id]))[san.id]}
    assert found[host_id] == "ready"


def test_a_lun_takes_room_from_nobody_and_its_vm_is_started_wherever_the_target_is_reached(story: FleetStory, san: Pool) -> None:
    made = make_volume(story, san, unit="1", size_bytes=8 << 50)
    assert made.state is OperationState.DONE, made.error
    assert story.db.read(lambda session: session.execute(schema.disk_claim.select()).all()) == []
    for host in story.fleet.hosts.values():
        host.volume_keys.clear()
    vm, _operation = story.accept_create("rover", image_id="", pool_id="", volume="lun1", disk_bytes=None)
    story.settle()
    home = story.vm(vm.id).host_id
    assert story.running_on(vm.id)
    assert story.hypervisor(home).volume_keys == {san.id: PASSWORD}
    (disk,) = story.hypervisor(home).domains[vm.id].spec.disks
    assert disk.unit == "1"
    moved = story.accept_power(story.vm(vm.id), "migrate")
    story.settle()
    assert story.operation(moved.id).state is OperationState.DONE, story.operation(moved.id).error


def test_the_number_of_a_deleted_volume_is_free_once_it_is_purged(story: FleetStory, san: Pool) -> None:
    made = make_volume(story, san, unit="1")
    deleted = story.db.write(
        lambda session: volume_service.delete(
            session, "lun1", project=story.project, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert story.operation(deleted.id).state is OperationState.DONE
    story.accept("volume.purge", made.subject_id, {"volume_id": made.subject_id}, name="lun1", project_id=story.project.id)
    story.settle()
    assert make_volume(story, san, unit="1").state is OperationState.DONE


def test_an_agent_that_knows_no_such_pools_is_not_told_of_them(story: FleetStory, san: Pool) -> None:
    host_id = story.host_ids[0]

    def told() -> set[str]:
        return {one.pool_id for one in story.db.read(lambda session: host_reports.pool_specs_of(session, host_id))}

    assert san.id in told()
    inventory = {"capabilities": ["pool-dir", "pool-nfs"]}
    story.db.write(
        lambda session: session.execute(schema.host.update().where(schema.host.c.id == host_id).values(inventory=inventory))
    )
    assert san.id not in told()
    assert story.shared.id in told()


def test_a_seed_needs_a_pool_of_files(story: FleetStory, san: Pool) -> None:
    make_volume(story, san, unit="1")
    with pytest.raises(InvalidRequest) as refused:
        story.accept_create("rover", image_id="", pool_id="", volume="lun1", disk_bytes=None, firmware="uefi")
    assert refused.value.code == "pool-without-files"


def test_a_volume_of_a_thin_pool_claims_its_full_size_on_its_host(story: FleetStory) -> None:
    pool = story.add_pool("thin", is_shared=False)
    values = {"kind": "lvm_thin", "settings": {"volume_group": "vg0", "thin_pool": "thin"}}
    table = schema.pool
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == pool.id).values(**values)))
    spec = volume_service.VolumeSpec(name="data", size_bytes=GIB, pool="thin", format="", image="")
    _view, operation = story.db.write(
        lambda session: volume_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    volume = story.db.read(lambda session: describe.get_volume(session, operation.subject_id))
    assert (volume.format.value, volume.host_id != "") == ("raw", True)
    (claim,) = story.db.read(lambda session: session.execute(schema.disk_claim.select()).all())
    assert (claim.volume_id, claim.size_bytes) == (volume.id, GIB)


# --- backups ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rover(story: FleetStory, san: Pool) -> Vm:
    ready_repo(story)
    make_volume(story, san, unit="1")
    vm, _operation = story.accept_create("rover", image_id="", pool_id="", volume="lun1", disk_bytes=None)
    story.settle()
    return story.vm(vm.id)


def test_a_vm_on_a_lun_is_backed_up_by_increments_while_its_qemu_lives_and_in_full_after_a_stop(
    story: FleetStory, rover: Vm
) -> None:
    write_to(story, rover.id, 0, b"first" * 1000)
    full = made_backup(story, rover)
    write_to(story, rover.id, 512 * 1024, b"second" * 1000)
    increment = made_backup(story, rover)
    assert (increment.base_id, increment.full_reason) == (full.id, "")
    assert increment.read_bytes < increment.size_bytes
    story.accept_power(rover, "stop")
    story.settle()
    stopped = made_backup(story, story.vm(rover.id))
    assert "does not know the checkpoint" in stopped.full_reason
    story.accept_power(story.vm(rover.id), "start")
    story.settle()
    again = made_backup(story, story.vm(rover.id))
    assert "does not know the checkpoint" in again.full_reason, "nobody could mark the unit while its QEMU was gone"
    before = content_of(story, rover.id)

    restored = accept_restore(story, again, "rover2", pools={"san": "local"})
    story.settle()

    assert story.operation(restored.id).state is OperationState.DONE, story.operation(restored.id).error
    assert content_of(story, restored.subject_id) == before
    (volume,) = story.volumes(restored.subject_id)
    assert (volume.pool_id, volume.format.value) == (story.local.id, "qcow2"), "a file of a pool of files"


def test_what_a_guest_on_a_lun_overwrites_meanwhile_is_kept_in_its_hosts_own_pool_of_files_with_most_room(
    story: FleetStory, rover: Vm
) -> None:
    roomy = story.add_pool("roomy", is_shared=False)
    space = schema.pool_space
    with_room = space.update().where(space.c.pool_id == roomy.id).values(available_bytes=1 << 50)
    story.db.write(lambda session: session.execute(with_room))
    assert story.db.read(lambda session: encrypted.scratch_pool_id(session, rover.id)) == roomy.id
    other = story.running_vm("on-files")
    assert story.db.read(lambda session: encrypted.scratch_pool_id(session, other.id)) == "", "beside its own file"


def test_a_host_without_a_pool_of_files_says_so_before_a_backup_begins(story: FleetStory, rover: Vm) -> None:
    table = schema.pool_host
    gone = table.update().where(table.c.pool_id.in_([story.local.id, story.shared.id])).values(state="failed")
    story.db.write(lambda session: session.execute(gone))
    with pytest.raises(Conflict) as refused:
        accept_backup(story, rover)
    assert refused.value.code == "scratch-pool-missing"
    assert "trimtab pool create" in refused.value.message


def test_an_agent_that_backs_up_no_raw_volumes_is_not_asked_to(story: FleetStory, rover: Vm) -> None:
    inventory = {"capabilities": ["pool-dir", "pool-iscsi"]}
    host = schema.host
    story.db.write(lambda session: session.execute(host.update().where(host.c.id == rover.host_id).values(inventory=inventory)))
    with pytest.raises(Conflict) as refused:
        accept_backup(story, rover)
    assert refused.value.code == "agent-too-old"


def accept_replace(story: FleetStory, backup: Backup) -> Operation:
    return story.db.write(
        lambda session: backup_restore.replace(
            session, backup.id, vms.get(session, backup.vm_id), project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def stopped_with_a_backup(story: FleetStory, rover: Vm) -> Backup:
    """Return a backup, after which the guest wrote what is to go; it is off."""
    write_to(story, rover.id, 0, b"first" * 1000)
    backup = made_backup(story, rover)
    write_to(story, rover.id, 0, b"other" * 1000)
    story.accept_power(rover, "stop")
    story.settle()
    return backup


def test_a_lun_is_written_over_with_what_a_backup_holds(story: FleetStory, rover: Vm) -> None:
    (before,) = story.volumes(rover.id)
    backup = stopped_with_a_backup(story, rover)
    for host in story.fleet.hosts.values():
        host.volume_keys.clear()
    operation = accept_replace(story, backup)
    assert (operation.params["overwritten"], operation.params["replaced"]) == ({before.id: "vda"}, {})
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    (after,) = story.volumes(rover.id)
    assert (after.id, after.unit, after.observed_state) == (before.id, "1", "present")
    assert after.generation > before.generation, "no checkpoint of what was there before is believed"
    assert content_of(story, rover.id).startswith(b"first" * 1000)
    assert story.hypervisor(story.vm(rover.id).host_id).volume_keys == {after.pool_id: PASSWORD}
    story.accept_power(story.vm(rover.id), "start")
    story.settle()
    assert story.running_on(rover.id)
    next_one = made_backup(story, story.vm(rover.id))
    assert "its content was reverted or restored after" in next_one.full_reason
    assert (next_one.base_id, next_one.read_bytes > 0) == (backup.id, True)
    third = made_backup(story, story.vm(rover.id))
    assert third.full_reason == "", "from then on it is an increment again"


def test_a_lun_that_holds_half_of_a_backup_is_not_used_until_it_is_whole(story: FleetStory, rover: Vm) -> None:
    backup = stopped_with_a_backup(story, rover)
    second = made_backup(story, story.vm(rover.id))
    operation = accept_replace(story, backup)
    # Cut off in the middle: what was begun is marked, and whoever looks after the vm gave the operation up.
    (volume,) = story.volumes(rover.id)
    story.db.write(lambda session: volumes.set_half_written(session, [volume.id]))
    end = schema.operation.update().where(schema.operation.c.id == operation.id)
    story.db.write(lambda session: session.execute(end.values(state="failed", ended_at=story.clock.now())))
    for refused_verb in (
        lambda: story.accept_power(story.vm(rover.id), "start"),
        lambda: accept_backup(story, story.vm(rover.id)),
    ):
        with pytest.raises(Conflict, match="backup restore BACKUP --replace rover") as refused:
            refused_verb()
        assert refused.value.code == "volume-half-restored"
    again = accept_replace(story, second)
    story.settle()
    assert story.operation(again.id).state is OperationState.DONE, story.operation(again.id).error
    assert content_of(story, rover.id).startswith(b"other" * 1000), "the way back is a backup of what was there"
    story.accept_power(story.vm(rover.id), "start")
    story.settle()
    assert story.running_on(rover.id)


def test_a_backup_of_a_greater_disk_is_not_written_over_a_lun(story: FleetStory, rover: Vm) -> None:
    backup = stopped_with_a_backup(story, rover)
    shrunk = schema.volume.update().where(schema.volume.c.vm_id == rover.id)
    story.db.write(lambda session: session.execute(shrunk.values(size_bytes=512)))
    with pytest.raises(Conflict, match="--as NAME") as refused:
        accept_replace(story, backup)
    assert refused.value.code == "lun-too-small"


def test_an_agent_that_writes_no_backup_into_a_lun_is_not_asked_to(story: FleetStory, rover: Vm) -> None:
    backup = stopped_with_a_backup(story, rover)
    inventory = {"capabilities": ["pool-iscsi", "backup-raw"]}
    host = schema.host
    story.db.write(lambda session: session.execute(host.update().where(host.c.id == rover.host_id).values(inventory=inventory)))
    with pytest.raises(Conflict, match="--as NAME") as refused:
        accept_replace(story, backup)
    assert refused.value.code == "agent-too-old"


def test_an_image_of_ceph_is_made_anew_beside_the_old_one_which_goes_once_the_new_one_is_whole(story: FleetStory) -> None:
    ready_repo(story)
    vm = on_block_pool(story, ceph_pool(story), "floater")
    (before,) = story.volumes(vm.id)
    backup = stopped_with_a_backup(story, vm)
    operation = accept_replace(story, backup)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    (after,) = story.volumes(vm.id)
    assert (after.name, after.pool_id, after.format.value) == (before.name, before.pool_id, "raw")
    assert after.id != before.id
    assert content_of(story, vm.id).startswith(b"first" * 1000)
    store = story.fleet.store(
        vm.host_id, story.db.read(lambda session: describe.pool_spec(describe.get_pool(session, after.pool_id)))
    )
    assert (before.id in store.volumes, after.id in store.volumes) == (False, True)
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    assert made_backup(story, story.vm(vm.id)).full_reason == f"vda: it is another volume than in {backup.id}"
    assert made_backup(story, story.vm(vm.id)).full_reason == ""


def test_a_logical_volume_is_not_written_over(story: FleetStory, rover: Vm) -> None:
    backup = stopped_with_a_backup(story, rover)
    values = {"kind": "lvm_thin", "settings": {"volume_group": "vg0", "thin_pool": "thin"}}
    story.db.write(lambda session: session.execute(schema.pool.update().where(schema.pool.c.name == "san").values(**values)))
    with pytest.raises(Conflict, match="--as NAME") as refused:
        accept_replace(story, backup)
    assert refused.value.code == "pool-without-files"
