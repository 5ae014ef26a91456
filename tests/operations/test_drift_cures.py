"""What the drift loop heals by itself, and when it does not: definitions left behind, definitions that vanished, a vm that runs twice."""

from dataclasses import replace

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_drift import look
from trimtab_controller.core.drift import RUNS_TWICE
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.loops.drift import Drift
from trimtab_controller.services import recovery
from trimtab_controller.store import describe, operations
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainState


@pytest.fixture
def drift(story: FleetStory) -> Drift:
    return Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)


def leave_behind(story: FleetStory, vm: Vm, host_id: str, *, epoch: int | None = None) -> None:
    """A definition of the vm that does not run lies on a host that holds nothing of it."""
    domain = story.hypervisor(vm.host_id).domains[vm.id]
    stamp = replace(domain.stamp, epoch=vm.epoch if epoch is None else epoch)
    story.hypervisor(host_id).domains[vm.id] = replace(domain, state=DomainState.STOPPED, stamp=stamp)


def stopped_vm(story: FleetStory, name: str = "web1") -> Vm:
    vm = story.running_vm(name)
    story.accept_power(vm, "stop", force=True)
    story.settle()
    return story.vm(vm.id)


def operations_of(story: FleetStory, vm: Vm, kind: str) -> list[Operation]:
    return list(story.db.read(lambda session: operations.page(session, limit=50, subject_id=vm.id, kind=kind)))


def other_host(story: FleetStory, vm: Vm) -> str:
    return next(host_id for host_id in story.host_ids if host_id != vm.host_id)


# --- left behind ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_running", [True, False])
def test_a_definition_left_behind_is_removed_once_the_vm_is_proven_at_home(
    story: FleetStory, drift: Drift, is_running: bool
) -> None:
    vm = story.running_vm() if is_running else stopped_vm(story)
    other = other_host(story, vm)
    leave_behind(story, vm, other)
    look(story, drift)
    assert vm.id not in story.hypervisor(other).domains
    assert story.running_on(vm.id) == (frozenset({vm.host_id}) if is_running else frozenset())
    assert [one.params["host_id"] for one in operations_of(story, vm, "vm.clean_copy")] == [other], "by one journaled operation"
    look(story, drift)
    assert story.vm(vm.id).problem == ""
    assert audit_invariants(story) == []


