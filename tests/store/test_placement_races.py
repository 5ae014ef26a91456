"""Two leaders on one database, each believing that it leads alone: nothing is overcommitted, whoever commits first."""

import random
import threading
from collections import Counter, defaultdict
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

from tests.placement_rows import NOW, ask, found
from trimtab_controller.clock import mint
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import schema
from trimtab_controller.store.database import Database

HOSTS, VCPUS_EACH, LICENCES_EACH = 3, 8, 2
ROUNDS_MAX = 20


class MeetingClock:
    """Its first reading of a duration, which is between reading the fleet and committing, waits for the other leader's."""

    def __init__(self, meeting: threading.Barrier) -> None:
        self._meeting, self._has_met = meeting, False
        self.has_read = threading.Event()

    def now(self) -> datetime:
        return NOW

    def boottime_s(self) -> float:
        if not self._has_met:
            self._has_met = True
            self.has_read.set()
            self._meeting.wait(timeout=30)
        return 0.0


def stock(db: Database, group_id: str, project_id: str) -> None:
    has = {"resource:licence": LICENCES_EACH, "device:gpu": 2, "pci:gpu:0000:41:00.0": 1, "pci:gpu:0000:42:00.0": 1}
    rows = [
        {"host_id": f"host-{n:05}", "resource": resource, "capacity": capacity}
        for n in range(HOSTS)
        for resource, capacity in has.items()
    ]
    rule = {"rules": [{"relation": "anti-affinity", "domain": "host"}]}

    def work(session: Any) -> None:
        session.execute(schema.host_stock.insert(), rows)
        session.execute(schema.vm_group.insert().values(id=group_id, project_id=project_id, name="g", rule=rule, created_at=NOW))

    db.write(work)


def rows_of(db: Database, table: sa.Table) -> list[Any]:
    return list(db.read(lambda session: session.execute(sa.select(table)).all()))


@pytest.fixture
def pair(database_url: str) -> Any:
    opened = [Database(database_url), Database(database_url)]
    yield opened
    for each in opened:
        each.close()


def test_two_leaders_racing_on_one_database_never_overcommit(pair: list[Database]) -> None:
    term, ids = found(pair[0], HOSTS, vcpus_limit=VCPUS_EACH)
    group_id, rng = mint("grp"), random.Random(3)
    stock(pair[0], group_id, ids["proj"])
    meeting = threading.Barrier(2)
    clocks = [MeetingClock(meeting), MeetingClock(meeting)]
    errors: list[BaseException] = []

    def queue(numbers: range, priority: int) -> None:
        for number in numbers:
            scarce = {"resources": {"licence": 1}} if number % 3 == 0 else {"devices": {"gpu": 1}} if number % 3 == 1 else {}
            member_of = group_id if number % 4 == 0 else ""
            size = {"vcpus": rng.choice([1, 2]), "memory_mib": 64, "priority": priority}
            ask(pair[0], ids, number, **size, wishes=scarce, group_id=member_of)

    def lead(db: Database, clock: MeetingClock) -> None:
        loop = PlacementLoop(db=db, clock=clock, nudger=Nudger(lambda: None), rng=rng)
        try:
            for _ in range(ROUNDS_MAX):
                loop.run(term)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=lead, args=each) for each in zip(pair, clocks, strict=True)]
    queue(range(12), 0)
    threads[0].start()
    assert clocks[0].has_read.wait(timeout=30)
    # The second leader decides these first, so the two disagree about everything.
    queue(range(12, 24), 10)
    threads[1].start()
    for thread in threads:
        thread.join(timeout=90)
    assert errors == []

    requests = rows_of(pair[0], schema.placement_request)
    claims = rows_of(pair[0], schema.claim)
    held = rows_of(pair[0], schema.claim_stock)
    assert {request.state for request in requests} == {"placed", "refused"}
    assert sorted(claim.vm_id for claim in claims) == sorted(one.vm_id for one in requests if one.state == "placed")
    used: Counter[str] = Counter()
    for claim in claims:
        used[claim.host_id] += claim.vcpus
    for host in rows_of(pair[0], schema.host):
        assert host.vcpus_claimed == used[host.id] <= VCPUS_EACH
    taken: Counter[tuple[str, str]] = Counter()
    for one in held:
        taken[one.host_id, one.resource] += one.amount
    for row in rows_of(pair[0], schema.host_stock):
        assert row.claimed == taken[row.host_id, row.resource] <= row.capacity
    gpus = [one.resource for one in held if one.resource.startswith("pci:")]
    assert len(gpus) == sum(one.resource == "device:gpu" for one in held) > 0, "each vm with a device has one of its own"
    members = {row.vm_id for row in rows_of(pair[0], schema.vm_group_member)}
    on_host: defaultdict[str, set[str]] = defaultdict(set)
    for claim in claims:
        on_host[claim.host_id] |= {claim.vm_id} & members
    assert all(len(together) <= 1 for together in on_host.values())
    assert any(on_host.values())
