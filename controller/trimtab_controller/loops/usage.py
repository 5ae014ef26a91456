"""Rolls up what guests use and how their hosts fare, per five minutes: CPU time that agents report, as thousandths of a core, and the
memory that guests really hold; each host's use of its processors, what was stolen from it, and pressure stalls, as shares 0..1; the
memory that it could still give, and what its guests hold of it together.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab_controller.clock import Clock
from trimtab_controller.operations.estates import BUCKET_S, CPU_MILLIS, GUESTS_MIB, HOST_METRICS, MEMORY_MIB
from trimtab_controller.store import leases, usage
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.usage import Rollup
from trimtab_protos.messages import DomainObservation, DomainState

# Two looks that are further apart tell nothing about one bucket: a host that was away, a leader that changed.
_APART_MAX_S = 2 * BUCKET_S
# What a gateway last heard is older than this only where it hears nothing any more.
_FRESH = timedelta(seconds=60)
# What the metrics are in: permille, hundredths of a percent, and MiB.
_PARTS = {
    "cpu_used_permille": 1000,
    "cpu_steal_permille": 1000,
    "cpu_pressure": 10_000,
    "memory_pressure": 10_000,
    "memory_available_mib": 1,
}


@dataclass(slots=True)
class _Bucket:
    total: float = 0.0
    peak: float = 0.0
    samples: int = 0


class Usage:
    """`note` is called by the threads that ask hosts, `flush` by the leader."""

    def __init__(self, *, db: Database, clock: Clock) -> None:
        self._db, self._clock = db, clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[datetime, int]] = {}
        self._buckets: dict[tuple[str, str, datetime], _Bucket] = {}

    def note(self, seen: Sequence[DomainObservation], *, host_id: str, at: datetime) -> None:
        """Take in all that one host said of its domains at this instant."""
        own = [one for one in seen if one.vm_id]
        with self._lock:
            for one in own:
                if one.cpu_time_ns > 0:
                    self._note_one(one.vm_id, one.cpu_time_ns, at)
                if one.rss_mib > 0:
                    self._add(one.vm_id, MEMORY_MIB, one.rss_mib, at)
            # Of the same instant, so that the rest of what a host uses stays the same whichever guests come and go. An agent that does
            # not say what guests hold says nothing of the rest either.
            if all(one.rss_mib > 0 for one in own if one.state is DomainState.RUNNING):
                self._add(host_id, GUESTS_MIB, sum(one.rss_mib for one in own), at)

    def _note_one(self, vm_id: str, cpu_time_ns: int, at: datetime) -> None:
        before = self._last.get(vm_id)
        self._last[vm_id] = (at, cpu_time_ns)
        if before is None:
            return
        elapsed_s = (at - before[0]).total_seconds()
        # A guest that started anew, or elsewhere, counts from zero again.
        if not 0 < elapsed_s <= _APART_MAX_S or cpu_time_ns < before[1]:
            return
        millis = (cpu_time_ns - before[1]) / elapsed_s / 1e6
        self._add(vm_id, CPU_MILLIS, millis, at)

    def note_hosts(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in what the gateways last heard of each host, as `HeardHosts.states` gives it; what is old is left out."""
        now = self._clock.now()
        with self._lock:
            for host_id, state in states.items():
                at = datetime.fromtimestamp(state["at_ms"] / 1000, UTC)
                if not timedelta() <= now - at <= _FRESH:
                    continue
                for name, metric in HOST_METRICS.items():
                    self._add(host_id, metric, state["load"].get(name, 0) / _PARTS[name], at)

    def _add(self, subject_id: str, metric: str, value: float, at: datetime) -> None:
        bucket = self._buckets.setdefault((subject_id, metric, _bucket_of(at)), _Bucket())
        bucket.total += value
        bucket.peak = max(bucket.peak, value)
        bucket.samples += 1

    def flush(self, term: int) -> None:
        """Write the buckets that are over, and forget vms that were not seen for long."""
        now = self._clock.now()
        present = _bucket_of(now)
        with self._lock:
            over = {key: self._buckets.pop(key) for key in list(self._buckets) if key[2] < present}
            gone = [vm_id for vm_id, (at, _) in self._last.items() if (now - at).total_seconds() > _APART_MAX_S]
            for vm_id in gone:
                del self._last[vm_id]
        rollups = [
            Rollup(
                subject_id=subject_id,
                metric=metric,
                bucket_s=BUCKET_S,
                bucket_at=at,
                mean=bucket.total / bucket.samples,
                peak=bucket.peak,
                samples=bucket.samples,
            )
            for (subject_id, metric, at), bucket in over.items()
        ]

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            usage.add(session, rollups)

        if rollups:
            self._db.write(work, durable=False)


def _bucket_of(at: datetime) -> datetime:
    return datetime.fromtimestamp(at.timestamp() // BUCKET_S * BUCKET_S, tz=UTC)
