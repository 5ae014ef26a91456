"""What the leader's owner loops clean up, and what they leave, on both databases."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.operations.examples_storage import copy_image
from tests.operations.kit import FleetStory
from tests.operations.wire import How, WireFault
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import ImageReplica, Operation
from trimtab_controller.loops.upkeep import (
    KEEP_AUDIT,
    KEEP_DECISIONS,
    KEEP_EVENTS,
    KEEP_IDLE_REPLICAS,
    KEEP_OPERATIONS,
    SEAL_AFTER,
    Upkeep,
)
from trimtab_controller.store import audit, events, image_replicas, operations, placements, schema
from trimtab_controller.store import upkeep as upkeep_store


@pytest.fixture
def upkeep(story: FleetStory) -> Upkeep:
    return Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)


def replicas(story: FleetStory) -> set[tuple[str, str]]:
    found: tuple[ImageReplica, ...] = story.db.read(lambda session: image_replicas.of_image(session, story.image.id))
    return {(one.pool_id, one.host_id) for one in found if one.state == "ready"}


def clean_up(story: FleetStory, upkeep: Upkeep) -> None:
    upkeep.evict_images(story.term)
    story.settle()


def test_a_copy_of_an_image_goes_when_nothing_has_used_it_for_a_week_and_comes_back_when_needed(
    story: FleetStory, upkeep: Upkeep
) -> None:
    host_id = story.host_ids[0]
    copy, source = (story.local.id, host_id), (story.shared.id, "")
    vm = story.running_vm("web1", pool=story.local, to_host_id=host_id)
    assert replicas(story) == {copy, source}
    story.clock.advance(KEEP_IDLE_REPLICAS.total_seconds() + 1)
    clean_up(story, upkeep)
    assert replicas(story) == {copy, source}, "a disk stands on it"
    story.accept_power(vm, "delete")
    story.settle()
    clean_up(story, upkeep)
    assert replicas(story) == {copy, source}, "the vm may be brought back"
    story.clock.advance(timedelta(hours=25).total_seconds())
    upkeep.purge(story.term)
    story.settle()
    clean_up(story, upkeep)
    assert replicas(story) == {source}
    assert [call.host_id for call in story.wire.calls if call.verb == "DeleteImage"] == [host_id]
    again = story.running_vm("web2", pool=story.local, to_host_id=host_id)
    assert replicas(story) == {copy, source}
    assert story.running_on(again.id) == {host_id}


def test_a_young_copy_and_the_last_one_stay(story: FleetStory, upkeep: Upkeep) -> None:
    image = story.add_image("alone", story.local, host_id=story.host_ids[0])
    story.db.write(
        lambda session: image_replicas.add(
            session, image_id=story.image.id, pool_id=story.local.id, host_id=story.host_ids[1], now=story.clock.now()
        )
    )
    clean_up(story, upkeep)
    assert len(replicas(story)) == 2, "it is young"
    story.clock.advance(KEEP_IDLE_REPLICAS.total_seconds() + 1)
    clean_up(story, upkeep)
    assert len(replicas(story)) == 1
    assert len(story.db.read(lambda session: image_replicas.of_image(session, image.id))) == 1, "it is nowhere else"


def evict(story: FleetStory, host_id: str) -> Operation:
    params = {"image_id": story.image.id, "pool_id": story.local.id, "host_id": host_id}
    return story.accept("image.evict", story.image.id, params, name="micro")


def test_a_copy_that_is_used_is_not_taken_away(story: FleetStory) -> None:
    host_id = story.host_ids[0]
    story.running_vm("web1", pool=story.local, to_host_id=host_id)
    refused = evict(story, host_id)
    story.settle()
    assert story.operation(refused.id).state is OperationState.FAILED
    assert (story.local.id, host_id) in replicas(story)


def test_a_copy_that_came_into_use_after_it_was_marked_is_kept(story: FleetStory) -> None:
    """A vm found it ready and had bound its disk there in the instant before the mark."""
    host_id = story.host_ids[0]
    other = story.running_vm("web1")
    story.db.write(
        lambda session: image_replicas.add(
            session, image_id=story.image.id, pool_id=story.local.id, host_id=host_id, now=story.clock.now()
        )
    )
    lost = story.wire.plan(WireFault(How.UNREACHABLE, verb="DeleteImage"))
    operation = evict(story, host_id)
    story.settle(until=lost.met.is_set)
    assert (story.local.id, host_id) not in replicas(story), "it is marked"
    table = schema.volume
    bound = table.update().where(table.c.vm_id == other.id).values(pool_id=story.local.id, host_id=host_id)
    story.db.write(lambda session: session.execute(bound))
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    assert (story.local.id, host_id) in replicas(story)


def test_a_vm_that_needs_a_copy_that_is_leaving_waits_and_keeps_it(story: FleetStory) -> None:
    host_id = story.host_ids[0]
    copy_image(story, story.image.id, story.local, host_id)
    lost = story.wire.plan(WireFault(How.UNREACHABLE, verb="DeleteImage"))
    evict(story, host_id)
    story.settle(until=lost.met.is_set)
    vm = story.running_vm("web1", pool=story.local, to_host_id=host_id)
    assert story.running_on(vm.id) == {host_id}
    assert (story.local.id, host_id) in replicas(story)


def unsealed(story: FleetStory) -> int:
    query = sa.select(sa.func.count()).where(schema.audit.c.chain_sha256.is_(None))
    return int(story.db.read(lambda session: session.execute(query).scalar_one()))


def test_rows_go_when_their_time_is_over_and_not_before(story: FleetStory, upkeep: Upkeep) -> None:
    vm = story.running_vm("web1")
    story.running_vm("web2")
    stopped = story.accept_power(vm, "stop", force=True)
    story.settle()
    started = story.accept_power(vm, "start")
    story.settle()

    def trail(session: object) -> None:
        audit.append(
            session,  # type: ignore[arg-type]
            at=story.clock.now(),
            actor="alice",
            request_id="r",
            project_id="",
            verb="vm.stop",
            resource="x",
            outcome="done",
            cause="",
        )

    story.db.write(trail)
    upkeep.seal_audit(story.term)
    assert unsealed(story) == 1, "one with a smaller number may still be on its way"
    story.clock.advance_to(story.clock.now() + SEAL_AFTER + timedelta(seconds=1))
    upkeep.seal_audit(story.term)
    assert unsealed(story) == 0

    def count(table: object) -> int:
        return len(story.db.read(lambda session: session.execute(table.select()).all()))  # type: ignore[attr-defined]

    def retain_at(age: timedelta) -> None:
        story.clock.advance_to(begun + age)
        upkeep.retain(story.term)

    begun = story.clock.now()
    decisions_before = count(schema.decision)
    assert decisions_before >= 3
    retain_at(KEEP_DECISIONS - timedelta(hours=1))
    assert count(schema.decision) == decisions_before
    retain_at(KEEP_DECISIONS + timedelta(hours=1))
    assert count(schema.decision) == 2, "of each vm that is there the newest stays: it says why it is where it is"
    assert story.db.read(lambda session: placements.latest_decision(session, vm.id)) is not None
    assert count(schema.event) > 0
    retain_at(KEEP_EVENTS + timedelta(hours=1))
    assert story.db.read(events.bounds) == (0, 0)
    assert story.operation(stopped.id)
    retain_at(KEEP_OPERATIONS + timedelta(hours=1))
    assert story.db.read(lambda session: operations.page(session, limit=10)) == ()
    assert count(schema.audit) == 1
    retain_at(KEEP_AUDIT + timedelta(hours=1))
    assert count(schema.audit) == 0
    assert started.id != stopped.id
    assert story.db.read(upkeep_store.verify_audit) is None
