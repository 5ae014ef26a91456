"""Operations as users see them: lists, one with its journal, cancel and retry."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Actor, JournalEntry, Operation, Role
from trimtab_controller.core.model.placement import DecisionRow
from trimtab_controller.services.authorise import require_object
from trimtab_controller.store import keyset, lookup, operation_listing, operations, placements, schema
from trimtab_protos.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationView:
    operation: Operation
    # '' for the fleet's own.
    project_name: str
    # Only where one operation is asked for.
    journal: tuple[JournalEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    view: OperationView
    # The placement it led to or was refused by; None where it places nothing or the decision is no longer kept.
    decision: DecisionRow | None


def views(session: Session, found: Sequence[Operation]) -> tuple[OperationView, ...]:
    names = lookup.names(session, schema.project, {one.project_id for one in found})
    return tuple(OperationView(operation=one, project_name=names.get(one.project_id, "")) for one in found)


def page(
    session: Session, page: keyset.Page, *, project_ids: Sequence[str] | None
) -> tuple[tuple[OperationView, ...], tuple[str, str] | None]:
    found, next_after = operation_listing.page(session, page, project_ids=project_ids)
    return views(session, found), next_after


def find(session: Session, operation_id: str, *, actor: Actor, role: Role = Role.VIEWER) -> Operation:
    """Return the operation. NotFound where the actor may not know of it, PermissionDenied where the role is too low."""
    missing = NotFound("operation-not-found", f"there is no operation {operation_id}", operation_id=operation_id)
    try:
        operation = operations.get(session, operation_id)
    except NotFound as error:
        raise missing from error
    require_object(actor, role, operation.project_id, missing=missing)
    return operation


def get(session: Session, operation_id: str, *, actor: Actor) -> OperationView:
    """Return the operation with its journal."""
    operation = find(session, operation_id, actor=actor)
    names = lookup.names(session, schema.project, [operation.project_id])
    return OperationView(
        operation=operation,
        project_name=names.get(operation.project_id, ""),
        journal=operations.journal_of(session, operation_id),
    )


def explain(session: Session, operation_id: str, *, actor: Actor) -> Explanation:
    view = get(session, operation_id, actor=actor)
    return Explanation(view=view, decision=placements.decision_of_operation(session, operation_id))


def cancel(session: Session, operation_id: str, *, actor: Actor, now: datetime) -> OperationView:
    """Ask a live operation to end. Conflict where it has ended."""
    find(session, operation_id, actor=actor, role=Role.OPERATOR)
    return views(session, (operations.request_cancel(session, operation_id, actor=actor.name, now=now),))[0]


def retry(session: Session, operation_id: str, *, actor: Actor, now: datetime) -> OperationView:
    """Let an operation that needs attention go on. Conflict in any other state."""
    find(session, operation_id, actor=actor, role=Role.OPERATOR)
    return views(session, (operations.retry(session, operation_id, actor=actor.name, now=now),))[0]
