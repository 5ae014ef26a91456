"""What snapshots promise beyond the matrix of faults: trees, refusals, moves, what a cut leaves and how it is put in order."""

from dataclasses import replace

import pytest

from tests.operations import examples_snapshots as snaps
from tests.operations.examples_changes import accept_detach, accept_volume_resize, attaches
from tests.operations.examples_storage import present_volume
from tests.operations.invariants import audit_invariants
from tests.operations.kit import GIB, FleetStory
from tests.operations.test_plans import make
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import ObservedState, OperationState
from trimtab_controller.core.planning import Cause, PlanKind
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import snapshots as service
from trimtab_controller.store import describe, host_reports
from trimtab_protos.errors import AlreadyExists, Conflict


def test_a_tree_grows_where_one_went_back_and_every_branch_is_reached(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "first")
    snaps.writes(story, vm, "b")
    snaps.snapshotted(story, vm, "second")
    snaps.writes(story, vm, "c")
    snaps.accept_revert(story, story.vm(vm.id), "first")
    story.settle()
    snaps.writes(story, vm, "d")
    snaps.snapshotted(story, vm, "other")
    shown = story.db.read(lambda session: service.views(session, story.vm(vm.id)))
    assert [(one.snapshot.name, one.parent_name, one.is_current) for one in shown] == [
        ("first", "", False),
        ("second", "first", False),
        ("other", "first", True),
    ]
    for name, expected in (("second", {"a", "b"}), ("other", {"a", "d"}), ("first", {"a"})):
        snaps.accept_revert(story, story.vm(vm.id), name)
        story.settle()
        assert snaps.marks(story, vm.id) == expected
    # The base of two branches stays as a file, and goes once one branch is left.
    snaps.accept_delete(story, vm, "first")
    story.settle()
    for name, expected in (("second", {"a", "b"}), ("other", {"a", "d"})):
        snaps.accept_revert(story, story.vm(vm.id), name)
        story.settle()
        assert snaps.marks(story, vm.id) == expected
    snaps.accept_delete(story, vm, "second")
    story.settle()
    snaps.accept_delete(story, vm, "other")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a", "d"}
    assert snaps.layer_count(story, vm.id) == 0


def test_a_vm_with_snapshots_moves_with_them(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "before", has_memory=True)
    snaps.writes(story, vm, "b")
    before = story.vm(vm.id).host_id
    story.accept_power(story.vm(vm.id), "migrate")
    story.settle()
    assert story.vm(vm.id).host_id != before
    snaps.runs_on_what_sql_says(story, vm.id)
    snaps.accept_revert(story, story.vm(vm.id), "before")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a"}
    snaps.accept_delete(story, vm, "before")
    story.settle()
    assert snaps.layer_count(story, vm.id) == 0
    assert snaps.marks(story, vm.id) == {"a"}


def test_on_a_hosts_own_storage_snapshots_hold_a_vm_where_it_is_and_say_so(story: FleetStory) -> None:
    image = story.add_image("own", story.shared)
    vm = story.running_vm(pool=story.local, image=image)
    accepted = snaps.accept_snapshot(story, vm, "before")
    story.settle()
    assert story.operation(accepted.id).state is OperationState.DONE
    with pytest.raises(Conflict, match=f"vm snapshot delete {vm.name} before") as caught:
        story.accept_power(story.vm(vm.id), "migrate")
    assert caught.value.code == "layers-are-local"
    (blocker,) = make(story, PlanKind.DRAIN, vm.host_id).plan.blockers
    assert (blocker.cause, "vm snapshot delete" in blocker.cure) == (Cause.LOCAL_DISK, True), "a drain tells it before it begins"
    snaps.accept_delete(story, vm, "before")
    story.settle()
    story.accept_power(story.vm(vm.id), "migrate")
    story.settle()


