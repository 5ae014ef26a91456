"""When the leader answers: a round reads the whole fleet, so it waits for more to ask while drivers are busy, never while idle."""

import random
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa

from tests.placement_rows import NOW, ask, found
from trimtab_controller.clock import mint
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import events, operations, placements, schema
from trimtab_controller.store.database import Database


class SteppingClock:
    """Each look at it takes a second, so that a round takes a few."""

    def __init__(self) -> None:
        self._read_s = 0.0

    def now(self) -> datetime:
        return NOW + timedelta(seconds=1)

    def boottime_s(self) -> float:
        self._read_s += 1.0
        return self._read_s


@pytest.fixture
def store(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def state_of(store: Database, vm_id: str) -> str:
    request = schema.placement_request
    return str(
        store.read(lambda session: session.execute(sa.select(request.c.state).where(request.c.vm_id == vm_id)).scalar_one())
    )


def claim_all(store: Database) -> int:
    """Do as drivers do that have time; return how many operations they found."""
    now = NOW + timedelta(seconds=1)
    return len(store.write(lambda session: operations.claim_due(session, driver="driver", now=now, lease_s=60.0, limit=50)))


def test_a_round_waits_while_drivers_are_busy_and_begins_at_once_when_they_are_idle(store: Database) -> None:
    term, ids = found(store, 3, vcpus_limit=8)
    loop = PlacementLoop(db=store, clock=SteppingClock(), nudger=Nudger(lambda: None), rng=random.Random(1))
    claim_all(store)
    ask(store, ids, 1, vcpus=1, memory_mib=64)
    loop.run(term)
    second = ask(store, ids, 2, vcpus=1, memory_mib=64)

    loop.run(term)
    assert state_of(store, second) == "pending", "the first vm's operation is work that no driver has taken yet"
    assert claim_all(store) >= 1
    loop.run(term)
    assert state_of(store, second) == "placed"


def test_a_request_waits_for_busy_drivers_no_longer_than_its_rest(store: Database) -> None:
    term, ids = found(store, 3, vcpus_limit=8)
    loop = PlacementLoop(db=store, clock=SteppingClock(), nudger=Nudger(lambda: None), rng=random.Random(1))
    ask(store, ids, 1, vcpus=1, memory_mib=64)
    loop.run(term)
    second = ask(store, ids, 2, vcpus=1, memory_mib=64)

    rounds = 0
    while state_of(store, second) == "pending":
        loop.run(term)
        rounds += 1
        assert rounds < 50, "it is never answered"


def test_a_project_with_more_requests_than_a_batch_holds_does_not_keep_another_waiting(store: Database) -> None:
    _, ids = found(store, 1)
    other = ids | {"proj": mint("proj")}
    store.write(lambda session: session.execute(schema.project.insert().values(id=other["proj"], name="other", created_at=NOW)))
    for number in range(5):
        ask(store, ids, number, vcpus=1, memory_mib=64)
    modest = ask(store, other, 9, vcpus=1, memory_mib=64)
    batch = store.read(lambda session: placements.pending(session, limit=2))
    assert modest in {one.vm_id for one in batch}
    assert len(batch) == 2


def test_each_decision_says_what_state_of_the_fleet_it_read_at_one_query_for_a_round(store: Database) -> None:
    term, ids = found(store, 3, vcpus_limit=8)
    loop = PlacementLoop(db=store, clock=SteppingClock(), nudger=Nudger(lambda: None), rng=random.Random(1), rest=0.0)
    asked: list[str] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))

    def revisions(*vcpus: int) -> list[int | None]:
        vm_ids = [ask(store, ids, number, vcpus=each, memory_mib=64) for number, each in enumerate(vcpus)]
        asked.clear()
        loop.run(term)
        assert len([one for one in asked if "max(event.seq)" in one]) == 1
        made = [store.read(lambda session, vm_id=vm_id: placements.latest_decision(session, vm_id)) for vm_id in vm_ids]  # type: ignore[misc]
        return [one.fleet_revision for one in made if one is not None]

    def newest() -> int:
        return store.read(events.bounds)[1]

    assert revisions(1) == [0], "nothing had been told of this fleet yet"
    placed = newest()
    assert revisions(1, 1, 64) == [placed] * 3, "two of one batch, and one that fits nowhere"
    tell = {"kind": "host.cordoned", "subject_id": "host-00000", "message": "cordoned", "now": NOW}
    store.write(lambda session: events.append(session, **tell))
    cordoned = newest()
    assert placed < cordoned
    assert revisions(64) == [cordoned]
    assert revisions(64) == [cordoned], "a refusal changes nothing, nor tells of anything"
