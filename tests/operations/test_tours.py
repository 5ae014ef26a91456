"""A tour of upgrades stops at the first surprise: no further host is taken out of a fleet that has just lost something."""

from collections.abc import Callable

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_plans import apply, make, set_policy
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState, OperationState
from trimtab_controller.core.model import PlanStepRow
from trimtab_controller.core.planning import PlanKind
from trimtab_controller.store import failover, hosts, plans, schema


def another_host_is_lost(story: FleetStory, is_over: bool) -> str:
    known = HostConnectivity.UP if is_over else HostConnectivity.LOST
    values = {"connectivity": known.value, "connectivity_at": story.clock.now()}
    away = story.host_ids[2]
    changed = schema.host.update().where(schema.host.c.id == away).values(**values)
    story.db.write(lambda session: session.execute(changed))
    return f"{story.db.read(lambda session: hosts.get(session, away)).name} is lost"


def failover_freezes(story: FleetStory, is_over: bool) -> str:
    frozen = "" if is_over else "3 of 4 hosts are silent at once"
    story.db.write(lambda session: failover.set_control(session, now=story.clock.now(), frozen=frozen))
    return "failover is frozen (3 of 4 hosts are silent at once)"


def a_vm_that_was_moved_crashes(story: FleetStory, is_over: bool) -> str:
    seen = ObservedState.RUNNING if is_over else ObservedState.CRASHED
    changed = schema.vm.update().where(schema.vm.c.name == "moved").values(observed_state=seen.value)
    story.db.write(lambda session: session.execute(changed))
    return "vm moved, which this plan moved, has crashed"


@pytest.mark.parametrize("happens", [another_host_is_lost, failover_freezes, a_vm_that_was_moved_crashes])
def test_a_tour_takes_no_further_host_until_a_surprise_is_over(
    story: FleetStory, happens: Callable[[FleetStory, bool], str]
) -> None:
    first, second = story.host_ids[:2]
    for name, home in (("moved", first), ("web1", second), ("web2", second)):  # the emptier host goes first
        story.running_vm(name, to_host_id=home)
    view = make(story, PlanKind.UPGRADE, first, second)
    operation = apply(story, view)
    held: list[str] = []

    def is_held() -> bool:
        held[:] = story.db.read(lambda session: plans.maintenance_of(session, story.host_ids))
        return bool(held)

    def take_turns(count: int) -> None:
        rounds = iter(range(count))
        story.settle(until=lambda: is_held() or next(rounds, None) is None)

    story.settle(until=is_held)
    assert held == [first]
    why = happens(story, False)
    story.db.write(lambda session: plans.end_hold(session, first))
    take_turns(20)
    assert held == [], "the next host is left alone"
    assert not story.db.read(lambda session: hosts.get(session, first)).is_cordoned, "the one before serves again"
    said = [step.message for step in story.db.read(lambda session: plans.steps_of(session, view.row.id))]
    assert any(message.startswith(f"{why}: this goes on when that is over") for message in said), said
    happens(story, True)
    story.settle(until=is_held)
    assert held == [second]
    story.db.write(lambda session: plans.end_hold(session, second))
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE


def test_a_host_that_was_away_before_the_tour_began_is_no_surprise(story: FleetStory) -> None:
    another_host_is_lost(story, False)
    story.clock.advance(60)
    view = make(story, PlanKind.UPGRADE, story.host_ids[0], story.host_ids[1])
    apply(story, view)
    held: set[str] = set()

    def end_each_hold() -> bool:
        for host_id in story.db.read(lambda session: plans.maintenance_of(session, story.host_ids)):
            held.add(host_id)
            story.db.write(lambda session, host_id=host_id: plans.end_hold(session, host_id))
        return False

    story.settle(until=end_each_hold)
    assert held == set(story.host_ids[:2])


# --- vms that come since the plan was made ------------------------------------------------------------------------------------


class Tour:
    """Over two empty hosts, the first of which is held; meanwhile vms come to the second, which the plan knows nothing of."""

    def __init__(self, story: FleetStory, *names: str) -> None:
        self._story = story
        self.first, self.second = story.host_ids[:2]
        self.view = make(story, PlanKind.UPGRADE, self.first, self.second)
        assert self.view.plan.moves == ()
        self.operation = apply(story, self.view)
        story.settle(until=lambda: self.first in self.held)
        made = [story.accept_create(name, to_host_id=self.second) for name in names]
        story.settle(until=lambda: all(story.operation(one.id).state is OperationState.DONE for _, one in made))
        self.late = [story.vm(vm.id) for vm, _ in made]

    @property
    def held(self) -> set[str]:
        return set(self._story.db.read(lambda session: plans.maintenance_of(session, self._story.host_ids)))

    @property
    def steps(self) -> tuple[PlanStepRow, ...]:
        return self._story.db.read(lambda session: plans.steps_of(session, self.view.row.id))

    def end_hold(self, host_id: str) -> None:
        self._story.db.write(lambda session: plans.end_hold(session, host_id))


def test_a_vm_that_came_since_the_plan_was_made_has_left_before_its_host_is_held(story: FleetStory) -> None:
    tour = Tour(story, "late1", "late2")
    tour.end_hold(tour.first)
    story.settle(until=lambda: tour.second in tour.held)
    assert story.running_on_host(tour.second) == frozenset()
    assert [len(story.running_on(vm.id)) for vm in tour.late] == [1, 1]
    tour.end_hold(tour.second)
    story.settle()
    assert story.operation(tour.operation.id).state is OperationState.DONE
    assert audit_invariants(story) == []


def test_a_host_is_not_held_before_a_late_vm_that_waits_for_people_is_off(story: FleetStory) -> None:
    tour = Tour(story, "late")
    (vm,) = tour.late
    set_policy(story, vm, "wait")
    tour.end_hold(tour.first)
    rounds = iter(range(20))
    story.settle(until=lambda: bool(tour.held) or next(rounds, None) is None)
    assert tour.held == set()
    assert any("vm late came since the plan was made" in step.message for step in tour.steps)
    story.accept_power(vm, "stop", force=True)
    story.settle(until=lambda: bool(tour.held))
    assert tour.held == {tour.second}


def test_a_tour_that_is_cancelled_while_a_late_vm_leaves_waits_for_that_and_opens_its_host(story: FleetStory) -> None:
    tour = Tour(story, "late")
    tour.end_hold(tour.first)
    story.settle(until=lambda: any(step.operation_id for step in tour.steps))
    story.cancel(tour.operation.id)
    story.settle()
    assert story.operation(tour.operation.id).state is OperationState.CANCELLED
    assert not story.db.read(lambda session: hosts.get(session, tour.second)).is_cordoned
    assert tour.held == set()
    assert [len(story.running_on(vm.id)) for vm in tour.late] == [1]
    assert audit_invariants(story) == []
