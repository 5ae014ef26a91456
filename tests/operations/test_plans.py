"""Plans on a fleet: made, applied, called off, taken back; a driver that dies in the middle; plans that became stale."""

from datetime import timedelta

import pytest

from tests.operations.faults import DriverDied, MortalDatabase
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import HostConnectivity, OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.core.planning import Cause, PlanKind
from trimtab_controller.operations.estates import BUCKET_S, CPU_MILLIS, read_estate
from trimtab_controller.services import hosts_admin
from trimtab_controller.services import plans as plan_service
from trimtab_controller.services.plans import PlanView, PlanWish
from trimtab_controller.store import hosts, operations, plans, schema
from trimtab_protos.errors import Conflict


def make(story: FleetStory, kind: PlanKind, *host_ids: str, **wishes: object) -> PlanView:
    wish = PlanWish(kind=kind, hosts=host_ids, **wishes)  # type: ignore[arg-type]
    return story.db.write(lambda session: plan_service.create(session, wish, actor=story.actor, now=story.clock.now()))


def apply(story: FleetStory, view: PlanView) -> Operation:
    return story.db.write(lambda session: plan_service.apply(session, view.row.id, actor=story.actor, now=story.clock.now()))


def seen(story: FleetStory, view: PlanView) -> PlanView:
    return story.db.read(lambda session: plan_service.get(session, view.row.id))


def guests_on_one_host(story: FleetStory, count: int) -> list[Vm]:
    """Return vms that all run on the first host."""
    return [story.running_vm(f"web{number}", to_host_id=story.host_ids[0]) for number in range(1, count + 1)]


def set_policy(story: FleetStory, vm: Vm, policy: str) -> None:
    table = schema.vm
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.id).values(drain_policy=policy)))


def test_a_drain_empties_its_host_within_the_slots_and_leaves_it_cordoned(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 4)
    source = story.host_ids[0]
    view = make(story, PlanKind.DRAIN, source)
    assert len(view.plan.moves) == 4
    assert view.plan.duration_s > 0
    operation = apply(story, view)
    most = 0

    def watch() -> bool:
        nonlocal most
        busy = story.db.read(plans.moves_under_way)
        most = max(most, busy.by_host.get(source, 0))
        return False

    story.settle(until=watch)
    assert story.operation(operation.id).result == {"moved": 4, "skipped": 0, "failed": []}
    assert most == 2, "two slots at the host that all leave"
    assert seen(story, view).row.state == "applied"
    assert all(story.running_on(vm.id) == {story.vm(vm.id).host_id} != {source} for vm in guests)
    assert story.db.read(lambda session: hosts.get(session, source)).is_cordoned
    assert audit_invariants(story) == []


@pytest.mark.parametrize("death", [3, 6, 9])
def test_a_driver_that_dies_in_the_middle_of_a_plan_is_taken_over(story: FleetStory, death: int) -> None:
    guests = guests_on_one_host(story, 2)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    operation = apply(story, view)
    with pytest.raises(DriverDied):
        story.settle(story.new_engine(db=MortalDatabase(story.db, death, True)))
    story.lose_driver()
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    assert [row.state for row in seen(story, view).steps] == ["done"] * 3
    assert all(len(story.running_on(vm.id)) == 1 for vm in guests)
    assert audit_invariants(story) == []


def test_a_cancelled_plan_stops_its_moves_opens_its_host_and_can_be_taken_back(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 4)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    operation = apply(story, view)

    def has_moved_one() -> bool:
        return any(row.state == "done" and view.plan.steps[row.position].moves_vm for row in seen(story, view).steps)

    story.settle(until=has_moved_one)
    story.db.write(lambda session: plan_service.cancel(session, view.row.id, actor=story.actor, now=story.clock.now()))
    story.settle()
    assert story.operation(operation.id).state is OperationState.CANCELLED
    after = seen(story, view)
    assert after.row.state == "cancelled"
    assert {row.state for row in after.steps} <= {"done", "cancelled"}
    assert not story.db.read(lambda session: hosts.get(session, story.host_ids[0])).is_cordoned
    undo = make(story, PlanKind.UNDO, plan_id=view.row.id)
    assert len(undo.plan.moves) >= 1
    apply(story, undo)
    story.settle()
    assert all(story.running_on(vm.id) == {story.host_ids[0]} for vm in guests)
    assert audit_invariants(story) == []


