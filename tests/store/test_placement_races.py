"""Two leaders on one database, each believing that it leads alone: nothing is overcommitted, whoever commits first."""

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from tests.placement_rows import GIB, NOW, ask, found
from trimtab_controller.clock import mint
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import schema
from trimtab_controller.store.database import Database, Session

T = TypeVar("T")

HOSTS, VCPUS_EACH, LICENCES_EACH = 3, 8, 2
ROUNDS_MAX = 20


class MeetingDatabase(Database):
    """Its first write, by when everything is read and decided, waits for the other leader's, or for its end where it is told to."""

    def __init__(self, url: str, meeting: threading.Barrier, *, waits_for: threading.Event | None = None) -> None:
        super().__init__(url)
        self._meeting, self._waits_for = meeting, waits_for
        self.has_decided, self.has_written = threading.Event(), threading.Event()

    def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        if not self.has_decided.is_set():
            self.has_decided.set()
            self._meeting.wait(timeout=30)
            if self._waits_for is not None:
                assert self._waits_for.wait(timeout=30)
        try:
            return super().write(transaction, durable=durable)
        finally:
            self.has_written.set()


class StandingClock:
    def now(self) -> datetime:
        return NOW

    def boottime_s(self) -> float:
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
def store(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture(params=["at-once", "the-second-on-what-it-read-before"])
def leaders(database_url: str, request: pytest.FixtureRequest) -> Iterator[list[MeetingDatabase]]:
    """At once either may be first, and the first may have answered everything; one after the other the second always meets claims."""
    meeting = threading.Barrier(2)
    first = MeetingDatabase(database_url, meeting)
    second = MeetingDatabase(database_url, meeting, waits_for=None if request.param == "at-once" else first.has_written)
    opened = [first, second]
    yield opened
    for each in opened:
        each.close()


def race(store: Database, leaders: list[MeetingDatabase], term: int, queue: Callable[[range, int], None]) -> None:
    """Let both leaders answer, each having read before the other wrote."""
    errors: list[BaseException] = []

    def lead(db: Database) -> None:
        loop = PlacementLoop(db=db, clock=StandingClock(), nudger=Nudger(lambda: None), rng=random.Random(3))
        try:
            for _ in range(ROUNDS_MAX):
                loop.run(term)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=lead, args=(db,)) for db in leaders]
    queue(range(12), 0)
    threads[0].start()
    assert leaders[0].has_decided.wait(timeout=30)
    # The second leader decides these first, so the two disagree about everything.
    queue(range(12, 24), 10)
    threads[1].start()
    for thread in threads:
        thread.join(timeout=90)
    assert errors == []
    assert {request.state for request in rows_of(store, schema.placement_request)} == {"placed", "refused"}


def test_two_leaders_racing_on_one_database_never_overcommit(store: Database, leaders: list[MeetingDatabase]) -> None:
    term, ids = found(store, HOSTS, vcpus_limit=VCPUS_EACH)
    group_id, rng = mint("grp"), random.Random(3)
    stock(store, group_id, ids["proj"])

    def queue(numbers: range, priority: int) -> None:
        for number in numbers:
            scarce = {"resources": {"licence": 1}} if number % 3 == 0 else {"devices": {"gpu": 1}} if number % 3 == 1 else {}
            member_of = group_id if number % 4 == 0 else ""
            size = {"vcpus": rng.choice([1, 2]), "memory_mib": 64, "priority": priority}
            ask(store, ids, number, **size, wishes=scarce, group_id=member_of)

    race(store, leaders, term, queue)

    requests = rows_of(store, schema.placement_request)
    claims = rows_of(store, schema.claim)
    held = rows_of(store, schema.claim_stock)
    assert sorted(claim.vm_id for claim in claims) == sorted(one.vm_id for one in requests if one.state == "placed")
    used: Counter[str] = Counter()
    for claim in claims:
        used[claim.host_id] += claim.vcpus
    for host in rows_of(store, schema.host):
        assert host.vcpus_claimed == used[host.id] <= VCPUS_EACH
    taken: Counter[tuple[str, str]] = Counter()
    for one in held:
        taken[one.host_id, one.resource] += one.amount
    for row in rows_of(store, schema.host_stock):
        assert row.claimed == taken[row.host_id, row.resource] <= row.capacity
    gpus = [one.resource for one in held if one.resource.startswith("pci:")]
    assert len(gpus) == sum(one.resource == "device:gpu" for one in held) > 0, "each vm with a device has one of its own"
    members = {row.vm_id for row in rows_of(store, schema.vm_group_member)}
    on_host: defaultdict[str, set[str]] = defaultdict(set)
    for claim in claims:
        on_host[claim.host_id] |= {claim.vm_id} & members
    assert all(len(together) <= 1 for together in on_host.values())
    assert any(on_host.values())


PINNED = {"dedicated": True}
ON_PAGES = {"hugepages_kib": 2048}


@pytest.mark.parametrize("is_short_of_space", [False, True])
def test_two_leaders_racing_never_overcommit_memory_space_pinned_cpus_or_huge_pages(
    store: Database, leaders: list[MeetingDatabase], is_short_of_space: bool
) -> None:
    """Space by itself: where hosts are short of the rest too, that is what refuses."""
    term, ids = found(store, HOSTS)
    has = {"cell:0:cpus": 3, "cell:0:pages:2048": 64}
    rows = [
        {"host_id": f"host-{n:05}", "resource": resource, "capacity": capacity}
        for n in range(HOSTS)
        for resource, capacity in has.items()
    ]
    volumes_max, limit_mib = (8, 4096) if is_short_of_space else (24, 320)
    space_bytes = volumes_max * 10 * GIB

    def work(session: Any) -> None:
        session.execute(schema.host_stock.insert(), rows)
        session.execute(schema.host.update().values(memory_limit_mib=limit_mib))
        session.execute(schema.pool_space.update().values(capacity_bytes=space_bytes, available_bytes=space_bytes))

    store.write(work)

    def queue(numbers: range, priority: int) -> None:
        for number in numbers:
            wishes = {} if is_short_of_space else (PINNED, ON_PAGES, {})[number % 3]
            # Two ordinary vms fill a host but for a pinned one; its cell has cpus for one of these, and pages for two vms.
            memory_mib = 64 if wishes or is_short_of_space else 150
            ask(store, ids, number, vcpus=2, memory_mib=memory_mib, wishes=wishes, priority=priority)

    race(store, leaders, term, queue)
    claims = rows_of(store, schema.claim)
    memory_mib: Counter[str] = Counter()
    for claim in claims:
        memory_mib[claim.host_id] += claim.memory_mib
    for host in rows_of(store, schema.host):
        assert host.memory_claimed_mib == memory_mib[host.id] <= limit_mib
    (space,) = rows_of(store, schema.pool_space)
    taken_bytes = [claim.size_bytes for claim in rows_of(store, schema.disk_claim)]
    assert space.claimed_bytes == sum(taken_bytes) <= space_bytes
    assert len(taken_bytes) == len(claims) > 0
    taken: Counter[tuple[str, str]] = Counter()
    for one in rows_of(store, schema.claim_stock):
        taken[one.host_id, one.resource] += one.amount
    for row in rows_of(store, schema.host_stock):
        assert row.claimed == taken[row.host_id, row.resource] <= row.capacity
    assert {resource for _, resource in taken} == (set() if is_short_of_space else has.keys()), "some of each was given"
