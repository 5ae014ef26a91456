"""Jobs: limits, ends that are told, cancels, and what a restarted agent does with what it finds."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.factories import command_key
from tests.unit.agent.manual_clock import ManualClock
from tests.unit.agent.waiting import until_now
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.jobs import JobKind, Jobs
from trimtab_agent.journal import JournalFile
from trimtab_agent.lease import LeaseState
from trimtab_agent.outbox import Outbox
from trimtab_agent.workers import WorkerPool
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2
from trimtab_protos.errors import Conflict, InvalidRequest, Unavailable
from trimtab_protos.messages import CommandKey, JobProgress, MigrationResult

RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    command_pb2.JOB_STATE_RUNNING,
    command_pb2.JOB_STATE_SUCCEEDED,
    command_pb2.JOB_STATE_FAILED,
    command_pb2.JOB_STATE_CANCELLED,
)


class Script:
    """What the verb behind the jobs does: each call waits for its `Future`, or for a cancel."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.ends: dict[bytes, Future[MigrationResult]] = {}
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def end_of(self, request: bytes) -> Future[MigrationResult]:
        with self._lock:
            return self.ends.setdefault(request, Future())

    def __call__(self, request: bytes, stamp: Stamp, control: JobControl) -> MigrationResult:
        with self._lock:
            self.calls.append(request)
        control.report(JobProgress(done_bytes=1, total_bytes=2, phase="moving"))
        end = self.end_of(request)
        while not end.done():
            if self.is_over.is_set():
                raise Unavailable("agent-died", "the process of this thread is gone")
            if control.cancelled.wait(0.005):
                raise Conflict("job-cancelled", "cancelled")
        return end.result()


DONE = MigrationResult(total_ms=5, downtime_ms=1, transferred_bytes=7)


class Bench:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()
        self.lease = LeaseState(1, 1e12, is_live=True)
        self.script = Script()
        self.open("inc-1")

    def open(self, incarnation: str) -> None:
        self.file = JournalFile(self.path)
        self.outbox = Outbox(self.file, "host-1")
        self.pool = WorkerPool("jobs", threads=8)
        self.jobs = Jobs(
            self.file,
            "host-1",
            incarnation=incarnation,
            outbox=self.outbox,
            pool=self.pool,
            runners={JobKind.IMPORT: self.script, JobKind.MIGRATION: self.script},
            lease=lambda: self.lease,
            clock=self.clock,
        )

    def restart(self, incarnation: str = "inc-1") -> None:
        """The agent dies and starts again: threads of the old one are gone."""
        self.jobs.detach()
        self.script.is_over.set()
        until_now(lambda: self.pool.unfinished == 0)
        self.file.close()
        self.script = Script()
        self.open(incarnation)

    def start(self, key: CommandKey, *, kind: JobKind = JobKind.IMPORT, request: bytes = b"r") -> pb.Job:
        return self.jobs.start(key, kind, request).result()

    def get(self, key: CommandKey) -> pb.Job:
        return self.jobs.get((key.operation_id, key.step, key.direction.value)).result()

    def wait(self, key: CommandKey, state: int) -> pb.Job:
        """Wait for a state; for an end, until it is on disk."""
        until_now(lambda: self.get(key).state == state, what=f"job state {state}")
        name = (key.operation_id, key.step)
        if state != RUNNING:
            until_now(lambda: name not in {(job.operation_id, job.step) for job in self.jobs.running()}, what="the end on disk")
        return self.get(key)

    def told(self) -> list[pb.Job]:
        self.file.submit(lambda _connection: None).result()
        return [pb.Job.FromString(item.body) for item in self.outbox.read(after=0, limit=100).result()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "journal.db")
    yield bench
    bench.jobs.detach()
    bench.script.is_over.set()
    until_now(lambda: bench.pool.unfinished == 0)
    bench.pool.close()
    bench.file.close()


def job_key(**given: Any) -> CommandKey:
    return command_key(**{"step": "move", **given})