def test_an_applied_drain_is_taken_back_with_its_cordon(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    apply(story, view)
    story.settle()
    apply(story, make(story, PlanKind.UNDO, plan_id=view.row.id))
    story.settle()
    assert story.running_on(vm.id) == {story.host_ids[0]}
    assert not story.db.read(lambda session: hosts.get(session, story.host_ids[0])).is_cordoned


def test_a_plan_is_refused_once_a_vm_came_to_its_host(story: FleetStory) -> None:
    guests_on_one_host(story, 1)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    story.running_vm("late", to_host_id=story.host_ids[0])
    with pytest.raises(Conflict, match="vm late came to host node1") as refused:
        apply(story, view)
    assert refused.value.code == "plan-stale"


def test_a_vm_that_leaves_by_itself_does_not_make_a_drain_stale(story: FleetStory) -> None:
    first, second = guests_on_one_host(story, 2)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    story.accept_power(first, "migrate", to_host="node2")
    story.settle()
    apply(story, view)
    story.settle()
    assert story.running_on(first.id) == {story.host_ids[1]}
    assert story.running_on(second.id) != {story.host_ids[0]}
    assert "skipped" in {row.state for row in seen(story, view).steps}


def test_a_vm_that_waits_for_its_owner_is_named_with_the_cure(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    set_policy(story, vm, "wait")
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    (blocker,) = view.plan.blockers
    assert (blocker.cause, blocker.vm_name) == (Cause.DRAIN_POLICY, "web1")
    assert "trimtab vm update web1 --drain-policy migrate" in blocker.cure


def test_a_vm_under_way_of_another_operation_is_a_blocker_that_names_it(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    busy = story.accept_power(vm, "migrate")
    (blocker,) = make(story, PlanKind.DRAIN, story.host_ids[0]).plan.blockers
    assert blocker.cause is Cause.BUSY
    assert busy.id in blocker.message


def test_a_deadline_names_the_vm_that_is_in_the_way(story: FleetStory) -> None:
    guests_on_one_host(story, 3)
    view = make(story, PlanKind.DRAIN, story.host_ids[0], deadline_s=8.0)
    assert "web" in view.plan.late
    assert any(blocker.cause is Cause.DEADLINE for blocker in view.plan.blockers)


def test_maintenance_drains_holds_and_opens_again(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    host = story.db.read(lambda session: hosts.get(session, story.host_ids[0]))
    story.db.write(lambda session: plan_service.begin_maintenance(session, host, actor=story.actor, now=story.clock.now()))
    story.settle()
    assert story.running_on(vm.id) != {host.id}
    with pytest.raises(Conflict, match="maintenance end node1"):
        story.db.write(
            lambda session: hosts_admin.change(
                session,
                host.id,
                hosts_admin.HostChange(is_cordoned=False),
                expected_version=None,
                actor=story.actor,
                now=story.clock.now(),
            )
        )
    story.db.write(lambda session: plan_service.end_maintenance(session, host, actor=story.actor, now=story.clock.now()))
    assert not story.db.read(lambda session: hosts.get(session, host.id)).is_cordoned


def test_an_upgrade_goes_host_by_host_and_holds_until_the_operator_ends_it(story: FleetStory) -> None:
    vm = story.running_vm("web1", to_host_id=story.host_ids[0])
    view = make(story, PlanKind.UPGRADE, story.host_ids[0], story.host_ids[1])
    operation = apply(story, view)
    held: list[str] = []

    def is_held() -> bool:
        found = story.db.read(lambda session: plans.maintenance_of(session, story.host_ids))
        held.extend(found)
        return bool(found)

    for _ in range(2):
        story.settle(until=is_held)
        assert story.running_on_host(held[-1]) == frozenset()
        story.db.write(lambda session: plans.end_hold(session, held[-1]))
    story.settle()
    assert set(held) == set(story.host_ids[:2])
    assert story.operation(operation.id).state is OperationState.DONE
    assert not any(host.is_cordoned for host in story.db.read(hosts.live))
    assert len(story.running_on(vm.id)) == 1


def test_an_upgrade_stops_at_a_host_that_does_not_come_back_and_goes_on_once_it_does(story: FleetStory) -> None:
    first, second = story.host_ids[:2]
    view = make(story, PlanKind.UPGRADE, first, second)
    apply(story, view)
    held: list[str] = []

    def is_held() -> bool:
        held[:] = story.db.read(lambda session: plans.maintenance_of(session, story.host_ids))
        return bool(held)

    def hear(host_id: str, connectivity: HostConnectivity) -> None:
        changed = schema.host.update().where(schema.host.c.id == host_id).values(connectivity=connectivity.value)
        story.db.write(lambda session: session.execute(changed))

    story.settle(until=is_held)
    (upgraded,) = held
    hear(upgraded, HostConnectivity.LOST)
    story.db.write(lambda session: plans.end_hold(session, upgraded))
    rounds = iter(range(20))
    story.settle(until=lambda: is_held() or next(rounds, None) is None)
    assert held == [], "the next host is left alone"
    assert story.db.read(lambda session: hosts.get(session, upgraded)).is_cordoned
    said = [step.message for step in story.db.read(lambda session: plans.steps_of(session, view.row.id))]
    assert any("but node" in message and "is lost" in message for message in said), said
    hear(upgraded, HostConnectivity.UP)
    story.settle(until=is_held)
    assert held == [({first, second} - {upgraded}).pop()]


def test_a_rebalance_moves_by_predicted_use_and_has_nothing_to_do_afterwards(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 3)
    remember_use(story, {vm.id: 2500.0 for vm in guests})
    view = make(story, PlanKind.REBALANCE)
    assert len(view.plan.moves) == 2, view.plan.summary
    assert view.plan.expected["cpu_spread"] < view.plan.before["cpu_spread"]
    apply(story, view)
    story.settle()
    assert {story.vm(vm.id).host_id for vm in guests} == set(story.host_ids)
    again = make(story, PlanKind.REBALANCE)
    assert again.plan.steps == ()
    assert again.plan.summary.startswith("no beneficial move")


def remember_use(story: FleetStory, millis: dict[str, float]) -> None:
    now = story.clock.now()
    rows = [
        {
            "subject_id": vm_id,
            "metric": CPU_MILLIS,
            "bucket_s": BUCKET_S,
            "bucket_at": now - timedelta(seconds=BUCKET_S * age),
            "mean": mean,
            "peak": mean,
            "samples": 10,
        }
        for vm_id, mean in millis.items()
        for age in range(1, 5)
    ]
    story.db.write(lambda session: session.execute(schema.usage_rollup.insert(), rows))


def test_an_estate_says_who_runs_who_is_stopped_and_what_is_under_way(story: FleetStory) -> None:
    running, stopped = guests_on_one_host(story, 2)
    story.accept_power(stopped, "stop", force=True)
    story.settle()
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    assert estate.vms[running.id].power.value == "running"
    assert estate.vms[stopped.id].power.value == "stopped"
    assert estate.vms[running.id].busy_with == ""


def test_a_restart_stops_the_vm_and_starts_it_elsewhere(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    set_policy(story, vm, "restart")
    # As if nothing could be moved live here.
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    restart = view.plan.as_json()
    for step in restart["steps"]:
        step["kind"] = "restart" if step["kind"] == "migrate" else step["kind"]
    table = schema.plan
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == view.row.id).values(changes=restart)))
    apply(story, view)
    story.settle()
    kinds = [one.kind for one in story.db.read(lambda session: operations.page(session, limit=10, subject_id=vm.id))]
    assert {"vm.stop", "vm.start"} <= set(kinds)
    assert story.running_on(vm.id) == {story.vm(vm.id).host_id} != {story.host_ids[0]}
