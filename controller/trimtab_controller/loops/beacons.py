"""The controller's side of the beacons: who still renews on shared storage, and the fence intent that ends it.

A controller has no mount of the storage; it asks the agent of any live host that has. Four questions, each answered rounds later:

    observe  while all is well: which beat stood in each slot, and since when
    watch    a host is silent: does its slot count on? Then it lives by its beacon, and nothing is done about it
    write    forbid the host's leases up to its newest; the lease bound is counted from its last beat where that was seen before and
             stands in the slot after the intent (`core/failover/sightings.py`), else from the answer on
    prove    the bound has passed: is the intent still ours, and the slot the one in which this boot of the host renewed?

Why it is proven at the end: two writers may cross on shared storage, and a late write of a deposed leader could have replaced the
intent. Every attempt has a number of its own, so what is found at the end stood there all the time. Why the slot is looked at: a pool
that is not mounted, on either side, is an empty directory that takes every intent and shows it to nobody.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from trimtab_controller import metrics
from trimtab_controller.agents.client import AgentClient
from trimtab_controller.clock import Clock
from trimtab_controller.core.failover.events import Event, IntentProven, IntentWritten
from trimtab_controller.core.failover.sightings import Sighting, counted_from_s, sighted
from trimtab_controller.loops.failover_reading import Snapshot
from trimtab_controller.store import fence_intents
from trimtab_controller.store.database import Session
from trimtab_protos import beacon_slots
from trimtab_protos.beacon_slots import Beat, Intent
from trimtab_protos.errors import Conflict, Unavailable
from trimtab_protos.messages import PoolSpec

log = structlog.get_logger(__name__)

ROUNDS_PER_LEASE = 5
MARGIN_S = 1.5
"""What reading takes, and a round that came late."""
OBSERVE_EVERY_S = 1.0
"""Between looks at the slots of hosts that are well; what a look is late is added to the wait for a lease."""
LOOKS_AT_ONCE = 4
"""Of one pool: storage that hangs holds up so many threads."""
READERS_OF_A_LOOK = 2
"""The host that is asked may be the very one that just died, and its last beat is what has to be seen."""
OBSERVED_MAX = 256
"""Slots of one pool that are looked at while all is well, in one call; in larger pools the wait is counted from the intent."""
NOT_READ_S = 6.0
"""Where nobody could read a slot for so long, nothing is known of its host by it."""

Ask = Callable[[str, str, Callable[[], Event | None]], None]
"""Host, what is asked, question: runs it in a thread unless the same is under way; its answer is an event of a later round."""


@dataclass(slots=True)
class _Watched:
    """A slot since its host fell silent."""

    since_s: float
    first_s: float | None = None
    counter: int = 0
    lease_number: int = 0
    moved_s: float | None = None


class Beacons:
    """`watch`, `write` and `prove` belong to the loop's thread; what they ask runs in others."""

    def __init__(self, *, agents: AgentClient, clock: Clock, ask: Ask, lease_ttl_s: float) -> None:
        self._agents, self._clock, self._ask = agents, clock, ask
        self._period_s = lease_ttl_s / ROUNDS_PER_LEASE
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._intents: dict[str, Intent] = {}
        # Newest beat that was read of each slot, by pool and host; belongs to whoever holds the lock.
        self._sightings: dict[tuple[str, str], Sighting] = {}
        self._observe_at_s: dict[str, float] = {}
        # Of each pool, the hosts whose answer is waited for.
        self._looking: dict[str, set[str]] = {}
        self._number = 0
        # Which live host is asked next, for each one asked about: one that hangs is not asked twice in a row.
        self._turns: dict[str, int] = {}

    def observe(self, seen: Snapshot) -> None:
        """Have the slots of all hosts with a beacon read, a pool at a time; of hosts that are gone nothing is kept."""
        now, by_pool = self._clock.boottime_s(), dict[str, list[str]]()
        for host_id, guard in seen.guards.items():
            if guard.beacon_pool_id and host_id in seen.hosts:
                by_pool.setdefault(guard.beacon_pool_id, []).append(host_id)
        with self._lock:
            kept = {(pool_id, host_id) for pool_id, host_ids in by_pool.items() for host_id in host_ids}
            self._sightings = {slot: one for slot, one in self._sightings.items() if slot in kept}
        for pool_id, host_ids in by_pool.items():
            pool, readers = seen.beacon_pools.get(pool_id), seen.beacon_readers.get(pool_id, ())
            if pool is None or not readers or len(host_ids) > OBSERVED_MAX or now < self._observe_at_s.get(pool_id, 0.0):
                continue
            self._observe_at_s[pool_id] = now + OBSERVE_EVERY_S
            for reader in self._next_readers(pool_id, readers):
                self._ask(pool_id, f"beacon-slots-{reader}", partial(self._look_at_all, pool, reader, sorted(host_ids)))

    def _next_readers(self, pool_id: str, readers: Sequence[str]) -> list[str]:
        """Return who looks next, in turn; those whose answer is still waited for are passed over."""
        first = self._turns.get(pool_id, 0)
        with self._lock:
            looking = self._looking.setdefault(pool_id, set())
            turns = (readers[(first + offset) % len(readers)] for offset in range(len(readers)))
            free = max(0, LOOKS_AT_ONCE - len(looking))
            found = [reader for reader in turns if reader not in looking][: min(READERS_OF_A_LOOK, free)]
            looking.update(found)
        if found:
            self._turns[pool_id] = list(readers).index(found[-1]) + 1
        return found

    def _look_at_all(self, pool: PoolSpec, reader: str, host_ids: Sequence[str]) -> None:
        try:
            found, now = self._agents.read_slots(reader, pool, host_ids), self._clock.boottime_s()
        finally:
            with self._lock:
                self._looking[pool.pool_id].discard(reader)
        for host_id, (beat_block, _intent_block) in found.items():
            self._note(pool, host_id, _beat(beat_block), now)

    def _note(self, pool: PoolSpec, host_id: str, beat: Beat | None, now: float) -> Sighting | None:
        """Keep what was read of a slot; return what is known of it now, None where no beat was read. `now`: once it was read."""
        if beat is None or beat.host_id != host_id:
            return None
        with self._lock:
            found = sighted(
                self._sightings.get((pool.pool_id, host_id)),
                boot_id=beat.boot_id,
                lease_number=beat.lease_number,
                counter=beat.counter,
                now=now,
            )
            self._sightings[pool.pool_id, host_id] = found
        return found

    def watch(self, seen: Snapshot, silent: Sequence[str]) -> None:
        """Have the slots of silent hosts read; what was known of others is forgotten."""
        now = self._clock.boottime_s()
        with self._lock:
            self._watched = {host_id: self._watched.get(host_id) or _Watched(now) for host_id in silent}
        for host_id in silent:
            self._begin(host_id, "slot", seen, partial(self._look, host_id))

    def is_alive(self, host_id: str) -> bool:
        """Tell whether the host's slot was seen counting since it fell silent, and lately."""
        with self._lock:
            watched = self._watched.get(host_id)
            moved_s = watched.moved_s if watched is not None else None
        return moved_s is not None and self._clock.boottime_s() - moved_s <= 2 * self._period_s + MARGIN_S

    def is_undecided(self, host_id: str) -> bool:
        """Tell whether a living beacon would not have had the time to show itself yet."""
        now = self._clock.boottime_s()
        with self._lock:
            watched = self._watched.get(host_id)
            if watched is None or watched.moved_s is not None:
                return False
            if watched.first_s is None:
                return now - watched.since_s <= NOT_READ_S
            return now - watched.first_s <= self._period_s + MARGIN_S

    def write(self, host_id: str, term: int, seen: Snapshot, *, fenced: Callable[[Callable[[Session], None]], None]) -> None:
        """Have the intent written. `fenced` runs a transaction under the leader's term, or raises Conflict."""
        with self._lock:
            watched = self._watched.get(host_id)
            # A database that was restored from a backup may know of older leases only than the host has.
            lease_number = max(seen.hosts[host_id].lease_number, watched.lease_number if watched is not None else 0)

        def place(writer: str, pool: PoolSpec) -> Event | None:
            with self._lock:
                self._number += 1
                intent = Intent(term=term, number=self._number, lease_number=lease_number)
            now = self._clock.now()
            fenced(lambda session: fence_intents.begin(session, host_id, intent, pool.pool_id, via_host_id=writer, now=now))
            standing = _intent(self._agents.write_intent(writer, pool, host_id, intent))
            if standing != intent:
                metrics.FENCE_INTENTS.labels("refused").inc()
                log.warning("fence intent refused", host_id=host_id, term=term, standing_term=standing.term if standing else None)
                return None
            with self._lock:
                self._intents[host_id] = intent
                known = self._sightings.get((pool.pool_id, host_id))
            written_s, now = self._clock.boottime_s(), self._clock.now()
            fenced(lambda session: fence_intents.written(session, host_id, intent, now=now))
            metrics.FENCE_INTENTS.labels("written").inc()
            from_s = self._counted_from_s(host_id, writer, pool, known=known, written_s=written_s)
            log.info(
                "fence intent written",
                host_id=host_id,
                via=writer,
                lease_number=lease_number,
                number=intent.number,
                last_beat_ago_s=round(written_s - from_s, 1),
            )
            return IntentWritten(host=host_id, at_s=from_s)

        self._begin(host_id, "write", seen, place)

    def _counted_from_s(self, host_id: str, reader: str, pool: PoolSpec, *, known: Sighting | None, written_s: float) -> float:
        """Read the slot once more, now that the intent stands there: where nothing came after the beat that we knew, it was the last."""
        try:
            beat_block, _intent_block = self._agents.read_slots(reader, pool, [host_id]).get(host_id, (b"", b""))
        except Unavailable:
            return written_s
        after = self._note(pool, host_id, _beat(beat_block), self._clock.boottime_s())
        return counted_from_s(known, after, written_s=written_s)

    def prove(self, host_id: str, seen: Snapshot) -> None:
        """Have the intent read once more."""
        standing = seen.hosts[host_id]
        with self._lock:
            ours = self._intents.get(host_id)

        def look(reader: str, pool: PoolSpec) -> Event | None:
            beat_block, intent_block = self._agents.read_slots(reader, pool, [host_id]).get(host_id, (b"", b""))
            why = ""
            if ours is None or _intent(intent_block) != ours:
                why = "another one stands in the slot"
            elif ours.lease_number < standing.lease_number:
                why = "the host opened a session since it was written"
            elif (beat := _beat(beat_block)) is None or (beat.host_id, beat.boot_id) != (host_id, standing.boot_id):
                why = "the host did not renew in this slot since it booted: is the pool mounted on both?"
            elif not ours.forbids(beat.lease_number):
                why = f"its beacon renews lease {beat.lease_number}, which is newer than the one on record"
            metrics.FENCE_INTENTS.labels("disproven" if why else "proven").inc()
            return IntentProven(host=host_id, why=why)

        self._begin(host_id, "prove", seen, look)

    def forget(self, host_id: str) -> None:
        with self._lock:
            self._intents.pop(host_id, None)

    def _begin(self, host_id: str, what: str, seen: Snapshot, question: Callable[[str, PoolSpec], Event | None]) -> None:
        guard = seen.guards.get(host_id)
        pool = seen.beacon_pools.get(guard.beacon_pool_id) if guard is not None else None
        readers = [one for one in seen.beacon_readers.get(pool.pool_id, ()) if one != host_id] if pool is not None else []
        if pool is None or not readers:
            return

        def work() -> Event | None:
            turn = self._turns.get(host_id, 0)
            try:
                return question(readers[turn % len(readers)], pool)
            except Unavailable:
                self._turns[host_id] = turn + 1
                if what != "slot":
                    metrics.FENCE_INTENTS.labels("unreachable").inc()
                raise
            except Conflict as conflict:
                log.info("fence intent not written", host_id=host_id, code=conflict.code)
                return None

        self._ask(host_id, f"beacon-{what}", work)

    def _look(self, host_id: str, reader: str, pool: PoolSpec) -> None:
        beat_block, _intent_block = self._agents.read_slots(reader, pool, [host_id]).get(host_id, (b"", b""))
        beat, now = _beat(beat_block), self._clock.boottime_s()
        self._note(pool, host_id, beat, now)
        with self._lock:
            watched = self._watched.get(host_id)
            if watched is None or beat is None:
                return
            watched.lease_number = beat.lease_number
            if watched.first_s is None:
                watched.first_s, watched.counter = now, beat.counter
            elif beat.counter != watched.counter:
                watched.counter, watched.moved_s = beat.counter, now


def _beat(block: bytes) -> Beat | None:
    try:
        return beacon_slots.beat_of(block)
    except ValueError:
        return None


def _intent(block: bytes) -> Intent | None:
    try:
        return beacon_slots.intent_of(block)
    except ValueError:
        return None
