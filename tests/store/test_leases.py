"""Leases of the control plane: one leader at most, whatever its clock does, on both databases."""

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from trimtab_controller import config
from trimtab_controller.config import Settings
from trimtab_controller.core.behind import Evidence, Witness
from trimtab_controller.loops.leader import Leader
from trimtab_controller.loops.leader_loop import Job, run_due
from trimtab_controller.store import behind, leases, schema
from trimtab_controller.store.database import Database
from trimtab_controller.store.leases import BeatWatch, Lease
from trimtab_protos.errors import Conflict, Unavailable

NOW = datetime(2026, 11, 23, tzinfo=UTC)


class OwnClock:
    """One contender's clock: it may run on while the process stood still, or the other way round."""

    def __init__(self) -> None:
        self.boottime = 1000.0

    def now(self) -> datetime:
        return NOW

    def boottime_s(self) -> float:
        return self.boottime


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return config.load(data_dir=tmp_path, lease_ttl_s=15, lease_renew_s=5)


class Contender:
    def __init__(self, settings: Settings, database: Database, name: str) -> None:
        self.clock = OwnClock()
        self.leader = Leader(settings, database, owner=name, clock=self.clock)

    def live(self, seconds: int) -> None:
        """Run for so long, ticking each second."""
        for _second in range(seconds):
            self.clock.boottime += 1
            self.leader.tick()


@pytest.fixture
def pair(settings: Settings, database: Database) -> tuple[Contender, Contender]:
    return Contender(settings, database, "one"), Contender(settings, database, "two")


def write_as(database: Database, term: int | None) -> None:
    """A write of the leader's, as every loop makes them."""
    assert term is not None

    def transaction(session: Any) -> None:
        leases.assert_leader(session, term)
        session.execute(schema.turn.insert().values(subject_id=f"written-at-{term}", value=term))

    database.write(transaction)


def test_the_first_contender_leads_and_the_second_waits(pair: tuple[Contender, Contender], database: Database) -> None:
    one, two = pair
    one.leader.tick()
    for _second in range(60):
        one.live(1)
        two.live(1)
    assert one.leader.term() == 1
    assert two.leader.term() is None
    write_as(database, one.leader.term())


def test_a_leader_that_was_paused_is_replaced_and_its_late_write_is_refused(
    pair: tuple[Contender, Contender], database: Database
) -> None:
    one, two = pair
    one.leader.tick()
    term = one.leader.term()
    two.live(16)  # saw the beat stand still for a whole ttl
    assert two.leader.term() == 2
    # One was frozen and knows nothing: by its own clock it still leads, and its write is refused all the same.
    assert one.leader.term() == term
    with pytest.raises(Conflict, match="another engine leads"):
        write_as(database, term)
    write_as(database, two.leader.term())
    one.live(6)
    assert one.leader.term() is None


def test_a_leader_stops_by_its_own_clock_before_anyone_may_steal(pair: tuple[Contender, Contender], database: Database) -> None:
    one, two = pair
    one.leader.tick()
    two.leader.tick()
    one.clock.boottime += 12  # it could not renew: its database was away
    assert one.leader.term() is None
    two.live(12)
    assert two.leader.term() is None


def test_a_contender_counts_from_its_own_first_sight(pair: tuple[Contender, Contender]) -> None:
    one, two = pair
    one.leader.tick()
    two.clock.boottime += 1_000_000  # another machine's clock, or one that just woke up
    two.leader.tick()
    assert two.leader.term() is None
    two.live(14)
    assert two.leader.term() is None
    two.live(2)
    assert two.leader.term() == 2


def test_a_released_lease_is_taken_at_once(pair: tuple[Contender, Contender], database: Database) -> None:
    one, two = pair
    one.leader.tick()
    two.leader.tick()
    one.leader.release()
    assert one.leader.term() is None
    with pytest.raises(Conflict):
        database.write(lambda session: leases.assert_leader(session, 1))
    two.leader.tick()
    assert two.leader.term() == 2


