"""Snapshots of disks that are images of a Ceph pool, through the sagas: kept, gone back to and given up as files are."""

import pytest

from tests.operations import examples_snapshots as snaps
from tests.operations.block_kit import block_pool, ceph_pool, on_block_pool
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Pool
from trimtab_controller.services import clones, vm_power
from trimtab_controller.store import schema
from trimtab_protos.errors import Conflict
from trimtab_protos.pool_messages import IscsiSource


@pytest.fixture
def ceph(story: FleetStory) -> Pool:
    return ceph_pool(story)


def test_what_is_kept_of_an_image_is_gone_back_to_and_given_up(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "first")
    snaps.writes(story, vm, "b")
    snaps.snapshotted(story, vm, "second")
    for name, expected in (("first", {"a"}), ("second", {"a", "b"})):
        snaps.accept_revert(story, story.vm(vm.id), name)
        story.settle()
        assert snaps.marks(story, vm.id) == expected
        assert story.running_on(vm.id)
    for name in ("first", "second"):
        snaps.accept_delete(story, vm, name)
        story.settle()
    assert snaps.marks(story, vm.id) == {"a", "b"}
    assert snaps.layer_count(story, vm.id) == 0


def test_an_image_is_not_kept_before_its_guest_is_held_still(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    before = len(story.wire.calls)
    accepted = snaps.accept_snapshot(story, vm, "first")
    story.settle()
    verbs = [call.verb for call in story.wire.calls[before:]]
    assert "SwitchLayers" in verbs
    assert "EnsureVolume" not in verbs, "which would keep it at another instant than the vm's other disks"
    assert story.operation(accepted.id).state is OperationState.DONE


def test_a_snapshot_of_an_image_goes_along_when_its_vm_moves(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "first")
    snaps.writes(story, vm, "b")
    story.accept_power(story.vm(vm.id), "migrate")
    story.settle()
    assert story.vm(vm.id).host_id != vm.host_id
    for host in story.fleet.hosts.values():
        host.volume_keys.clear()
    snaps.accept_revert(story, story.vm(vm.id), "first")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a"}, "its host was given the key that it lacked"


def test_a_vm_that_is_off_is_kept_and_goes_back_without_a_guest(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    snaps.writes(story, vm, "a")
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    snaps.snapshotted(story, story.vm(vm.id), "cold")
    assert [one.consistency for one in snaps.kept(story, vm.id)] == ["stopped"]
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    snaps.writes(story, vm, "b")
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    snaps.accept_revert(story, story.vm(vm.id), "cold")
    story.settle()
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a"}


def test_what_no_image_and_no_lun_can_is_refused_with_what_does_instead(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    with pytest.raises(Conflict, match="--memory") as memory:
        snaps.accept_snapshot(story, vm, "warm", has_memory=True)
    assert memory.value.code == "volume-is-image"
    caller = vm_power.Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    for wish in (clones.CloneSpec(name="other", is_linked=True), clones.CloneSpec(name="other", is_linked=False)):
        with pytest.raises(Conflict, match="trimtab backup restore BACKUP --as NAME") as clone:
            story.db.write(lambda session, wish=wish: clones.clone(session, vm, caller, wish, project=story.project))  # type: ignore[misc]
        assert clone.value.code == "volume-is-image"
    san = block_pool(story, "san", IscsiSource(portal="10.0.0.5:3260", target="iqn.2026-01.example:san"))
    rover = on_block_pool(story, san, "rover", unit="1")
    with pytest.raises(Conflict, match="only its own server makes snapshots") as lun:
        snaps.accept_snapshot(story, rover, "first")
    assert lun.value.code == "volume-not-qcow2"
    assert f"trimtab backup run {rover.name}" in lun.value.message


def test_an_agent_that_knows_no_layers_of_images_is_not_asked_for_them(story: FleetStory, ceph: Pool) -> None:
    vm = on_block_pool(story, ceph, "floater")
    inventory = {"capabilities": ["layers", "pool-rbd"]}
    table = schema.host
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.host_id).values(inventory=inventory)))
    with pytest.raises(Conflict, match="upgrade it first") as refused:
        snaps.accept_snapshot(story, vm, "first")
    assert refused.value.code == "not-supported-here"
