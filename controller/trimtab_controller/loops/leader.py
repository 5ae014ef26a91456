"""Leader election by one lease row: at most one engine's writes are ever accepted, whatever its clock or its pauses.

    following -> (row released, or seen unchanged for a ttl by our own eyes) -> leading -> (stolen, released, own time over) -> following

Three guards, from loose to strict: `term()` is None from ttl - 3 s after our last renewal by our own CLOCK_BOOTTIME; a contender
steals only after it watched the beat stand still for the whole ttl; and `leases.assert_leader` refuses inside each transaction.
"""

import threading

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, SystemClock
from trimtab_controller.config import Settings
from trimtab_controller.store import behind, leases
from trimtab_controller.store.database import Database
from trimtab_controller.store.leases import BeatWatch, Lease
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

STOP_BEFORE_END_S = 3.0
"""A leader ends its own term so long before anyone may steal it: time for what it has begun to finish or fail."""


class Leader:
    """`tick` belongs to one thread, about once a second; `term` may be asked by any."""

    def __init__(self, settings: Settings, db: Database, *, owner: str, clock: Clock | None = None) -> None:
        self._db = db
        self._owner = owner
        self._clock = clock or SystemClock()
        self._ttl_s = settings.lease_ttl_s
        self._renew_s = settings.lease_renew_s
        self._margin_s = min(STOP_BEFORE_END_S, self._ttl_s / 5)
        self._watch = BeatWatch()
        self._lock = threading.Lock()
        self._held: Lease | None = None
        self._renewed_s = 0.0
        self.is_behind = False
        """The database is older than the fleet, as of the last tick: the lead is kept, and nothing is done with it."""

    def term(self) -> int | None:
        """Return the term under which this process may act now, None while it does not lead."""
        with self._lock:
            if self._held is None or self._clock.boottime_s() >= self._renewed_s + self._ttl_s - self._margin_s:
                return None
            return self._held.term

    def tick(self) -> None:
        """Renew when it is time, contend otherwise. A database that does not answer is waited out; the term ends by itself."""
        started_s = self._clock.boottime_s()
        try:
            if self._held is None:
                self._contend(started_s)
            elif started_s >= self._renewed_s + self._renew_s:
                self._renew(started_s)
            self._look_whether_behind()
        except Unavailable as error:
            log.warning("lease of the engine not reached", error=error.message)
        metrics.LEADER.set(self.term() is not None)

    def _look_whether_behind(self) -> None:
        was_behind, self.is_behind = self.is_behind, self._db.read(behind.state).is_in_force
        metrics.DATABASE_BEHIND.set(self.is_behind)
        if self.is_behind != was_behind:
            log.warning("the leader stands still" if self.is_behind else "the leader goes on", is_behind=self.is_behind)

    def release(self) -> None:
        """Stop leading and let a successor take over at once."""
        held = self._drop("released")
        if held is None:
            return
        try:
            self._db.write(lambda session: leases.release(session, held, now=self._clock.now()))
        except Unavailable as error:
            log.warning("lease of the engine not released; it ends by itself", error=error.message)

    def _renew(self, started_s: float) -> None:
        held = self._held
        assert held is not None
        renewed = self._db.write(lambda session: leases.renew(session, held, now=self._clock.now()), durable=False)
        if renewed is None:
            self._drop("stolen")
            return
        with self._lock:
            self._held, self._renewed_s = renewed, started_s

    def _contend(self, started_s: float) -> None:
        seen = self._db.read(lambda session: leases.read(session, leases.ENGINE))
        if seen is not None and not self._watch.is_expired(seen, self._clock.boottime_s()):
            return
        taken = self._db.write(
            lambda session: leases.take(
                session,
                leases.ENGINE,
                owner=self._owner,
                seen=seen,
                ttl_ms=int(self._ttl_s * 1000),
                now=self._clock.now(),
            )
        )
        if taken is None:
            return
        with self._lock:
            self._held, self._renewed_s = taken, started_s
        metrics.LEADER_CHANGES.labels("taken").inc()
        log.info("leading", term=taken.term, owner=self._owner, stolen_from=seen.owner if seen else "")

    def _drop(self, why: str) -> Lease | None:
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            metrics.LEADER_CHANGES.labels(why).inc()
            log.info("not leading any more", term=held.term, owner=self._owner, why=why)
        return held