def test_a_stolen_lease_is_noticed_at_the_next_renewal(pair: tuple[Contender, Contender]) -> None:
    one, two = pair
    one.leader.tick()
    two.live(16)
    one.live(5)
    assert one.leader.term() is None
    # It contends again as anyone does, and gets its turn when the other dies.
    one.live(17)
    assert one.leader.term() == 3


def test_of_two_that_take_at_once_one_gets_it(settings: Settings, database: Database) -> None:
    contenders = [Contender(settings, database, f"contender-{number}") for number in range(4)]
    barrier = threading.Barrier(len(contenders))

    def run(contender: Contender) -> None:
        barrier.wait(timeout=10)
        contender.leader.tick()

    threads = [threading.Thread(target=run, args=(contender,)) for contender in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(str(contender.leader.term()) for contender in contenders) == ["1", "None", "None", "None"]


def test_a_thief_waits_for_a_write_of_the_leader_that_is_under_way(settings: Settings, database: Database) -> None:
    """The check holds until the commit: a steal cannot slip between it and the write that it guards."""
    one = Contender(settings, database, "one")
    one.leader.tick()
    seen = database.read(lambda session: leases.read(session, leases.ENGINE))
    order: list[str] = []
    inside, stolen = threading.Event(), threading.Event()

    def steal() -> None:
        assert inside.wait(timeout=10)
        taken = database.write(
            lambda session: leases.take(session, leases.ENGINE, owner="thief", seen=seen, ttl_ms=15_000, now=NOW)
        )
        assert taken is not None
        order.append("stolen")
        stolen.set()

    def transaction(session: Any) -> None:
        leases.assert_leader(session, 1)
        inside.set()
        assert not stolen.wait(timeout=0.3)
        session.execute(schema.turn.insert().values(subject_id="guarded", value=1))
        order.append("written")

    thief = threading.Thread(target=steal)
    thief.start()
    database.write(transaction)
    thief.join(timeout=30)
    assert order == ["written", "stolen"]


def test_a_database_that_does_not_answer_ends_the_lead_by_time_alone(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    one = Contender(settings, database, "one")
    one.leader.tick()

    class Gone:
        def write(self, *_arguments: Any, **_options: Any) -> None:
            raise Unavailable("database-unavailable", "gone")

        read = write

    one.leader._db = Gone()  # type: ignore[assignment]
    one.live(11)
    assert one.leader.term() == 1
    one.live(1)
    assert one.leader.term() is None


# --- the rows themselves ---------------------------------------------------------------------------------------------------------


def take(database: Database, name: str = "gateway/gw-1", seen: Lease | None = None) -> Lease | None:
    return database.write(lambda session: leases.take(session, name, owner="me", seen=seen, ttl_ms=1000, now=NOW))


def test_a_row_is_taken_only_as_it_was_seen(database: Database) -> None:
    first = take(database)
    assert first is not None
    assert take(database) is None  # somebody has it already
    renewed = database.write(lambda session: leases.renew(session, first, now=NOW))
    assert renewed is not None
    assert take(database, seen=first) is None  # it beat since
    second = take(database, seen=renewed)
    assert second is not None
    assert second.term == first.term + 1
    assert database.write(lambda session: leases.renew(session, first, now=NOW)) is None


def test_leases_are_listed_by_prefix(database: Database) -> None:
    take(database, "gateway/gw-1")
    take(database, "gateway/gw-2")
    take(database, "engine")
    found = database.read(lambda session: leases.named(session, leases.GATEWAY_PREFIX))
    assert [lease.name for lease in found] == ["gateway/gw-1", "gateway/gw-2"]


def test_a_beat_watch_trusts_only_what_it_saw() -> None:
    watch = BeatWatch()

    def lease(beat: int, owner: str = "me") -> Lease:
        return Lease(name="engine", owner=owner, term=1, beat=beat, ttl_ms=15_000, context={}, renewed_at=NOW)

    assert watch.unchanged_for_s(lease(1), 100) == 0
    assert watch.unchanged_for_s(lease(1), 110) == 10
    assert not watch.is_expired(lease(1), 114.9)
    assert watch.is_expired(lease(1), 115)
    assert not watch.is_expired(lease(2), 116)
    assert watch.is_expired(lease(3, owner=""), 117)


# --- revocations -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host_id(database: Database) -> str:
    def insert(session: Any) -> str:
        session.execute(schema.host_class.insert().values(id="hc-1", name="default", created_at=NOW))
        session.execute(
            schema.host.insert().values(
                id="host-1",
                name="node1",
                host_class_id="hc-1",
                labels={},
                agent_address="",
                migration_address="",
                machine_id="m",
                smbios_uuid="s",
                connectivity="up",
                connectivity_at=NOW,
                created_at=NOW,
            )
        )
        return "host-1"

    return database.write(insert)


def test_a_revocation_is_acknowledged_by_number(database: Database, host_id: str) -> None:
    first = database.write(lambda session: leases.revoke(session, host_id, term=4, now=NOW))
    database.write(lambda session: leases.acknowledge(session, host_id, number=first.number, gateway_id="gw-1", granted_ago_ms=7))
    assert database.read(leases.revocations)[0].acknowledgements == {"gw-1": 7}
    again = database.write(lambda session: leases.revoke(session, host_id, term=5, now=NOW))
    assert (again.number, dict(again.acknowledgements)) == (first.number + 1, {})
    # An acknowledgement of the old one says nothing about the new one.
    database.write(lambda session: leases.acknowledge(session, host_id, number=first.number, gateway_id="gw-1", granted_ago_ms=9))
    assert database.read(leases.revocations)[0].acknowledgements == {}


def test_two_gateways_that_acknowledge_at_once_are_both_recorded(database: Database, host_id: str) -> None:
    number = database.write(lambda session: leases.revoke(session, host_id, term=1, now=NOW)).number

    def acknowledge(gateway_id: str) -> None:
        database.write(
            lambda session: leases.acknowledge(session, host_id, number=number, gateway_id=gateway_id, granted_ago_ms=1)
        )

    threads = [threading.Thread(target=acknowledge, args=(f"gw-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert set(database.read(leases.revocations)[0].acknowledgements) == {"gw-0", "gw-1", "gw-2", "gw-3"}


def test_a_lifted_revocation_is_gone(database: Database, host_id: str) -> None:
    database.write(lambda session: leases.revoke(session, host_id, term=1, now=NOW))
    database.write(lambda session: leases.lift_revocation(session, host_id))
    assert database.read(leases.revocations) == ()


def test_a_leader_keeps_the_lead_and_stands_still_while_the_database_is_behind(
    database: Database, pair: tuple[Contender, Contender]
) -> None:
    one, two = pair
    one.live(1)
    term = one.leader.term()
    evidence = Evidence(host_id="host-1", host_name="node1", witness=Witness.MARK, seen=41, known=37)
    write_as(database, term)
    database.write(lambda session: behind.declare(session, [evidence], now=NOW))
    one.live(1)
    two.live(1)
    assert (one.leader.term(), one.leader.is_behind, two.leader.is_behind) == (term, True, True)
    with pytest.raises(Conflict) as refused:
        database.write(lambda session: leases.assert_leader(session, term or 0))
    assert refused.value.code == "database-behind"
    ran: list[str] = []
    jobs = [
        Job("acts", 0.0, lambda _term: ran.append("acts")),
        Job("looks", 0.0, lambda _term: ran.append("looks"), only_looks=True),
    ]
    run_due(jobs, 1, one.clock, is_behind=one.leader.is_behind)
    assert ran == ["looks"]
    database.write(lambda session: behind.end(session, disbelieved={}, now=NOW))
    one.live(1)
    database.write(lambda session: leases.assert_leader(session, term or 0))
    run_due(jobs, 1, one.clock, is_behind=one.leader.is_behind)
    assert ran == ["looks", "acts", "looks"]