def test_what_snapshots_forbid_is_refused_with_the_next_command(story: FleetStory) -> None:
    vm = story.running_vm(vcpus=2, vcpus_max=4)
    snaps.snapshotted(story, vm, "before", has_memory=True)
    volume = story.volumes(vm.id)[0]
    with pytest.raises(Conflict, match=f"trimtab vm snapshot delete {vm.name} before") as caught:
        accept_volume_resize(story, volume.id, 3 * GIB)
    assert caught.value.code == "volume-has-snapshots"
    with pytest.raises(AlreadyExists, match="choose another name"):
        snaps.accept_snapshot(story, vm, "before")
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    with pytest.raises(Conflict, match="--disk-only") as off:
        snaps.accept_revert(story, story.vm(vm.id), "before")
    assert off.value.code == "vm-not-running"
    with pytest.raises(Conflict, match="has no memory to keep"):
        snaps.accept_snapshot(story, story.vm(vm.id), "cold", has_memory=True)
    snaps.accept_revert(story, story.vm(vm.id), "before", disk_only=True)
    story.settle()
    assert story.vm(vm.id).observed_state is ObservedState.STOPPED


def test_a_vm_with_layers_goes_only_where_the_agent_knows_them(story: FleetStory) -> None:
    """An agent of an older release would let the guest write to the bottom layer."""
    vm = story.running_vm()
    snaps.snapshotted(story, vm, "before")
    for host_id in story.host_ids:
        if host_id != vm.host_id:
            _forget_layers(story, host_id)
    moved = story.accept_power(story.vm(vm.id), "migrate")
    story.settle()
    ended = story.operation(moved.id)
    assert (ended.state, ended.error and ended.error.code) == (OperationState.FAILED, "no-host-fits")
    _forget_layers(story, vm.host_id)
    with pytest.raises(Conflict) as caught:
        snaps.accept_snapshot(story, story.vm(vm.id), "another")
    assert caught.value.code == "not-supported-here"


def _forget_layers(story: FleetStory, host_id: str) -> None:
    inventory = story.hypervisor(host_id).inventory()
    known = tuple(one for one in inventory.capabilities if one != "layers")
    older = replace(inventory, capabilities=known, digest=f"older-{host_id}")
    story.db.write(lambda session: host_reports.store_inventory(session, host_id, older, now=story.clock.now()))


def test_a_disk_that_is_kept_cannot_be_taken_away(story: FleetStory) -> None:
    attached = attaches(story, "web1", volume_id=present_volume(story))
    story.settle()
    vm = story.vm(attached.subject_id)
    snaps.snapshotted(story, vm, "before")
    with pytest.raises(Conflict) as caught:
        accept_detach(story, vm, volume=story.volumes(vm.id)[1].id)
    assert caught.value.code == "volume-has-snapshots"


def test_a_snapshot_that_a_forced_stop_cut_short_is_put_in_order_by_upkeep(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    fault = story.fleet.plan_fault("switch_layers", Fault(FaultKind.FAIL_BEFORE), host_id=vm.host_id)
    snaps.accept_snapshot(story, vm, "before")
    story.settle(until=fault.met.is_set)
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    assert [one.state for one in snaps.kept(story, vm.id)] == ["making"]
    assert snaps.marks(story, vm.id) == {"a"}, "whichever layer the guest was on, it starts with its disk as it left it"
    with pytest.raises(Conflict, match="vm snapshot delete web1 before` puts it in order"):
        snaps.accept_snapshot(story, story.vm(vm.id), "another")
    upkeep = Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)
    upkeep.tidy_snapshots(story.term)
    story.settle()
    assert snaps.kept(story, vm.id) == ()
    assert snaps.layer_count(story, vm.id) == 0
    assert snaps.marks(story, vm.id) == {"a"}


def test_a_deletion_that_a_forced_stop_cut_short_goes_on_when_it_is_asked_for_again(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "before")
    snaps.writes(story, vm, "b")
    snaps.snapshotted(story, vm, "after")
    snaps.writes(story, vm, "c")
    fault = story.fleet.plan_fault("merge_layer", Fault(FaultKind.FAIL_AFTER), host_id=vm.host_id)
    snaps.accept_delete(story, vm, "before")
    story.settle(until=fault.met.is_set)
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    assert snaps.marks(story, vm.id) == {"a", "b", "c"}
    with pytest.raises(Conflict, match="was cut short while deleting"):
        snaps.accept_delete(story, vm, "after")
    snaps.accept_delete(story, vm, "before")
    story.settle()
    assert [one.name for one in snaps.kept(story, vm.id)] == ["after"]
    assert snaps.marks(story, vm.id) == {"a", "b", "c"}
    snaps.accept_revert(story, story.vm(vm.id), "after")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a", "b"}
    assert audit_invariants(story) == []


