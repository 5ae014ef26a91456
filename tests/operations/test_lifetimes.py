"""A class whose policy asks how long vms live: the leader learns it from the fleet's own vms."""

from datetime import timedelta

from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.placement.lifetimes import Kind
from trimtab_controller.core.placement.policies import LIFETIME_AWARE
from trimtab_controller.operations import lifetimes, placement_snapshot
from trimtab_controller.services import hosts_admin
from trimtab_controller.store import fleet, hosts, placements
from trimtab_controller.store.database import Session


def choose_policy(story: FleetStory, policy: str) -> None:
    story.db.write(
        lambda session: hosts_admin.change_class(
            session, hosts.DEFAULT_CLASS, {"policy": policy}, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )


def scores_of(story: FleetStory, operation_id: str) -> set[str]:
    decision = story.db.read(lambda session: placements.decision_of_operation(session, operation_id))
    assert decision is not None
    return set(decision.verdicts["fitting"]["scores"])


def test_a_class_that_asks_for_it_places_by_how_long_vms_live_and_says_so(story: FleetStory) -> None:
    _, operation = story.accept_create("web-1")
    story.settle()
    assert "lifetime" not in scores_of(story, operation.id)
    choose_policy(story, LIFETIME_AWARE)
    _, operation = story.accept_create("web-2")
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    assert "lifetime" in scores_of(story, operation.id)


def test_it_is_learned_from_vms_that_were_deleted_and_from_those_that_live(story: FleetStory) -> None:
    jobs = [story.running_vm(f"job-{number}") for number in range(4)]
    database = story.running_vm("db-1")
    story.clock.advance(600)
    for vm in jobs:
        story.accept_power(story.vm(vm.id), "delete")
        story.settle()
    now, project_id = story.clock.now() + timedelta(days=4), database.project_id

    def expected_s(session: Session, family: str) -> float:
        rows = fleet.read_rows(session)
        snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
        occupancy = lifetimes.LifetimeKeeper().occupancy(session, snapshot, now=now)
        kind = Kind(f"{project_id}/{family}", database.vcpus, database.memory_mib)
        return float(max(occupancy.longer_s(kind, slice(None))))

    job_s, database_s, other_s = (
        story.db.read(lambda session, name=name: expected_s(session, name))  # type: ignore[misc]
        for name in ("job", "db", "other")
    )
    assert job_s < other_s < database_s