def test_a_job_runs_once_under_its_key_and_its_end_goes_into_the_outbox(bench: Bench) -> None:
    key = job_key()
    begun = bench.start(key)
    assert begun.state == RUNNING
    until_now(lambda: bench.get(key).progress.phase == "moving")
    assert bench.start(key).state == RUNNING
    bench.script.end_of(b"r").set_result(DONE)
    ended = bench.wait(key, SUCCEEDED)
    assert ended.migration.transferred_bytes == 7
    assert ended.sequence > begun.sequence
    assert bench.script.calls == [b"r"]
    assert bench.told() == [ended]
    assert bench.start(key) == ended


def test_a_class_of_jobs_has_its_limit_and_the_rest_waits_its_turn(bench: Bench) -> None:
    keys = [job_key() for _ in range(4)]
    for number, key in enumerate(keys):
        bench.start(key, request=b"%d" % number)
    until_now(lambda: len(bench.script.calls) == 2)
    assert bench.get(keys[2]).progress.phase == "queued"
    assert bench.jobs.counts()[("import", "queued")] == 2
    other = job_key()
    bench.start(other, kind=JobKind.MIGRATION, request=b"m")
    until_now(lambda: b"m" in bench.script.calls, what="a job of another class")
    bench.script.end_of(b"0").set_result(DONE)
    until_now(lambda: b"2" in bench.script.calls, what="the next in the queue")
    assert b"3" not in bench.script.calls


