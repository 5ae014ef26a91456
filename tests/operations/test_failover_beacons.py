"""A host that renews its lease on shared storage as well: it lives by it, and is recovered by lease only after a proven intent.

The slots are real files, read and written by the real agents of the simulated hosts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Pool, Vm
from trimtab_controller.loops import failover_reading as reading
from trimtab_controller.loops.beacons import LOOKS_AT_ONCE, OBSERVE_EVERY_S, Beacons
from trimtab_controller.store import fence_intents, host_guards, hosts, leases, schema
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos import beacon_slots
from trimtab_protos.beacon_slots import Beat, Intent


@dataclass
class Beaconed:
    """A story whose victim has a beacon, and no power device."""

    story: Story
    pool: Path
    vm: Vm
    counter: int = 0
    is_alive: bool = False
    """Whether the victim's beacon counts on."""

    @property
    def host_id(self) -> str:
        return self.vm.host_id

    @property
    def slot(self) -> Path:
        return beacon_slots.path_of(self.pool, self.host_id)

    def beat(self, *, boot_id: str = "") -> None:
        self.counter += 1
        host = self.story.fleet.db.read(lambda session: hosts.get(session, self.host_id))
        said = Beat(
            host_id=self.host_id,
            boot_id=boot_id or host.boot_id,
            lease_number=host.lease_number,
            counter=self.counter,
            ttl_ms=15_000,
        )
        with beacon_slots.opened(self.slot) as slot:
            beacon_slots.write_block(slot, beacon_slots.BEAT, said)

    def intent(self) -> Intent | None:
        with beacon_slots.opened(self.slot) as slot:
            return beacon_slots.intent_of(beacon_slots.read_block(slot, beacon_slots.INTENT))

    def rounds(self, count: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """One second each; a beacon that lives counts every third, and obeys."""
        for number in range(count):
            if until():
                return
            intent = self.intent()
            if self.is_alive and number % 3 == 0 and intent is None:
                self.beat()
            self.story.rounds(1)
            self.acknowledge()

    def acknowledge(self) -> None:
        def work(session: Any) -> None:
            for one in leases.revocations(session):
                if "gw-1" not in one.acknowledgements:
                    leases.acknowledge(session, one.host_id, number=one.number, gateway_id="gw-1", granted_ago_ms=12_000)

        self.story.fleet.db.write(work)

    def fall_silent(self) -> None:
        self.story.silence(self.host_id, HostConnectivity.SUSPECT)
        self.rounds(3)
        self.story.silence(self.host_id, HostConnectivity.LOST)

    def is_fenced(self) -> bool:
        host = self.story.fleet.db.read(lambda session: hosts.get(session, self.host_id))
        return host.connectivity is HostConnectivity.FENCED

    def now_s(self) -> float:
        return self.story.fleet.clock.boottime_s()

    @property
    def wait_s(self) -> float:
        return self.story.loop.state.settings.lease_wait_s(3.0)

    def told(self) -> str:
        return str(self.story.record(self.host_id).evidence)


@pytest.fixture
def beaconed(new_story: Callable[..., FleetStory], tmp_path: Path) -> Iterator[Beaconed]:
    for story in story_of(new_story(host_count=5)):
        vm, fleet = story.kept_vm(), story.fleet
        pool = fleet.add_pool("beacons", is_shared=True)

        def prepare(session: Any, vm: Vm = vm, fleet: FleetStory = fleet, pool: Pool = pool) -> None:
            now = fleet.clock.now()
            session.execute(schema.pool.update().where(schema.pool.c.id == pool.id).values(path=str(tmp_path)))
            session.execute(schema.pool_host.update().where(schema.pool_host.c.pool_id == pool.id).values(state="ready"))
            session.execute(schema.host.update().where(schema.host.c.id == vm.host_id).values(gateway_id="gw-1"))
            guard = HostGuard(is_armed=True, beacon_pool_id=pool.id)
            number = hosts.get(session, vm.host_id).lease_number
            assert host_guards.write(session, vm.host_id, guard, lease_number=number, now=now)
            leases.take(session, leases.GATEWAY_PREFIX + "gw-1", owner="gw-1", seen=None, ttl_ms=15_000, now=now)

        fleet.db.write(prepare)
        made = Beaconed(story, tmp_path, vm)
        made.beat()
        story.rounds(14)
        yield made


def test_the_wait_is_counted_from_the_intent_that_another_hosts_agent_wrote(beaconed: Beaconed) -> None:
    beaconed.fall_silent()
    beaconed.rounds(20, until=lambda: beaconed.intent() is not None)
    written_s = beaconed.now_s()
    intent = beaconed.intent()
    assert intent is not None
    lease_number = beaconed.story.fleet.db.read(lambda session: hosts.get(session, beaconed.host_id)).lease_number
    assert (intent.term, intent.lease_number) == (beaconed.story.fleet.term, lease_number)
    row = beaconed.story.fleet.db.read(lambda session: fence_intents.find(session, beaconed.host_id))
    assert row is not None
    assert row.written_at is not None
    assert row.via_host_id != beaconed.host_id, "a silent host is not asked to write against itself"
    beaconed.rounds(60, until=beaconed.is_fenced)
    assert beaconed.is_fenced()
    # The gateway granted last some twenty seconds before the intent: counted from there a copy would start at once.
    assert beaconed.wait_s - 1.0 <= beaconed.now_s() - written_s <= beaconed.wait_s + 3.0
    beaconed.story.power_cut(beaconed.host_id)  # as its warden did
    beaconed.rounds(ROUNDS, until=lambda: bool(beaconed.story.fleet.running_on(beaconed.vm.id)))
    assert beaconed.story.fleet.running_on(beaconed.vm.id)


def last_beat(beaconed: Beaconed, *, late_by: int | None) -> float:
    """Let the beacon be seen counting, and die with its host; return when it wrote its last beat that may have prolonged its lease.

    `late_by`: seconds after the host fell silent in which one more beat reaches the slot; after the intent it prolongs nothing.
    """
    beaconed.is_alive = True
    beaconed.rounds(9)
    beaconed.is_alive = False
    last_s = beaconed.now_s()
    beaconed.story.silence(beaconed.host_id, HostConnectivity.SUSPECT)
    for second in range(8):
        if second == late_by:
            last_s = beaconed.now_s() if beaconed.intent() is None else last_s
            beaconed.beat()
        beaconed.rounds(1)
        if second == 3:
            beaconed.story.silence(beaconed.host_id, HostConnectivity.LOST)
    return last_s


def test_where_its_slot_was_seen_counting_the_wait_begins_at_the_last_beat_and_not_at_the_intent(beaconed: Beaconed) -> None:
    last_s = last_beat(beaconed, late_by=None)
    beaconed.rounds(60, until=beaconed.is_fenced)
    assert beaconed.intent() is not None, "it was written all the same"
    # Looks at the slots and rounds are a second apart; the beats before came every third.
    assert beaconed.wait_s - 3.0 <= beaconed.now_s() - last_s <= beaconed.wait_s + 2.0


def test_a_reader_that_died_too_holds_up_no_look_at_the_slots(beaconed: Beaconed) -> None:
    fleet, looks, hung = beaconed.story.fleet, list[set[str]](), list[str]()
    seen = fleet.db.read(lambda session: reading.read(session, also=(), operation_ids=()))
    pool_id = next(iter(seen.beacon_pools))
    dead = seen.beacon_readers[pool_id][0]

    def ask(_pool_id: str, what: str, question: Callable[[], object]) -> None:
        if what.endswith(dead):
            hung.append(what)
        else:
            question()
            looks[-1].add(what)

    beacons = Beacons(agents=fleet.client, clock=fleet.clock, ask=ask, lease_ttl_s=15)
    for _second in range(8):
        looks.append(set())
        beacons.observe(seen)
        fleet.clock.advance(OBSERVE_EVERY_S)
    assert len(hung) == 1, "it is not asked again while its answer is waited for"
    assert all(looks), "each time another host looked"
    assert len(set().union(*looks)) == len(seen.beacon_readers[pool_id]) - 1, "in turn"


def test_storage_that_hangs_holds_up_few_threads_however_many_hosts_could_look(beaconed: Beaconed) -> None:
    fleet, hung = beaconed.story.fleet, list[str]()
    seen = fleet.db.read(lambda session: reading.read(session, also=(), operation_ids=()))
    beacons = Beacons(
        agents=fleet.client, clock=fleet.clock, ask=lambda _pool_id, what, _question: hung.append(what), lease_ttl_s=15
    )
    for _second in range(8):
        beacons.observe(seen)
        fleet.clock.advance(OBSERVE_EVERY_S)
    assert len(hung) == len(set(hung)) == LOOKS_AT_ONCE


@pytest.mark.parametrize("late_by", [1, 5])
def test_a_beat_that_comes_late_is_waited_for(beaconed: Beaconed, late_by: int) -> None:
    last_s = last_beat(beaconed, late_by=late_by)
    beaconed.rounds(90, until=beaconed.is_fenced)
    assert beaconed.is_fenced()
    assert beaconed.now_s() - last_s >= beaconed.wait_s - 3.0


def test_a_silent_host_whose_beacon_counts_on_is_left_alone_and_recovered_once_that_ends_too(beaconed: Beaconed) -> None:
    beaconed.is_alive = True
    beaconed.fall_silent()
    beaconed.rounds(60)
    assert not beaconed.is_fenced()
    assert beaconed.intent() is None
    assert any("lives by its beacon" in word for word in beaconed.story.loop.state.hosts[beaconed.host_id].degraded)
    beaconed.is_alive = False
    beaconed.rounds(60, until=beaconed.is_fenced)
    assert beaconed.is_fenced()


def test_a_host_that_returns_has_nothing_to_be_cleared(beaconed: Beaconed) -> None:
    beaconed.fall_silent()
    beaconed.rounds(20, until=lambda: beaconed.intent() is not None)
    standing = beaconed.intent()
    beaconed.story.return_of(beaconed.host_id)
    beaconed.rounds(5)
    assert beaconed.story.loop.state.hosts[beaconed.host_id].standing is HostConnectivity.UP
    assert beaconed.intent() == standing, "it forbids leases that the host has no more"
    assert beaconed.story.fleet.db.read(lambda session: fence_intents.find(session, beaconed.host_id)) is None


def test_without_a_host_that_reaches_the_storage_nothing_follows_from_the_lease(beaconed: Beaconed) -> None:
    fleet = beaconed.story.fleet
    fleet.db.write(lambda session: session.execute(schema.pool_host.update().values(state="failed")))
    beaconed.fall_silent()
    beaconed.rounds(90)
    assert not beaconed.is_fenced()


def test_an_intent_of_a_newer_leader_is_not_replaced_and_not_counted_on(beaconed: Beaconed) -> None:
    newer = Intent(term=beaconed.story.fleet.term + 1, number=1, lease_number=99)
    beacon_slots.place_intent(beaconed.slot, newer)
    beaconed.fall_silent()
    beaconed.rounds(90)
    assert beaconed.intent() == newer
    assert not beaconed.is_fenced()


def test_an_intent_that_a_late_write_replaced_meanwhile_begins_the_wait_anew(beaconed: Beaconed) -> None:
    beaconed.fall_silent()
    beaconed.rounds(20, until=lambda: beaconed.intent() is not None)
    beaconed.rounds(10)
    ours = beaconed.intent()
    assert ours is not None
    with beacon_slots.opened(beaconed.slot) as slot:  # a deposed leader's, which had passed its check before ours was there
        beacon_slots.write_block(slot, beacon_slots.INTENT, replace(ours, term=ours.term - 1, lease_number=0))
    crossed_s = beaconed.now_s()
    beaconed.rounds(90, until=beaconed.is_fenced)
    assert beaconed.is_fenced()
    assert beaconed.now_s() - crossed_s > beaconed.wait_s + 5, "the host may have renewed again in between"
    assert "another one stands in the slot" in beaconed.told()


def test_a_beacon_that_renews_a_newer_lease_than_is_on_record_is_forbidden_that_one_or_nothing_follows(
    beaconed: Beaconed,
) -> None:
    """After a restore of yesterday's database the record may know of older leases only."""
    beaconed.story.fleet.db.write(
        lambda session: session.execute(schema.host.update().where(schema.host.c.id == beaconed.host_id).values(lease_number=40))
    )
    beaconed.beat()
    beaconed.story.fleet.db.write(
        lambda session: session.execute(schema.host.update().where(schema.host.c.id == beaconed.host_id).values(lease_number=1))
    )
    beaconed.fall_silent()
    beaconed.rounds(60, until=beaconed.is_fenced)
    intent = beaconed.intent()
    assert intent is not None
    assert intent.forbids(40)
    assert beaconed.is_fenced()


def test_a_slot_in_which_this_boot_of_the_host_never_renewed_proves_nothing(beaconed: Beaconed) -> None:
    """Where the pool is not mounted, on its side or on the writer's, the intent lies where the host never looks."""
    beaconed.beat(boot_id="another")
    beaconed.fall_silent()
    beaconed.rounds(90)
    assert not beaconed.is_fenced()
    assert "did not renew in this slot" in beaconed.told()
