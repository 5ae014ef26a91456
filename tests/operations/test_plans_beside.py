"""Plans beside other work: backups that begin meanwhile, other plans that want the same slots, time that passes."""

from collections.abc import Callable

from tests.operations.backup_kit import accept_backup, ready_repo
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_plans import apply, guests_on_one_host, make, seen
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.core.planning import Cause, PlanKind, Slots
from trimtab_controller.operations.estates import read_rates
from trimtab_controller.services import plans as plan_service
from trimtab_controller.services.plans import PlanWish
from trimtab_controller.store import schema


def test_a_backup_that_runs_is_a_blocker_with_its_cure(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    ready_repo(story)
    running = accept_backup(story, vm)
    (blocker,) = make(story, PlanKind.DRAIN, story.host_ids[0]).plan.blockers
    assert blocker.cause is Cause.BACKUP
    assert running.id in blocker.message
    assert f"trimtab op wait {running.id}" in blocker.cure
    story.settle()
    assert make(story, PlanKind.DRAIN, story.host_ids[0]).plan.blockers == ()


def test_a_backup_that_begins_while_a_plan_is_applied_is_waited_for(story: FleetStory) -> None:
    guests = guests_on_one_host(story, 3)
    ready_repo(story)
    view = make(story, PlanKind.DRAIN, story.host_ids[0])
    operation = apply(story, view)
    last = view.plan.moves[-1].vm_id
    story.settle(until=lambda: any(row.state == "running" for row in seen(story, view).steps))
    backup = accept_backup(story, next(vm for vm in guests if vm.id == last))
    waits: set[str] = set()

    def watch() -> bool:
        waits.update(row.message for row in seen(story, view).steps if row.state == "pending")
        return False

    story.settle(until=watch)
    assert story.operation(operation.id).result == {"moved": 3, "skipped": 0, "failed": []}
    assert story.operation(backup.id).state is OperationState.DONE
    assert any(backup.id in message for message in waits), "who waits says for what"
    assert audit_invariants(story) == []


def most_at_once(story: FleetStory, drained: tuple[str, ...], slots: Slots) -> int:
    """Drain these hosts by plans of their own, applied together; return how many moves were under way at most."""
    made = [make(story, PlanKind.DRAIN, host_id) for host_id in drained]

    def accepted(plan_id: str) -> Operation:
        return story.db.write(
            lambda session: plan_service.apply(session, plan_id, actor=story.actor, now=story.clock.now(), slots=slots)
        )

    operations = [accepted(view.row.id) for view in made]
    most = 0

    def watch() -> bool:
        nonlocal most
        table = schema.plan_step
        running = table.select().where(table.c.state == "running")
        most = max(most, len(story.db.read(lambda session: session.execute(running).all())))
        return False

    story.settle(until=watch)
    assert {story.operation(one.id).state for one in operations} == {OperationState.DONE}
    assert audit_invariants(story) == []
    return most


def test_plans_that_are_applied_together_share_the_slots_of_the_network(story: FleetStory) -> None:
    for number in range(1, 5):
        story.running_vm(f"web{number}", to_host_id=story.host_ids[(number - 1) // 2])
    assert most_at_once(story, (story.host_ids[0], story.host_ids[1]), Slots(per_host=4, per_network=1)) == 1


def test_plans_of_two_migration_networks_do_not_share_their_slots(new_story: Callable[..., FleetStory]) -> None:
    story = new_story(host_count=4)
    networks = dict(zip(story.host_ids, ("blue", "blue", "red", "red"), strict=True))
    for host_id, network in networks.items():
        labels = {"migration-network": network}
        table = schema.host
        story.db.write(
            lambda session, of=table.update().where(table.c.id == host_id).values(labels=labels): session.execute(of)  # type: ignore[misc]
        )
    drained = (story.host_ids[0], story.host_ids[2])
    for number, host_id in enumerate(drained * 2):
        story.running_vm(f"web{number}", to_host_id=host_id, host_selector={"migration-network": ("blue", "red")[number % 2]})
    wish = PlanWish(kind=PlanKind.DRAIN, hosts=drained)
    terms = story.db.read(lambda session: plan_service.gather(session, wish, now=story.clock.now())).terms
    assert terms.slots.network_of == networks, "the forecast knows them, too"
    assert most_at_once(story, drained, Slots(per_host=4, per_network=1)) == 2


def test_a_deadline_that_passes_names_each_vm_that_did_not_get_its_turn(story: FleetStory) -> None:
    guests_on_one_host(story, 3)
    view = make(story, PlanKind.DRAIN, story.host_ids[0], deadline_s=30.0)
    operation = apply(story, view)
    story.settle(until=lambda: any(row.state == "running" for row in seen(story, view).steps))
    story.clock.advance(60)
    story.settle()
    result = story.operation(operation.id).result
    assert result is not None
    assert (result["moved"], len(result["failed"])) == (2, 1)
    (late,) = result["failed"]
    assert (late["vm"], late["message"]) == (view.plan.moves[-1].vm_name, "the deadline passed before its turn came")
    assert audit_invariants(story) == []


def test_the_forecast_comes_from_the_fleets_own_migrations_of_memory_alone(story: FleetStory) -> None:
    (vm,) = guests_on_one_host(story, 1)
    copied = story.running_vm("local", to_host_id=story.host_ids[0], pool=story.local)

    def took(vm_id: str, seconds: int) -> None:
        table = schema.operation
        of_vm = table.update().where(table.c.subject_id == vm_id, table.c.kind == "vm.migrate")
        story.db.write(lambda session: session.execute(of_vm.values(result={"total_ms": seconds * 1000})))

    for moving, times in ((vm, 3), (copied, 4)):
        for _ in range(times):
            story.accept_power(story.vm(moving.id), "migrate")
            story.settle()
    took(vm.id, 2)
    took(copied.id, 900)
    rates = story.db.read(read_rates)
    assert rates.is_measured
    home = story.vm(vm.id).host_id
    (step,) = (one for one in make(story, PlanKind.DRAIN, home).plan.moves if one.vm_id == vm.id)
    assert step.ends_s - step.starts_s < 5, "three of its like took two seconds; one that copied its disk says nothing about it"