def test_a_running_job_is_cancelled_when_its_verb_ends(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    until_now(lambda: bench.script.calls == [b"r"])
    assert bench.jobs.cancel(key).result().state in {RUNNING, CANCELLED}
    ended = bench.wait(key, CANCELLED)
    assert ended.error.code == "job-cancelled"
    assert bench.start(key) == ended


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(bench: Bench) -> None:
    keys = [job_key() for _ in range(3)]
    for number, key in enumerate(keys):
        bench.start(key, request=b"%d" % number)
    assert bench.jobs.cancel(keys[2]).result().state == CANCELLED
    bench.script.end_of(b"0").set_result(DONE)
    bench.wait(keys[0], SUCCEEDED)
    assert b"2" not in bench.script.calls


def test_a_cancel_that_came_too_late_is_a_success(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    bench.script.end_of(b"r").set_result(DONE)
    bench.wait(key, SUCCEEDED)
    assert bench.jobs.cancel(key).result().state == SUCCEEDED


def test_a_final_failure_is_found_for_ever(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    bench.script.end_of(b"r").set_exception(InvalidRequest("image-checksum-mismatch", "another content"))
    failed = bench.wait(key, FAILED)
    assert failed.error.code == "image-checksum-mismatch"
    assert bench.start(key) == failed
    assert bench.start(key) == failed
    assert bench.script.calls == [b"r"]


def test_a_failure_that_may_pass_is_told_once_and_then_begun_anew(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    bench.script.end_of(b"r").set_exception(Unavailable("peer-down", "no answer"))
    failed = bench.wait(key, FAILED)
    del bench.script.ends[b"r"]
    assert bench.start(key) == failed
    again = bench.start(key)
    assert again.state == RUNNING
    assert again.sequence > failed.sequence
    until_now(lambda: bench.script.calls == [b"r", b"r"])


def test_a_migration_that_failed_never_begins_anew_by_itself(bench: Bench) -> None:
    """Its target may have died and come back: whoever drives it looks first where the guest is."""
    key = job_key()
    bench.start(key, kind=JobKind.MIGRATION)
    bench.script.end_of(b"r").set_exception(Unavailable("peer-down", "the target does not answer"))
    failed = bench.wait(key, FAILED)
    del bench.script.ends[b"r"]
    assert [bench.start(key, kind=JobKind.MIGRATION) for _ in range(3)] == [failed] * 3
    assert bench.script.calls == [b"r"]


def test_a_defect_ends_the_job_as_failed(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    bench.script.end_of(b"r").set_exception(RuntimeError("secret"))
    failed = bench.wait(key, FAILED)
    assert failed.error.code == "job-broke"
    assert "secret" not in failed.error.message


def test_a_restarted_agent_runs_again_what_was_running(bench: Bench) -> None:
    key, queued = job_key(), [job_key() for _ in range(2)]
    before = bench.start(key)
    for number, each in enumerate(queued):
        bench.start(each, request=b"q%d" % number)
    until_now(lambda: len(bench.script.calls) == 2)
    bench.restart()
    assert bench.jobs.resume().result() == 3
    until_now(lambda: len(bench.script.calls) == 2)
    assert bench.get(key).sequence > before.sequence
    for request in (b"r", b"q0", b"q1"):
        bench.script.end_of(request).set_result(DONE)
    for each in (key, *queued):
        bench.wait(each, SUCCEEDED)


def test_a_cancel_survives_the_restart(bench: Bench) -> None:
    key = job_key()
    bench.script.end_of(b"r")
    bench.start(key)
    until_now(lambda: bench.script.calls == [b"r"])
    bench.file.submit(lambda connection: connection.execute("UPDATE job SET is_cancel_asked = 1")).result()
    bench.restart()
    bench.jobs.resume().result()
    assert bench.wait(key, CANCELLED).error.code == "job-cancelled"
    assert bench.script.calls == []


def test_jobs_of_before_a_boot_have_failed_and_may_begin_anew(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    until_now(lambda: bench.script.calls == [b"r"])
    bench.restart("inc-2")
    bench.jobs.resume().result()
    failed = bench.wait(key, FAILED)
    assert failed.error.code == "host-rebooted"
    assert [job.state for job in bench.told()] == [FAILED]
    assert bench.start(key) == failed
    assert bench.start(key).state == RUNNING


def test_a_migration_does_not_begin_without_a_lease(bench: Bench) -> None:
    key = job_key()
    bench.lease = LeaseState(1, 0.0, is_live=False)
    bench.start(key, kind=JobKind.MIGRATION)
    until_now(lambda: bench.get(key).progress.phase == "waiting for the host's lease")
    assert bench.script.calls == []
    bench.lease = LeaseState(2, 1e12, is_live=True)
    until_now(lambda: bench.script.calls == [b"r"])


def test_a_migration_does_not_begin_once_another_driver_took_the_vm_over(bench: Bench) -> None:
    key = job_key(turn=3)
    bench.lease = LeaseState(1, 0.0, is_live=False)
    bench.start(key, kind=JobKind.MIGRATION)
    bench.file.submit(
        lambda connection: connection.execute("INSERT INTO subject VALUES ('host-1', ?, 4, 1, 0)", (key.subject_id,))
    ).result()
    bench.lease = LeaseState(1, 1e12, is_live=True)
    assert bench.wait(key, FAILED).error.code == "job-superseded"
    assert bench.script.calls == []
    assert bench.start(key).state == FAILED, "the driver that was overtaken gets nothing"
    bench.start(replace(key, turn=4))
    until_now(lambda: bench.script.calls == [b"r"])


def test_a_job_is_listed_for_an_hour_after_its_end_and_kept_for_a_week(bench: Bench) -> None:
    key = job_key()
    bench.start(key)
    bench.script.end_of(b"r").set_result(DONE)
    until_now(lambda: len(bench.told()) == 1, what="the end on disk")
    assert len(bench.jobs.list_recent().result()) == 1
    bench.clock.advance(3601)
    assert bench.jobs.list_recent().result() == []
    assert bench.jobs.prune().result() == 0
    assert bench.get(key).state == SUCCEEDED
    bench.clock.advance(8 * 24 * 3600)
    assert bench.jobs.prune().result() == 1


def test_an_end_that_cannot_be_written_is_kept_in_memory_and_written_later(bench: Bench) -> None:
    import sqlite3

    key = job_key()
    bench.start(key)
    until_now(lambda: bench.script.calls == [b"r"])
    bench.file.submit(lambda connection: connection.execute("PRAGMA busy_timeout = 1")).result()
    blocker = sqlite3.connect(bench.path, timeout=0)
    blocker.execute("BEGIN IMMEDIATE")
    bench.script.end_of(b"r").set_result(DONE)
    until_now(lambda: any(job.state == SUCCEEDED for job in bench.jobs.running()))
    until_now(lambda: bench.pool.unfinished == 0)
    with pytest.raises(Unavailable):  # behind the job's own attempt in the writer's queue
        bench.file.submit(lambda _connection: None).result()
    blocker.rollback()
    assert bench.told() == []

    def is_told() -> bool:
        bench.clock.advance(6)
        return len(bench.told()) == 1

    until_now(is_told, what="the second attempt")
    assert bench.get(key).state == SUCCEEDED
