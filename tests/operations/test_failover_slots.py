"""A storm of recoveries does not crush a survivor: so many guests start on one host at a time, by where they are really placed."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.failover.settings import STARTS_PER_HOST
from trimtab_controller.store import schema, slots
from trimtab_protos.errors import Unavailable

VMS = 10


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def slots_taken(story: Story) -> Counter[str]:
    query = sa.select(schema.slot.c.host_id).where(schema.slot.c.kind == slots.START)
    return Counter(story.fleet.db.read(lambda session: session.scalars(query).all()))


def bringing_up(story: Story, vm_ids: list[str]) -> Counter[str]:
    """Return how many recoveries of each host are past their slot and have not ended."""
    found: Counter[str] = Counter()
    for vm_id in vm_ids:
        operation = story.operations(vm_id)[-1]
        journal = story.fleet.journal(operation.id)
        if operation.kind == "vm.recover" and operation.ended_at is None and "do slot" in journal:
            found[story.fleet.vm(vm_id).host_id] += 1
    return found


def test_no_more_guests_than_slots_come_up_on_one_host_and_the_rest_says_why_it_waits(story: Story) -> None:
    victim = story.fleet.host_ids[0]
    kept = [story.kept_vm(f"db{number}", to_host_id=victim, vcpus=1).id for number in range(VMS)]
    # Each start takes some tries, so that they pile up.
    for _try in range(4 * STARTS_PER_HOST):
        story.fleet.fleet.plan_fault("define_domain", Fault(FaultKind.FAIL_BEFORE, Unavailable("busy", "storage is slow")))
    story.arm(victim)
    story.lose(victim)
    most: Counter[str] = Counter()
    reasons = set()
    for _round in range(ROUNDS):
        story.rounds(1)
        most |= bringing_up(story, kept)
        assert bringing_up(story, kept) == slots_taken(story)
        reasons |= {story.fleet.vm(vm_id).problem for vm_id in kept}
        if all(story.fleet.running_on(vm_id) for vm_id in kept):
            break
    assert {story.fleet.vm(vm_id).host_id for vm_id in kept} != {victim}
    assert all(story.fleet.running_on(vm_id) for vm_id in kept), "each comes up in the end"
    assert max(most.values()) == STARTS_PER_HOST, "all slots of a host were used, and no more"
    assert [why for why in reasons if f"{STARTS_PER_HOST} guests are starting on" in why]
    story.rounds(3)
    assert not slots_taken(story), "ends give slots back"
    assert {story.fleet.vm(vm_id).problem for vm_id in kept} == {""}


def test_a_slot_is_taken_once_however_often_it_is_asked_for_and_never_beyond_the_limit(story: Story) -> None:
    operations = [story.fleet.accept_create(f"vm{number}")[1].id for number in range(4)]

    def take(operation_id: str) -> bool:
        return story.fleet.db.write(
            lambda session: slots.take(session, host_id="host-x", kind=slots.START, operation_id=operation_id, limit=2)
        )

    assert [take(operations[0]), take(operations[0]), take(operations[1]), take(operations[2])] == [True, True, True, False]
    assert slots_taken(story) == Counter({"host-x": 2})