def test_a_merge_that_finds_no_room_waits_for_it_while_the_guest_runs(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "before")
    snaps.writes(story, vm, "b")
    fault = story.fleet.plan_fault("merge.full", Fault(FaultKind.FAIL_BEFORE), host_id=vm.host_id)
    accepted = snaps.accept_delete(story, vm, "before")
    story.settle()
    assert fault.met.is_set()
    assert story.operation(accepted.id).state is OperationState.DONE
    assert snaps.marks(story, vm.id) == {"a", "b"}
    assert snaps.layer_count(story, vm.id) == 0


def test_a_memory_that_finds_no_room_leaves_the_guest_as_it_was(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "made")
    store = story.fleet.store(vm.host_id, describe.pool_spec(story.shared))
    # Room for a layer, and for nothing more.
    store.capacity_bytes = store.used_bytes + 200_000
    accepted = snaps.accept_snapshot(story, vm, "before", has_memory=True)
    story.settle()
    ended = story.operation(accepted.id)
    assert (ended.state, ended.error and ended.error.code) == (OperationState.FAILED, "pool-full")
    snaps.not_created(story, ended)


def test_a_vm_with_snapshots_comes_back_with_them_or_goes_with_all_of_its_files(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "before", has_memory=True)
    snaps.writes(story, vm, "b")
    story.accept_power(story.vm(vm.id), "delete")
    story.settle()
    story.accept_power(story.vm(vm.id), "undelete")
    story.settle()
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a", "b"}
    snaps.accept_revert(story, story.vm(vm.id), "before")
    story.settle()
    assert snaps.marks(story, vm.id) == {"a"}
    story.accept_power(story.vm(vm.id), "delete")
    story.settle()
    story.accept("vm.purge", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=vm.project_id)
    story.settle()
    assert audit_invariants(story) == []
    store = story.fleet.store(story.host_ids[0], describe.pool_spec(story.shared))
    assert (store.volumes, store.memories) == ({}, {})


def test_a_vm_whose_host_died_is_started_elsewhere_on_its_newest_layer(story: FleetStory) -> None:
    vm = story.running_vm()
    snaps.writes(story, vm, "a")
    snaps.snapshotted(story, vm, "before")
    snaps.writes(story, vm, "b")
    story.hypervisor(vm.host_id).crash()
    story.hypervisor(vm.host_id).boot()
    story.hear_hosts()
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    elsewhere = next(host_id for host_id in story.host_ids if host_id != vm.host_id)
    started = story.accept_power(story.vm(vm.id), "start", to_host=elsewhere)
    story.settle()
    assert story.operation(started.id).state is OperationState.DONE, story.operation(started.id).error
    assert story.running_on(vm.id) == {elsewhere}
    assert snaps.marks(story, vm.id) == {"a", "b"}
    snaps.runs_on_what_sql_says(story, vm.id)


# --- clones and templates ------------------------------------------------------------------------------------------------------


def test_a_linked_clone_keeps_its_base_and_lets_it_go_once_it_is_purged(story: FleetStory) -> None:
    upkeep = Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)
    source = story.running_vm()
    snaps.writes(story, source, "a")
    accepted = snaps.accept_clone(story, source, "web2", is_linked=True)
    story.settle()
    assert story.operation(accepted.id).state is OperationState.DONE
    clone = story.vm(accepted.subject_id)
    snaps.writes(story, source, "b")
    snaps.writes(story, clone, "c")
    assert snaps.marks(story, clone.id) == {"a", "c"}
    assert snaps.marks(story, source.id) == {"a", "b"}
    assert clone.uuid != source.uuid
    (base,) = snaps.kept(story, source.id)
    with pytest.raises(Conflict) as kept:
        snaps.accept_delete(story, source, base.name)
    assert kept.value.code == "snapshot-has-clones"
    with pytest.raises(Conflict) as based:
        story.accept_power(story.vm(source.id), "delete")
    assert based.value.code == "vm-has-clones"
    upkeep.tidy_snapshots(story.term)
    story.settle()
    assert len(snaps.kept(story, source.id)) == 1, "what a clone lies over stays"
    story.accept_power(story.vm(clone.id), "delete")
    story.settle()
    story.accept("vm.purge", clone.id, {"vm_id": clone.id}, name=clone.name, project_id=clone.project_id)
    story.settle()
    upkeep.tidy_snapshots(story.term)
    story.settle()
    assert snaps.kept(story, source.id) == ()
    assert snaps.layer_count(story, source.id) == 0
    assert snaps.marks(story, source.id) == {"a", "b"}


