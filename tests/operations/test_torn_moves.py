"""A post-copy that failed for good: its memory is on two hosts, and neither half may ever run again."""

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.store import events
from trimtab_protos.messages import DomainState, StateReason


def tear(story: FleetStory, vm: Vm, **wishes: object) -> tuple[Operation, str]:
    """Let the link break right after the switch; return the operation and the target's id."""
    switched = story.hold("migrate.switched", Fault(FaultKind.HANG))
    operation = story.accept_power(vm, "migrate", **wishes)
    story.settle(until=switched.met.is_set)
    target = next(host_id for host_id in story.host_ids if host_id in story.running_on(vm.id))
    for host_id, state in ((vm.host_id, DomainState.PAUSED), (target, DomainState.RUNNING)):
        domain = story.hypervisor(host_id).domains[vm.id]
        domain.state, domain.reason = state, StateReason.POSTCOPY_FAILED
    switched.released.set()
    return operation, target


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("pool", ["shared", "local"])
def test_both_halves_are_killed_and_the_guest_starts_anew_where_its_disks_are_newer(
    story: FleetStory, pool: str, is_cancelled: bool
) -> None:
    vm = story.running_vm("web1", pool=story.local if pool == "local" else story.shared)
    operation, target = tear(story, vm)
    if is_cancelled:
        story.cancel(operation.id)
    story.settle()
    ended = story.operation(operation.id)
    assert ended.state is OperationState.DONE, ended.error
    assert ended.result is not None
    assert ended.result["memory"] == "lost"
    after = story.vm(vm.id)
    assert (after.host_id, after.epoch) == (target, vm.epoch + 1)
    assert story.running_on(vm.id) == {target}
    assert vm.id not in story.hypervisor(vm.host_id).domains
    told = story.db.read(lambda session: events.page_after(session, 0, limit=500, subject_id=vm.id))
    assert [one.kind for one in told if one.kind in {"vm.memory_lost", "vm.migrated"}] == ["vm.memory_lost"]
    assert audit_invariants(story) == []


def test_a_half_that_is_not_seen_to_be_gone_keeps_the_guest_from_starting(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    operation, _target = tear(story, vm)
    source = story.hypervisor(vm.host_id)
    stuck = story.hold("change_power", Fault(FaultKind.HANG), host_id=vm.host_id)
    story.settle(until=stuck.met.is_set)
    assert source.domains[vm.id].state is DomainState.PAUSED
    assert story.running_on(vm.id) == frozenset()
    assert story.operation(operation.id).state.value != "done"
