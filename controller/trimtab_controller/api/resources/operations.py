"""Operations as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.resources.common import Subject
from trimtab_controller.core.lifecycle import ENDED_STATES
from trimtab_controller.core.model import JournalEntry, Operation, OperationError
from trimtab_controller.services.operations_view import OperationView


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressResource:
    done_bytes: int
    total_bytes: int
    rate_bytes_s: int
    phase: str
    remaining_s: int
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorResource:
    kind: str
    code: str
    message: str
    context: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResource:
    step: str
    # do or undo.
    direction: str
    # succeeded or failed.
    outcome: str
    at: datetime
    error: ErrorResource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationResource:
    id: str
    kind: str
    # '' for the fleet's own.
    project: str
    subject: Subject
    state: str
    done: bool
    step: str
    waiting_for: str
    is_cancel_requested: bool
    attempts: int
    progress: ProgressResource | None
    error: ErrorResource | None
    result: dict[str, Any] | None
    actor: str
    request_id: str
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None
    # Only where one operation is asked for.
    steps: tuple[StepResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationAnswer:
    """What a long verb answers with."""

    operation: OperationResource


def render_operation(view: OperationView) -> OperationResource:
    return render(view.operation, project_name=view.project_name, journal=view.journal)


def render(operation: Operation, *, project_name: str, journal: tuple[JournalEntry, ...] = ()) -> OperationResource:
    return OperationResource(
        id=operation.id,
        kind=operation.kind,
        project=project_name,
        subject=Subject(id=operation.subject_id, name=operation.subject_name),
        state=operation.state.value,
        done=operation.state in ENDED_STATES,
        step=operation.step,
        waiting_for=operation.waiting_for,
        is_cancel_requested=operation.is_cancel_requested,
        attempts=operation.attempts,
        progress=_progress(operation.progress),
        error=_error(operation.error),
        result=dict(operation.result) if operation.result is not None else None,
        actor=operation.actor,
        request_id=operation.request_id,
        created_at=operation.created_at,
        updated_at=operation.updated_at,
        ended_at=operation.ended_at if operation.state in ENDED_STATES else None,
        steps=tuple(
            StepResource(
                step=entry.step,
                direction=entry.direction.value,
                outcome="succeeded" if entry.has_succeeded else "failed",
                at=entry.at,
                error=_error(entry.error),
            )
            for entry in journal
        ),
    )


def _error(error: OperationError | None) -> ErrorResource | None:
    if error is None:
        return None
    context = {name: str(value) for name, value in error.context.items()}
    return ErrorResource(kind=error.kind.value, code=error.code, message=error.message, context=context)


def _progress(progress: Mapping[str, Any] | None) -> ProgressResource | None:
    if progress is None:
        return None
    done, total = int(progress.get("done_bytes") or 0), int(progress.get("total_bytes") or 0)
    return ProgressResource(
        done_bytes=done,
        total_bytes=total,
        rate_bytes_s=int(progress.get("rate_bytes_s") or 0),
        phase=str(progress.get("phase") or ""),
        remaining_s=int(progress.get("remaining_s") or 0),
        percent=float(progress.get("percent") or (round(100 * done / total, 1) if total else 0.0)),
    )
