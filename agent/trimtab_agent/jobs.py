"""Long pieces of work: image imports, migrations, backups and restores, each under the key of the command that began it.

    (none) ── start ──► running ──► succeeded | failed | cancelled

State is on disk, progress in memory. A job that is found running after the agent started is run again: every verb means "ensure",
and a migration that libvirt still drives is attached to. One that an earlier incarnation began has failed: its host booted.
A class of jobs runs at most `limits` at once; the others wait in the phase "queued". No job is killed with the agent.

A job that failed for good is found as failed for ever. One whose error was retryable is begun anew by the next start after a start
has told of the failure, so that no failure goes unseen. A migration is not: its peer may have died and come back meanwhile, so
whoever asked for it first looks where the guest is, and decides.
A migration, and what saves or restores a memory, begins (or goes on after a restart) only under a live lease, and not once another
driver took over its vm.
"""

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import structlog

from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.job_rows import SUPERSEDED, JobName, JobResult, JobRow, JobRows, job_message, name_of
from trimtab_agent.journal import JournalFile
from trimtab_agent.lease import LeaseState
from trimtab_agent.outbox import ItemKind, Outbox
from trimtab_agent.workers import WorkerPool
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.errors import Conflict, Internal, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import CommandKey, JobProgress, JobState

log = structlog.get_logger(__name__)

ENDED_KEPT_MS = 7 * 24 * 3_600_000
LISTED_AFTER_END_MS = 3_600_000
_LEASE_POLL_S = 0.25
_RECORD_RETRY_S = 5.0
"""A full disk is the usual cause; the end of the job is kept in memory until it can be written."""
_RESTART_SEQUENCE_STEP = 1 << 32
"""Added to a job's sequence when it is run again: progress counted in memory since the last write stays below."""


class JobKind(StrEnum):
    IMPORT = "import"
    MIGRATION = "migration"
    BACKUP = "backup"
    TOGETHER = "together"
    """Backups of vms at one instant: as many at once as a group may have on a host, since each waits for the others."""
    RESTORE = "restore"
    UPKEEP = "upkeep"
    """Verification and pruning of a repository."""
    LAYERS = "layers"
    """Merging layers and copying volumes."""
    MEMORY = "memory"
    """Saving a guest's memory and starting it from there."""
    FILL = "fill"
    """Filling disks of guests that run on a backup already."""


DEFAULT_LIMITS: Mapping[JobKind, int] = {
    JobKind.IMPORT: 2,
    JobKind.MIGRATION: 2,
    JobKind.BACKUP: 2,
    JobKind.TOGETHER: 8,
    JobKind.RESTORE: 2,
    JobKind.UPKEEP: 1,
    JobKind.LAYERS: 2,
    JobKind.MEMORY: 2,
    JobKind.FILL: 2,
}


_UNDER_LEASE = frozenset({JobKind.MIGRATION, JobKind.MEMORY})


class Runner(Protocol):
    def __call__(self, request: bytes, stamp: Stamp, control: JobControl) -> JobResult:
        """Do the work of one kind of job and block until it ended."""


@dataclass(slots=True, eq=False)
class _Live:
    """A job that waits or runs in this process; also its `JobControl`."""

    key: CommandKey
    kind: JobKind
    request: bytes
    sequence: int
    progress: JobProgress = field(default_factory=lambda: JobProgress(phase="queued"))
    is_started: bool = False
    ended: pb.Job | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> JobName:
        return name_of(self.key)

    def report(self, progress: JobProgress) -> None:
        self.progress = progress
        self.sequence += 1

    def message(self) -> pb.Job:
        return self.ended or job_message(self.key, JobState.RUNNING, self.sequence, progress=self.progress)


