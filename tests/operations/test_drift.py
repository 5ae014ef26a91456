"""Drift on a simulated fleet: what is not as wished is shown on the vm, and healed only where that is safe."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor import simulated_domains
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.drift import RESUME_PAUSE_S, Drift
from trimtab_controller.store import events, operations, schema
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.drift import RESUME_MARGIN_BYTES

T = TypeVar("T")


@pytest.fixture
def drift(story: FleetStory) -> Drift:
    return Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)


def look(story: FleetStory, drift: Drift) -> None:
    """One round of the leader: ask every host, then judge; what it accepts is driven."""
    drift.observe_hosts(story.term)
    drift.judge_vms(story.term)
    story.settle()


def undefine_by_hand(story: FleetStory, host_id: str, vm_id: str) -> None:
    """The domain and its guest go, behind everybody's back."""
    hypervisor = story.hypervisor(host_id)
    with story.fleet.changed:
        simulated_domains.end_process(hypervisor, hypervisor.domains.pop(vm_id))
        story.fleet.changed.notify_all()


def resumes(story: FleetStory, vm: Vm) -> int:
    return len(story.db.read(lambda session: operations.page(session, limit=50, subject_id=vm.id, kind="vm.resume")))


def set_room(story: FleetStory, available_bytes: int) -> None:
    table = schema.pool_space
    story.db.write(lambda session: session.execute(table.update().values(available_bytes=available_bytes)))


def kinds(story: FleetStory, subject_id: str) -> list[str]:
    found = story.db.read(lambda session: events.page_after(session, 0, limit=500, subject_id=subject_id))
    return [event.kind for event in found if "drift" in event.kind]


def test_a_guest_that_vanished_is_shown_and_not_restarted(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm("web1")
    undefine_by_hand(story, vm.host_id, vm.id)
    look(story, drift)
    seen = story.vm(vm.id)
    assert seen.observed_state is ObservedState.ABSENT
    assert "vanished from node" in seen.problem
    assert "disk" in seen.problem
    assert story.running_on(vm.id) == frozenset()
    started = story.accept_power(seen, "start")
    story.settle()
    assert story.operation(started.id).state.value == "done", story.operation(started.id).error
    look(story, drift)
    assert story.vm(vm.id).problem == ""
    assert kinds(story, vm.id) == ["vm.drift"], "told once"


def test_a_destroy_by_hand_is_told_from_a_crash(story: FleetStory, drift: Drift) -> None:
    destroyed, crashed = story.running_vm("web1"), story.running_vm("web2")
    story.hypervisor(destroyed.host_id).stop_by_hand(destroyed.id)
    story.hypervisor(crashed.host_id).crash_guest(crashed.id)
    look(story, drift)
    assert "destroyed" in story.vm(destroyed.id).problem
    assert "crashed" in story.vm(crashed.id).problem


def test_a_domain_on_the_wrong_host_is_shown_and_never_touched(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm("web1", to_host_id=story.host_ids[0])
    right, wrong = story.hypervisor(story.host_ids[0]), story.hypervisor(story.host_ids[1])
    wrong.domains[vm.id] = replace(right.domains[vm.id])
    look(story, drift)
    problem = story.vm(vm.id).problem
    assert "also runs on node2" in problem
    assert vm.id in wrong.domains, "nobody may guess which one is right"
    assert story.running_on(vm.id) == {story.host_ids[0]}
    assert story.vm(vm.id).host_id == story.host_ids[0]
    # Another leader shows it still, also before it has asked that host itself.
    successor = Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)
    successor.judge_vms(story.term)
    assert story.vm(vm.id).problem == problem
    del wrong.domains[vm.id]
    look(story, successor)
    assert story.vm(vm.id).problem == ""


def test_a_guest_paused_by_an_io_error_is_resumed_when_there_is_room_and_not_again_and_again(
    story: FleetStory, drift: Drift
) -> None:
    vm = story.running_vm("web1")
    set_room(story, RESUME_MARGIN_BYTES - 1)
    story.hypervisor(vm.host_id).fail_disk(vm.id)
    look(story, drift)
    assert "I/O error" in story.vm(vm.id).problem
    assert resumes(story, vm) == 0
    set_room(story, RESUME_MARGIN_BYTES)
    look(story, drift)
    assert story.vm(vm.id).observed_state is ObservedState.RUNNING
    look(story, drift)
    assert (story.vm(vm.id).problem, resumes(story, vm)) == ("", 1)
    for _round in range(5):  # the disk fails for another reason: it pauses at once, each time
        story.hypervisor(vm.host_id).fail_disk(vm.id)
        look(story, drift)
    assert resumes(story, vm) <= 2
    assert story.vm(vm.id).observed_state is ObservedState.PAUSED
    story.clock.advance(4 * RESUME_PAUSE_S)
    look(story, drift)
    assert story.vm(vm.id).observed_state is ObservedState.RUNNING


def test_an_operators_pause_of_a_guest_that_a_full_pool_paused_holds_when_there_is_room(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm("web1")
    set_room(story, RESUME_MARGIN_BYTES - 1)
    story.hypervisor(vm.host_id).fail_disk(vm.id)
    look(story, drift)
    story.accept_power(story.vm(vm.id), "pause")
    story.settle()
    set_room(story, RESUME_MARGIN_BYTES)
    for _round in range(3):
        look(story, drift)
    assert (story.vm(vm.id).observed_state, resumes(story, vm)) == (ObservedState.PAUSED, 0)
    story.accept_power(story.vm(vm.id), "resume")
    story.settle()
    assert story.vm(vm.id).observed_state is ObservedState.RUNNING


class PausedMeanwhile(Database):
    """A leader's database: whenever the leader has read, an operator's pause begins and ends before its next write."""

    def __init__(self, story: FleetStory, vm: Vm) -> None:
        self._story, self._vm = story, vm

    def read(self, query: Callable[[Session], T]) -> T:
        found = self._story.db.read(query)
        self._story.accept_power(self._vm, "pause")
        self._story.settle()
        return found

    def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        return self._story.db.write(transaction, durable=durable)


def test_an_operators_pause_between_the_leaders_look_and_its_cure_holds(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm("web1")
    set_room(story, RESUME_MARGIN_BYTES)
    story.hypervisor(vm.host_id).fail_disk(vm.id)
    drift.observe_hosts(story.term)
    slow = Drift(db=PausedMeanwhile(story, vm), clock=story.clock, agents=story.client, nudger=story.nudger)
    slow.judge_vms(story.term)
    story.settle()
    assert (story.vm(vm.id).observed_state, resumes(story, vm)) == (ObservedState.PAUSED, 0)


def test_a_guest_whose_pool_fails_is_not_resumed(story: FleetStory, drift: Drift) -> None:
    vm = story.running_vm("web1")
    table = schema.pool_host
    story.db.write(lambda session: session.execute(table.update().values(state="failed")))
    story.hypervisor(vm.host_id).fail_disk(vm.id)
    look(story, drift)
    assert resumes(story, vm) == 0
    assert "I/O error" in story.vm(vm.id).problem