def test_a_definition_left_behind_stays_while_nothing_proves_the_vm_elsewhere(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm()
    other = other_host(story, vm)
    leave_behind(story, vm, other, epoch=vm.epoch + 1)
    look(story, drift)
    assert "virsh undefine" in story.vm(vm.id).problem, "a higher epoch: the database may be the older one"
    leave_behind(story, vm, other)
    with story.fleet.changed:  # all of it is gone from home: the leftover is the only definition there is
        story.hypervisor(vm.host_id).stop_by_hand(vm.id)
        del story.hypervisor(vm.host_id).domains[vm.id]
    look(story, drift)
    assert vm.id in story.hypervisor(other).domains
    assert operations_of(story, vm, "vm.clean_copy") == []


def test_nothing_is_removed_or_defined_while_an_operator_holds_failover(story: FleetStory, drift: Drift) -> None:
    left, undefined = story.running_vm("web1"), stopped_vm(story, "web2")
    leave_behind(story, left, other_host(story, left))
    del story.hypervisor(undefined.host_id).domains[undefined.id]
    story.db.write(lambda session: recovery.set_paused(session, True, actor=story.actor, now=story.clock.now()))
    look(story, drift)
    assert left.id in story.hypervisor(other_host(story, left)).domains
    assert undefined.id not in story.hypervisor(undefined.host_id).domains
    story.db.write(lambda session: recovery.set_paused(session, False, actor=story.actor, now=story.clock.now()))
    look(story, drift)
    assert left.id not in story.hypervisor(other_host(story, left)).domains
    assert undefined.id in story.hypervisor(undefined.host_id).domains


def test_a_leftover_that_was_started_meanwhile_is_not_touched(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm()
    other = other_host(story, vm)
    leave_behind(story, vm, other)
    drift.observe_hosts(story.term)
    drift.judge_vms(story.term)
    story.hypervisor(other).domains[vm.id].state = DomainState.PAUSED
    story.settle()
    assert vm.id in story.hypervisor(other).domains


def test_what_a_deleted_vm_left_behind_is_removed(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm()
    other = other_host(story, vm)
    leave_behind(story, vm, other)
    story.accept_power(vm, "delete")
    story.settle()
    assert vm.id in story.hypervisor(other).domains
    look(story, drift)
    assert vm.id not in story.hypervisor(other).domains
    assert audit_invariants(story) == []


# --- vanished ------------------------------------------------------------------------------------------------------------------


def test_the_definition_of_a_stopped_vm_that_vanished_is_put_back(story: FleetStory, drift: Drift) -> None:
    vm = stopped_vm(story)
    del story.hypervisor(vm.host_id).domains[vm.id]
    look(story, drift)
    assert story.hypervisor(vm.host_id).domains[vm.id].state is DomainState.STOPPED
    look(story, drift)
    seen = story.vm(vm.id)
    assert (seen.problem, seen.observed_state, seen.epoch) == ("", ObservedState.STOPPED, vm.epoch)
    assert len(operations_of(story, vm, "vm.redefine")) == 1
    assert audit_invariants(story) == []


def test_a_guest_that_runs_without_a_definition_gets_it_back_and_runs_on(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm()
    domain = story.hypervisor(vm.host_id).domains[vm.id]
    domain.is_persistent = False  # `virsh undefine` of a running domain
    look(story, drift)
    assert (domain.is_persistent, domain.starts) == (True, 1)
    look(story, drift)
    look(story, drift)
    assert story.vm(vm.id).problem == ""
    assert len(operations_of(story, vm, "vm.redefine")) == 1


def test_a_definition_whose_disk_is_gone_too_is_not_put_back_and_not_asked_for_all_the_time(
    story: FleetStory, drift: Drift
) -> None:
    vm = stopped_vm(story)
    del story.hypervisor(vm.host_id).domains[vm.id]
    volumes = story.hypervisor(vm.host_id).open_store(describe.pool_spec(story.shared)).volumes
    volumes.pop(story.volumes(vm.id)[0].id)
    for _round in range(5):
        look(story, drift)
    assert vm.id not in story.hypervisor(vm.host_id).domains
    assert "vanished" in story.vm(vm.id).problem
    assert {one.error.code for one in operations_of(story, vm, "vm.redefine") if one.error} == {"volume-not-found"}
    assert len(operations_of(story, vm, "vm.redefine")) <= 2


def test_a_vm_is_not_defined_a_second_time_while_another_host_may_hold_it(story: FleetStory, drift: Drift) -> None:
    vm = stopped_vm(story)
    other = other_host(story, vm)
    leave_behind(story, vm, other)
    story.hypervisor(other).domains[vm.id].state = DomainState.RUNNING
    del story.hypervisor(vm.host_id).domains[vm.id]
    look(story, drift)
    assert vm.id not in story.hypervisor(vm.host_id).domains
    assert operations_of(story, vm, "vm.redefine") == []


# --- twice ---------------------------------------------------------------------------------------------------------------------


def test_a_vm_that_runs_elsewhere_is_started_by_nobody_until_that_guest_is_gone(story: FleetStory, drift: Drift) -> None:
    vm = stopped_vm(story)
    other = other_host(story, vm)
    leave_behind(story, vm, other)
    story.hypervisor(other).domains[vm.id].state = DomainState.RUNNING
    look(story, drift)
    seen = story.vm(vm.id)
    assert seen.attention == RUNS_TWICE
    assert all(word in seen.problem for word in ("node", f"epoch {vm.epoch}", "virsh destroy")), "evidence and the next command"
    assert story.hypervisor(other).domains[vm.id].state is DomainState.RUNNING, "nobody may guess which one is right"
    with pytest.raises(Conflict, match="also runs on") as refused:
        story.accept_power(seen, "start")
    assert refused.value.code == "vm-runs-twice"
    story.accept_power(seen, "stop")
    story.settle()
    with pytest.raises(Conflict, match="also runs on"):
        story.accept_power(story.vm(vm.id), "start")
    story.hypervisor(other).domains[vm.id].state = DomainState.STOPPED  # as the operator is told to
    for _round in range(3):
        look(story, drift)
    assert vm.id not in story.hypervisor(other).domains
    assert (story.vm(vm.id).attention, story.vm(vm.id).problem) == ("", "")
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    assert story.running_on(vm.id) == {story.vm(vm.id).host_id}
