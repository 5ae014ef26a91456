"""The rows of jobs in the journal, and the message that tells of one. Functions take the connection of the writer's transaction."""

import sqlite3
from dataclasses import dataclass

from trimtab_protos import status
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import backup_pb2, command_pb2, storage_pb2
from trimtab_protos.backup_messages import PruneResult
from trimtab_protos.codec import enum_number, to_proto
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import (
    BackupSummary,
    CommandKey,
    Direction,
    ImageResult,
    JobProgress,
    JobState,
    LayerResult,
    MigrationResult,
    RestoreResult,
    VerifyResult,
)

JobResult = ImageResult | MigrationResult | BackupSummary | RestoreResult | VerifyResult | PruneResult | LayerResult
JobName = tuple[str, str, str]
"""Operation, step, direction."""

SUPERSEDED = "job-superseded"
"""A driver overtook the one that asked, before the job began."""

_COLUMNS = (
    "operation_id, step, direction, subject_id, turn, epoch, incarnation, kind, request, state, is_cancel_asked, was_told,"
    " sequence, outcome"
)
_WHERE_NAME = " WHERE agent_id = ? AND operation_id = ? AND step = ? AND direction = ?"


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as it is on disk."""

    key: CommandKey
    incarnation: str
    kind: str
    request: bytes
    state: JobState
    is_cancel_asked: bool
    was_told: bool
    """A start has answered with this end."""
    sequence: int
    outcome: bytes
    """The serialised job at its end."""

    def message(self) -> pb.Job:
        if self.state is not JobState.RUNNING:
            return pb.Job.FromString(self.outcome)
        return job_message(self.key, self.state, self.sequence, progress=JobProgress())

    @property
    def has_failed_for_now(self) -> bool:
        """The error was one that may go away by itself."""
        return self.state is JobState.FAILED and self._error().retryable

    def gave_way_to(self, key: CommandKey) -> bool:
        """It was accepted from a driver that another had overtaken before it began, and did nothing: that other one asks now."""
        is_later = key.turn > self.key.turn
        return is_later and self.state is JobState.FAILED and self._error().code == SUPERSEDED

    def _error(self) -> TrimtabError:
        return status.from_detail(pb.Job.FromString(self.outcome).error)


class JobRows:
    """The rows of one agent."""

    def __init__(self, agent_id: str) -> None:
        self._agent_id = agent_id

    def find(self, connection: sqlite3.Connection, name: JobName) -> JobRow | None:
        row = connection.execute(f"SELECT {_COLUMNS} FROM job{_WHERE_NAME}", (self._agent_id, *name)).fetchone()  # noqa: S608 constants
        return _read(row) if row else None

    def recent(self, connection: sqlite3.Connection, *, since_ms: int) -> list[JobRow]:
        """Return the running ones and those that ended since then."""
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM job WHERE agent_id = ? AND (state = 'running' OR at_ms >= ?)",  # noqa: S608 constants
            (self._agent_id, since_ms),
        )
        return [_read(row) for row in rows]

    def running(self, connection: sqlite3.Connection) -> list[JobRow]:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM job WHERE agent_id = ? AND state = 'running'",  # noqa: S608 constants
            (self._agent_id,),
        )
        return [_read(row) for row in rows]

    def begin(
        self,
        connection: sqlite3.Connection,
        key: CommandKey,
        *,
        kind: str,
        request: bytes,
        incarnation: str,
        sequence: int,
        at_ms: int,
    ) -> None:
        row = (self._agent_id, *name_of(key), key.subject_id, key.turn, key.epoch, incarnation, kind, request, sequence, at_ms)
        connection.execute("INSERT OR REPLACE INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'running', 0, 0, ?, x'', ?)", row)

    def set(self, connection: sqlite3.Connection, name: JobName, **columns: int | str | bytes) -> None:
        assignments = ", ".join(f"{column} = ?" for column in columns)
        connection.execute(
            f"UPDATE job SET {assignments}{_WHERE_NAME}",  # noqa: S608 names of columns, from our own calls
            (*columns.values(), self._agent_id, *name),
        )

    def turns(self, connection: sqlite3.Connection, key: CommandKey) -> tuple[int, int]:
        """Return the highest turn of the subject and the job's own."""
        (highest,) = connection.execute(
            "SELECT coalesce(max(turn), 0) FROM subject WHERE agent_id = ? AND subject_id = ?", (self._agent_id, key.subject_id)
        ).fetchone()
        row = self.find(connection, name_of(key))
        return int(highest), row.key.turn if row else 0

    def prune(self, connection: sqlite3.Connection, *, before_ms: int) -> int:
        return connection.execute(
            "DELETE FROM job WHERE agent_id = ? AND state <> 'running' AND at_ms < ?", (self._agent_id, before_ms)
        ).rowcount


def name_of(key: CommandKey) -> JobName:
    return key.operation_id, key.step, key.direction.value


def job_message(
    key: CommandKey,
    state: JobState,
    sequence: int,
    *,
    progress: JobProgress,
    result: JobResult | None = None,
    error: TrimtabError | None = None,
) -> pb.Job:
    enums = command_pb2.DESCRIPTOR.enum_types_by_name
    message = pb.Job(
        operation_id=key.operation_id,
        step=key.step,
        direction=enum_number(enums["Direction"], key.direction),  # type: ignore[arg-type]
        state=enum_number(enums["JobState"], state),  # type: ignore[arg-type]
        progress=to_proto(progress, pb.JobProgress),
        sequence=sequence,
        subject_id=key.subject_id,
    )
    if error is not None:
        message.error.CopyFrom(status.to_detail(error))
    match result:
        case ImageResult():
            message.image.CopyFrom(to_proto(result, storage_pb2.ImageResult))
        case MigrationResult():
            message.migration.CopyFrom(to_proto(result, pb.MigrationResult))
        case BackupSummary():
            message.backup.CopyFrom(to_proto(result, backup_pb2.BackupSummary))
        case RestoreResult():
            message.restore.CopyFrom(to_proto(result, backup_pb2.RestoreResult))
        case VerifyResult():
            message.verify.CopyFrom(to_proto(result, backup_pb2.VerifyResult))
        case PruneResult():
            message.prune.CopyFrom(to_proto(result, backup_pb2.PruneResult))
        case LayerResult():
            message.layers.CopyFrom(to_proto(result, storage_pb2.LayerResult))
        case None:
            pass
    return message


def _read(row: tuple[object, ...]) -> JobRow:
    operation_id, step, direction, subject_id, turn, epoch, incarnation, kind, request, state, asked, told, sequence, outcome = (
        row
    )
    key = CommandKey(
        operation_id=str(operation_id),
        step=str(step),
        direction=Direction(str(direction)),
        subject_id=str(subject_id),
        turn=int(str(turn)),
        epoch=int(str(epoch)),
    )
    assert isinstance(request, bytes)
    assert isinstance(outcome, bytes)
    return JobRow(
        key, str(incarnation), str(kind), request, JobState(str(state)), bool(asked), bool(told), int(str(sequence)), outcome
    )