def test_a_linked_clone_on_a_hosts_own_storage_moves_whole_and_stands_alone(story: FleetStory) -> None:
    source, clone = snaps.cloned_on_local_storage(story, "web1")
    home = clone.host_id
    with pytest.raises(Conflict, match=f"trimtab vm migrate {clone.name}") as base:
        story.accept_power(story.vm(source.id), "migrate")
    assert base.value.code == "vm-has-clones"
    (blocker,) = make(story, PlanKind.DRAIN, home).plan.blockers
    assert (blocker.vm_id, f"vm migrate {clone.name}" in blocker.cure) == (source.id, True), "a drain tells it before it begins"
    moved = story.accept_power(clone, "migrate")
    story.settle()
    assert story.operation(moved.id).state is OperationState.DONE, story.operation(moved.id).error
    (volume,) = story.volumes(clone.id)
    assert (volume.parent_volume_id, volume.parent_layer_id, volume.base_image_id) == (None, "", None)
    assert story.vm(clone.id).host_id == volume.host_id != home
    assert snaps.marks(story, clone.id) == {"a", "c"}, "what it shared with its source came along"
    assert audit_invariants(story) == []
    # Nothing lies over its source any more: that is whole again, moves and goes as any other.
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).tidy_snapshots(story.term)
    story.settle()
    assert snaps.layer_count(story, source.id) == 0
    for verb in ("migrate", "delete"):
        story.accept_power(story.vm(source.id), verb)
        story.settle()
    assert snaps.marks(story, clone.id) == {"a", "c"}


def test_a_full_clone_is_on_its_own_and_its_snapshot_goes(story: FleetStory) -> None:
    source = story.running_vm()
    snaps.writes(story, source, "a")
    accepted = snaps.accept_clone(story, source, "web2", is_linked=False)
    story.settle()
    clone = story.vm(accepted.subject_id)
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).tidy_snapshots(story.term)
    story.settle()
    assert snaps.kept(story, source.id) == ()
    assert snaps.layer_count(story, source.id) == 0
    assert snaps.marks(story, clone.id) == {"a"}
    story.accept_power(story.vm(source.id), "delete")
    story.settle()
    assert snaps.marks(story, clone.id) == {"a"}


def test_a_clone_of_what_cannot_be_kept_leaves_no_vm(story: FleetStory) -> None:
    source = story.running_vm()
    story.fleet.store(source.host_id, describe.pool_spec(story.shared)).capacity_bytes = 1
    accepted = snaps.accept_clone(story, source, "web2", is_linked=True)
    story.settle()
    ended = story.operation(accepted.id)
    assert (ended.state, ended.error and ended.error.code) == (OperationState.FAILED, "snapshot-failed")
    snaps.not_cloned(story, ended)


def test_twenty_vms_of_a_template_are_spread_and_followed_by_one_operation(story: FleetStory) -> None:
    vm = story.running_vm()
    made = snaps.accept_template(story, vm, "web")
    story.settle()
    parent = snaps.accept_vms(story, "web", "web-{n}", 20)
    story.settle()
    assert story.operation(parent.id).state is OperationState.DONE
    homes = [story.vm(story.operation(one).subject_id).host_id for one in parent.params["operation_ids"]]
    assert len(homes) == 20
    assert set(homes) == set(story.host_ids), "no host has them all"
    assert made.subject_id == parent.subject_id
    again = snaps.accept_template(story, vm, "web")
    story.settle()
    template = snaps.template_of(story, again)
    assert template is not None
    assert template.revision == 2