class Jobs:
    """The jobs of one agent. Thread-safe."""

    def __init__(
        self,
        file: JournalFile,
        agent_id: str,
        *,
        incarnation: str,
        outbox: Outbox,
        pool: WorkerPool,
        runners: Mapping[JobKind, Runner],
        lease: Callable[[], LeaseState],
        clock: Clock,
        limits: Mapping[JobKind, int] = DEFAULT_LIMITS,
    ) -> None:
        self._file = file
        self._rows = JobRows(agent_id)
        self._incarnation = incarnation
        self._outbox = outbox
        self._pool = pool
        self._runners = runners
        self._lease = lease
        self._clock = clock
        self._limits = limits
        self._lock = threading.Lock()
        self._live: dict[JobName, _Live] = {}
        self._waiting: dict[JobKind, deque[_Live]] = {kind: deque() for kind in JobKind}
        self._running: dict[JobKind, int] = dict.fromkeys(JobKind, 0)
        self._on_ended: Callable[[JobKind, JobState], None] = lambda _kind, _state: None
        self._is_detached = False

    def notify(self, on_ended: Callable[[JobKind, JobState], None]) -> None:
        """Call `on_ended` for every job that ends, from a job's thread."""
        self._on_ended = on_ended

    def start(self, key: CommandKey, kind: JobKind, request: bytes) -> Future[pb.Job]:
        """Begin the job, or find it. The caller has admitted the command."""
        live = _Live(key, kind, request, sequence=1)

        def work(connection: sqlite3.Connection) -> pb.Job | None:
            found = self._rows.find(connection, live.name)
            may_begin_anew = found is not None and (
                found.gave_way_to(key) or (found.has_failed_for_now and found.was_told and kind is not JobKind.MIGRATION)
            )
            if found is not None and not may_begin_anew:
                if found.state is not JobState.RUNNING:
                    self._rows.set(connection, live.name, was_told=1)
                    return found.message()
                self._rows.set(connection, live.name, turn=key.turn, epoch=key.epoch)
                return None
            if found is not None:
                live.sequence = found.sequence + _RESTART_SEQUENCE_STEP
            self._rows.begin(
                connection,
                key,
                kind=kind.value,
                request=request,
                incarnation=self._incarnation,
                sequence=live.sequence,
                at_ms=self._clock.now_ms(),
            )
            # Within the transaction, so that no second start can come between: the writer is one thread.
            with self._lock:
                self._live[live.name] = live
            return live.message()

        started: Future[pb.Job] = _uncancellable()

        def done(committed: Future[pb.Job | None]) -> None:
            error = committed.exception()
            if error is not None:
                with self._lock:
                    if self._live.get(live.name) is live:
                        del self._live[live.name]
                started.set_exception(error)
                return
            with self._lock:
                is_new = self._live.get(live.name) is live
            if is_new:
                self._enqueue(live)
            message = committed.result()
            if message is None:
                message = self._found_running(key)
            started.set_result(message)

        self._file.submit(work).add_done_callback(done)
        return started

    def get(self, name: JobName) -> Future[pb.Job]:
        """Return the job. NotFound where this agent never had it."""

        def work(connection: sqlite3.Connection) -> pb.Job:
            live = self._live_job(name)
            if live is not None:
                return live.message()
            row = self._rows.find(connection, name)
            if row is None:
                raise NotFound("job-not-found", "this agent never had such a job", operation_id=name[0], step=name[1])
            return row.message()

        return self._file.submit(work)

    def list_recent(self) -> Future[list[pb.Job]]:
        """Return every live job and those that ended within the hour."""
        since_ms = self._clock.now_ms() - LISTED_AFTER_END_MS

        def work(connection: sqlite3.Connection) -> list[pb.Job]:
            rows = self._rows.recent(connection, since_ms=since_ms)
            return [(self._live_job(name_of(row.key)) or row).message() for row in rows]

        return self._file.submit(work)

    def running(self) -> list[pb.Job]:
        """Return the live jobs with their progress, without asking the disk."""
        with self._lock:
            lives = list(self._live.values())
        return [live.message() for live in lives]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Return how many jobs of each kind run and wait."""
        with self._lock:
            return {
                **{(kind.value, "running"): self._running[kind] for kind in JobKind},
                **{(kind.value, "queued"): len(self._waiting[kind]) for kind in JobKind},
            }

    def cancel(self, key: CommandKey) -> Future[pb.Job]:
        """Ask the job to end; return it as it is then. The wish survives a restart of the agent."""
        name = name_of(key)

        def work(connection: sqlite3.Connection) -> None:
            found = self._rows.find(connection, name)
            if found is not None and found.state is JobState.RUNNING:
                self._rows.set(connection, name, is_cancel_asked=1)

        asked = self._file.submit(work)
        told: Future[pb.Job] = _uncancellable()

        def done(committed: Future[None]) -> None:
            error = committed.exception()
            if error is not None:
                told.set_exception(error)
                return
            self._ask_to_end(name)
            self.get(name).add_done_callback(lambda found: _forward(found, told))

        asked.add_done_callback(done)
        return told

    def resume(self) -> Future[int]:
        """Run again what was running when the agent ended; return how many. Call once, before commands are served."""

        def work(connection: sqlite3.Connection) -> list[tuple[_Live, bool]]:
            return [
                (self._revive(connection, row), row.incarnation == self._incarnation) for row in self._rows.running(connection)
            ]

        resumed: Future[int] = _uncancellable()

        def done(committed: Future[list[tuple[_Live, bool]]]) -> None:
            error = committed.exception()
            if error is not None:
                resumed.set_exception(error)
                return
            for live, is_of_this_incarnation in committed.result():
                if is_of_this_incarnation:
                    self._enqueue(live)
                else:
                    rebooted = Unavailable("host-rebooted", "the host booted while the job ran; observe, then begin it again")
                    self._end(live, JobState.FAILED, error=rebooted)
            resumed.set_result(len(committed.result()))

        self._file.submit(work).add_done_callback(done)
        return resumed

    def detach(self) -> None:
        """Record nothing more: the agent stops, and its successor runs or attaches to what is still going on."""
        self._is_detached = True

    def prune(self) -> Future[int]:
        """Delete jobs that ended long ago."""
        before_ms = self._clock.now_ms() - ENDED_KEPT_MS
        return self._file.submit(lambda connection: self._rows.prune(connection, before_ms=before_ms))

    # Running.

    def _revive(self, connection: sqlite3.Connection, row: JobRow) -> _Live:
        live = _Live(row.key, JobKind(row.kind), row.request, sequence=row.sequence + _RESTART_SEQUENCE_STEP)
        if row.is_cancel_asked:
            live.cancelled.set()
        self._rows.set(connection, live.name, sequence=live.sequence)
        with self._lock:
            self._live[live.name] = live
        return live

    def _enqueue(self, live: _Live) -> None:
        with self._lock:
            self._waiting[live.kind].append(live)
        self._dispatch(live.kind)

    def _dispatch(self, kind: JobKind) -> None:
        """Start as many waiting jobs as the limit of their class allows."""
        while True:
            with self._lock:
                if self._is_detached or not self._waiting[kind] or self._running[kind] >= self._limits[kind]:
                    return
                live = self._waiting[kind].popleft()
                live.is_started = True
                self._running[kind] += 1
            try:
                self._pool.submit(lambda chosen=live: self._run(chosen))  # type: ignore[misc]
            except Unavailable:
                with self._lock:
                    live.is_started = False
                    self._running[kind] -= 1
                    self._waiting[kind].appendleft(live)
                self._clock.call_later(_RECORD_RETRY_S, lambda: self._dispatch(kind))
                return

    def _run(self, live: _Live) -> None:
        try:
            with structlog.contextvars.bound_contextvars(operation_id=live.key.operation_id, step=live.key.step):
                self._run_to_end(live)
        finally:
            with self._lock:
                self._running[live.kind] -= 1
            self._dispatch(live.kind)

    def _run_to_end(self, live: _Live) -> None:
        try:
            if live.kind in _UNDER_LEASE:
                self._wait_for_right(live)
            _refuse_cancelled(live)
            live.report(JobProgress(phase="starting"))
            result = self._runners[live.kind](live.request, Stamp(epoch=live.key.epoch, turn=live.key.turn), live)
        except Conflict as error:
            self._end(live, JobState.CANCELLED if error.code == "job-cancelled" else JobState.FAILED, error=error)
        except TrimtabError as error:
            self._end(live, JobState.FAILED, error=error)
        except Exception:
            # The job's edge: whatever broke it, the job has ended, and whoever waits for it is told.
            log.exception("job broke", kind=live.kind.value, subject_id=live.key.subject_id)
            self._end(live, JobState.FAILED, error=Internal("job-broke", "the agent failed at this job; its log says why"))
        else:
            self._end(live, JobState.SUCCEEDED, result=result)

    def _wait_for_right(self, live: _Live) -> None:
        """Block until the host holds a lease. Conflict(`job-superseded`) once another driver took the vm over."""
        while not self._lease().is_live:
            live.progress = replace(live.progress, phase="waiting for the host's lease")
            if live.cancelled.wait(_LEASE_POLL_S):
                return
        turn, own_turn = self._file.submit(lambda connection: self._rows.turns(connection, live.key)).result()
        if own_turn < turn:
            raise Conflict(SUPERSEDED, "another driver took over this vm before the migration began", turn=own_turn)

    def _ask_to_end(self, name: JobName) -> None:
        with self._lock:
            live = self._live.get(name)
            if live is None:
                return
            live.cancelled.set()
            is_waiting = live in self._waiting[live.kind]
            if is_waiting:
                self._waiting[live.kind].remove(live)
        if is_waiting:
            self._end(live, JobState.CANCELLED, error=Conflict("job-cancelled", "cancelled before it began"))

    def _end(self, live: _Live, state: JobState, *, result: JobResult | None = None, error: TrimtabError | None = None) -> None:
        live.ended = job_message(live.key, state, live.sequence + 1, progress=live.progress, result=result, error=error)
        log.info(
            "job ended",
            kind=live.kind.value,
            state=state.value,
            subject_id=live.key.subject_id,
            operation_id=live.key.operation_id,
            error=str(error) if error else "",
        )
        self._record_end(live, state)
        self._on_ended(live.kind, state)

    def _record_end(self, live: _Live, state: JobState) -> None:
        if self._is_detached:
            return
        assert live.ended is not None
        body = live.ended.SerializeToString()
        sequence, at_ms = live.ended.sequence, self._clock.now_ms()

        def work(connection: sqlite3.Connection) -> None:
            self._rows.set(connection, live.name, state=state.value, sequence=sequence, outcome=body, at_ms=at_ms)
            self._outbox.insert(connection, ItemKind.JOB, body)

        def done(committed: Future[None]) -> None:
            if committed.exception() is not None:
                self._clock.call_later(_RECORD_RETRY_S, lambda: self._record_end(live, state))
                return
            with self._lock:
                if self._live.get(live.name) is live:
                    del self._live[live.name]
            self._outbox.committed(committed)

        self._file.submit(work).add_done_callback(done)

    def _live_job(self, name: JobName) -> _Live | None:
        with self._lock:
            return self._live.get(name)

    def _found_running(self, key: CommandKey) -> pb.Job:
        live = self._live_job(name_of(key))
        if live is None:
            return job_message(key, JobState.RUNNING, 1, progress=JobProgress())
        # The newest driver's numbers count when the job comes to run.
        live.key = key
        return live.message()


def _refuse_cancelled(live: _Live) -> None:
    if live.cancelled.is_set():
        raise Conflict("job-cancelled", "cancelled before it began")


def _uncancellable() -> Future[Any]:
    """A future that a cancelled waiter cannot cancel: whoever completes it must not meet a closed one."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _forward(source: Future[pb.Job], target: Future[pb.Job]) -> None:
    error = source.exception()
    if error is None:
        target.set_result(source.result())
    else:
        target.set_exception(error)
