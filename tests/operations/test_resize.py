"""A vm that grows and shrinks: what the guest keeps, what waits for its stop, and who pays meanwhile."""

import pytest
import sqlalchemy as sa

from tests.operations.examples_changes import accept_resize, accept_volume_resize, growing_vm
from tests.operations.invariants import audit_invariants
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.core.resize import When
from trimtab_controller.store import claims, schema
from trimtab_protos.errors import InvalidRequest, NoCapacity, QuotaExceeded


def settled(story: FleetStory, operation: Operation, expected: OperationState = OperationState.DONE) -> Operation:
    story.settle()
    found = story.operation(operation.id)
    assert found.state is expected, (found.error, story.journal(operation.id))
    assert audit_invariants(story) == []
    return found


def claimed(story: FleetStory, vm: Vm) -> tuple[int, int]:
    (claim,) = story.db.read(lambda session: claims.of_vm(session, vm.id))
    return claim.vcpus, claim.memory_mib


def shape(story: FleetStory, vm: Vm) -> tuple[int, int, int, int]:
    seen = story.vm(vm.id)
    return seen.vcpus, seen.memory_mib, seen.next_vcpus, seen.next_memory_mib


def test_a_guest_that_keeps_what_it_has_is_shown_so_pays_so_and_shrinks_at_its_next_stop(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    story.fleet.stubborn_vms.add(vm.id)
    result = settled(story, accept_resize(story, vm, vcpus=1, memory_mib=512)).result
    assert result is not None
    assert result["left"] == ["the guest keeps 2 vcpus", "the guest keeps 1024 MiB"]
    assert shape(story, vm) == (2, 1024, 1, 512)
    assert claimed(story, vm) == (2, 1024)
    settled(story, story.accept_power(story.vm(vm.id), "stop", force=True))
    settled(story, story.accept_power(story.vm(vm.id), "start"))
    assert shape(story, vm) == (1, 512, 0, 0)
    assert claimed(story, vm) == (1, 512)


def test_with_live_a_guest_that_keeps_something_fails_the_operation_and_nothing_waits(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    story.fleet.stubborn_vms.add(vm.id)
    failed = settled(story, accept_resize(story, vm, vcpus=1, when=When.LIVE), OperationState.FAILED)
    assert failed.error is not None
    assert failed.error.code == "guest-refused"
    assert "--at next-stop" in failed.error.message
    assert shape(story, vm) == (2, 1024, 0, 0)


def test_growth_that_was_given_and_cannot_be_taken_back_is_kept_and_paid_for(story: FleetStory) -> None:
    """The operation fails after the guest took its memory: an undo that says 1024 while the guest has 2048 would be a lie."""
    from tests.operations.faults import Behaviour, Misbehaving, StepFault

    vm = growing_vm(story, "web1")
    story.fleet.stubborn_vms.add(vm.id)
    operation = accept_resize(story, vm, memory_mib=2048)
    story.settle(story.new_engine(saga_of=Misbehaving(StepFault("vm.resize", "apply", Behaviour.FAIL_AFTER))))
    settled(story, operation)
    assert shape(story, vm)[:2] == (2, 2048)
    assert claimed(story, vm) == (2, 2048)


def test_a_full_host_refuses_growth_with_the_ways_out_and_the_guest_is_as_before(story: FleetStory) -> None:
    vm = growing_vm(story, "web1", memory_max_mib=1 << 20)
    failed = settled(story, accept_resize(story, vm, memory_mib=1 << 20), OperationState.FAILED)
    assert failed.error is not None
    assert (failed.error.kind.value, failed.error.code) == ("no_capacity", "host-full")
    assert "trimtab vm migrate web1" in failed.error.message
    assert shape(story, vm) == (2, 1024, 0, 0)


def test_more_than_a_running_guest_can_take_is_refused_at_once_and_may_wait_for_its_stop(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    with pytest.raises(InvalidRequest) as refused:
        accept_resize(story, vm, vcpus=5)
    assert (refused.value.code, refused.value.context["bound"]) == ("beyond-maximum", "4")
    settled(story, accept_resize(story, vm, vcpus=5, when=When.NEXT_STOP))
    assert shape(story, vm) == (2, 1024, 5, 0)
    # A guest that ended by itself is placed anew with what waited.
    story.hypervisor(story.vm(vm.id).host_id).crash_guest(vm.id)
    story.hear_hosts()
    settled(story, story.accept_power(story.vm(vm.id), "start"))
    assert shape(story, vm) == (5, 1024, 0, 0)
    assert story.vm(vm.id).vcpus_max == 5
    assert claimed(story, vm) == (5, 1024)


def test_a_vm_that_ended_by_itself_claims_its_new_shape_when_it_starts(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    story.hypervisor(story.vm(vm.id).host_id).crash_guest(vm.id)
    story.hear_hosts()
    settled(story, accept_resize(story, story.vm(vm.id), vcpus=6))
    settled(story, story.accept_power(story.vm(vm.id), "start"))
    assert shape(story, vm) == (6, 1024, 0, 0)
    assert claimed(story, vm) == (6, 1024)


def test_what_a_guest_did_not_take_is_not_offered_any_more(story: FleetStory) -> None:
    """Else it could take later what it is not claimed for."""
    vm = growing_vm(story, "web1")
    story.fleet.stubborn_vms.add(vm.id)
    settled(story, accept_resize(story, vm, memory_mib=512))
    (domain,) = [story.hypervisor(host_id).domains[vm.id] for host_id in story.running_on(vm.id)]
    assert domain.asked_for is not None
    assert (domain.asked_for.memory_mib, claimed(story, vm)) == (1024, (2, 1024))


def test_a_wish_that_was_superseded_by_a_forced_stop_holds_from_the_next_start(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    accept_resize(story, vm, vcpus=4)
    settled(story, story.accept_power(story.vm(vm.id), "stop", force=True))
    settled(story, story.accept_power(story.vm(vm.id), "start"))
    assert shape(story, vm) == (4, 1024, 0, 0)


def test_the_quota_is_charged_before_and_given_back_after(story: FleetStory) -> None:
    vm = growing_vm(story, "web1")
    limit = schema.project.update().values(vcpus_quota=3)
    story.db.write(lambda session: session.execute(limit))
    with pytest.raises(QuotaExceeded):
        accept_resize(story, vm, vcpus=4)
    settled(story, accept_resize(story, vm, vcpus=3))
    settled(story, accept_resize(story, vm, vcpus=1))
    used = sa.select(schema.project.c.vcpus_used)
    assert story.db.read(lambda session: session.scalars(used).one()) == 1
    # A wish that waits is paid for; taking it back frees it.
    settled(story, accept_resize(story, vm, vcpus=3, when=When.NEXT_STOP))
    assert story.db.read(lambda session: session.scalars(used).one()) == 3
    settled(story, accept_resize(story, vm, vcpus=1, when=When.NEXT_STOP))
    assert story.db.read(lambda session: session.scalars(used).one()) == 1
    assert shape(story, vm) == (1, 1024, 0, 0)


def test_a_volume_never_shrinks_and_grows_only_where_there_is_room(story: FleetStory) -> None:
    vm = story.running_vm("web1", pool=story.local)
    (volume,) = story.volumes(vm.id)
    with pytest.raises(InvalidRequest, match="not shrink"):
        accept_volume_resize(story, volume.id, volume.size_bytes - 512)
    with pytest.raises(NoCapacity, match="no room"):
        accept_volume_resize(story, volume.id, 64 << 40)
    assert audit_invariants(story) == []
    settled(story, accept_volume_resize(story, volume.id, 5 * GIB))
    (grown,) = story.volumes(vm.id)
    assert grown.size_bytes == 5 * GIB
    moved = settled(story, story.accept_power(story.vm(vm.id), "migrate"))
    assert moved.result is not None
    assert story.vm(vm.id).host_id == moved.result["target_host_id"]
