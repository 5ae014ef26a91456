"""Takes an agent's word about a long job: progress is shown, an end makes the waiting operation due.

The word only wakes: the driver asks the agent itself before it records an outcome, so that a forged or late update costs one
question. A host is heard only about operations that concern it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import LIVE_STATES
from trimtab_controller.core.model import Operation
from trimtab_controller.store import observations, operations
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound, PermissionDenied
from trimtab_protos.messages import JobProgress, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class JobUpdate:
    """A job as the outbox carries it."""

    operation_id: str
    subject_id: str
    step: str
    state: JobState
    progress: JobProgress


def record(session: Session, host_id: str, job: JobUpdate, now: datetime) -> bool:
    """Show the progress; return whether an operation was woken, so that the caller nudges after commit.

    PermissionDenied where the operation does not concern the host.
    """
    try:
        operation = operations.get(session, job.operation_id)
    except NotFound:  # ended and retired long ago; the agent may forget the job
        return False
    if operation.state not in LIVE_STATES:
        return False
    if not concerns_host(session, operation, host_id):
        raise PermissionDenied("job-foreign", f"{job.operation_id} does not concern this host", host_id=host_id)
    progress = progress_json(job.progress)
    if job.state is JobState.RUNNING:
        operations.note_progress(session, operation.id, progress)
        return False
    return operations.wake(session, operation.id, now, progress if any(progress.values()) else None)


def progress_json(progress: JobProgress) -> dict[str, Any]:
    return {
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "rate_bytes_s": progress.rate_bytes_s,
        "phase": progress.phase[:80],
        "remaining_s": progress.remaining_s,
    }


def concerns_host(session: Session, operation: Operation, host_id: str) -> bool:
    """Tell whether the operation's vm is held by the host, or its parameters or journal name the host."""
    holding = observations.holdings(session, [operation.subject_id]).get(operation.subject_id)
    if holding is not None and holding.known_epoch(host_id) is not None:
        return True
    if names(operation.params, host_id):
        return True
    return any(names(entry.result, host_id) for entry in operations.journal_of(session, operation.id))


def names(value: object, wanted: str) -> bool:
    """Tell whether a JSON document holds this string anywhere."""
    match value:
        case str():
            return value == wanted
        case Mapping():
            return any(names(one, wanted) for one in value.values())
        case list() | tuple():
            return any(names(one, wanted) for one in value)
    return False
