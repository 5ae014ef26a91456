"""Operations in SQL: acceptance, the claim of due rows, the journal, and the writes that a turn guards.

Whoever drives an operation holds (driver, turn); every write of a driver names both and changes nothing when either moved on
(`Fenced`). Rows survive everything but the database's disk; a Celery message is only a hint to look here.

Statements that every step of every operation runs are built once, below: to build one costs up to ten times its execution.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import ENDED_STATES, LIVE_STATES, OperationState
from trimtab_controller.core.model import JournalEntry, Operation, OperationError
from trimtab_controller.store import events, schema
from trimtab_controller.store.among import among_asked
from trimtab_controller.store.behind import IS_BEHIND
from trimtab_controller.store.rows import build
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import Direction

_LIVE = tuple(state.value for state in LIVE_STATES)
_ENDED = tuple(state.value for state in ENDED_STATES)
_table = schema.operation

_INSERT = _table.insert().returning(_table)
_BY_ID = sa.select(_table).where(_table.c.id == sa.bindparam("operation_id"))
_IS_CANCEL_REQUESTED = sa.select(_table.c.is_cancel_requested).where(_table.c.id == sa.bindparam("operation_id"))
_WRITE_BY_ID = _table.update().where(_table.c.id == sa.bindparam("operation_id"))
# As literals: a list of parameters is put into the statement's text anew at each execution.
_WRITE_LIVE = _WRITE_BY_ID.where(_table.c.state.in_([sa.literal_column(f"'{state}'") for state in _LIVE]))
_WAKE_MANY = _table.update().where(among_asked(_table.c.id, "operation_ids"), _table.c.state.in_(_LIVE))
_WRITE_HELD = _WRITE_LIVE.where(
    _table.c.driver == sa.bindparam("held_driver"), _table.c.turn == sa.bindparam("held_turn"), ~IS_BEHIND
).returning(_table.c.is_cancel_requested)
# Who woke the row while it was held wrote a later `next_run`: then it is due at once.
_GIVE_BACK_HELD = _WRITE_HELD.values(
    next_run=sa.case(
        (_table.c.next_run > sa.bindparam("held_next_run"), sa.bindparam("at", type_=_table.c.next_run.type)),
        else_=sa.bindparam("due", type_=_table.c.next_run.type),
    )
)
_CLAIM = _WRITE_BY_ID.values(
    state=sa.case((_table.c.state == OperationState.COMPENSATING.value, _table.c.state), else_=OperationState.RUNNING.value)
).returning(_table)
_IS_DUE = (
    _table.c.state.in_([sa.literal_column(f"'{state}'") for state in _LIVE]),
    _table.c.next_run <= sa.bindparam("at", type_=_table.c.next_run.type),
    sa.or_(_table.c.lease_until.is_(None), _table.c.lease_until <= sa.bindparam("at", type_=_table.c.next_run.type)),
)
_IS_DRIVEN: sa.Select[tuple[Any]] = (
    sa.select(sa.literal_column("1"))
    .select_from(_table)
    .where(
        _IS_DUE[0],
        _table.c.driver != "",
        _table.c.driver != sa.bindparam("but_by"),
        _table.c.lease_until > sa.bindparam("at", type_=_table.c.next_run.type),
    )
    .limit(1)
)
_IS_ANY_DUE: sa.Select[tuple[Any]] = sa.select(sa.literal_column("1")).select_from(_table).where(*_IS_DUE).limit(1)
_COUNT_DUE = sa.select(sa.func.count()).select_from(_table).where(*_IS_DUE)
_DUE = (
    sa.select(_table.c.id, _table.c.subject_id)
    .where(*_IS_DUE, ~IS_BEHIND)
    .order_by(_table.c.priority.desc(), _table.c.next_run)
    .limit(sa.bindparam("at_most", type_=sa.Integer()))
    .with_for_update(skip_locked=True)
)
_RAISE_TURN = (
    schema.turn.update()
    .where(schema.turn.c.subject_id == sa.bindparam("of_subject"))
    .values(value=schema.turn.c.value + 1)
    .returning(schema.turn.c.value)
)
_JOURNAL = (
    sa.select(schema.journal)
    .where(schema.journal.c.operation_id == sa.bindparam("operation_id"))
    .order_by(schema.journal.c.position)
)
_INSERT_TURN, _INSERT_ENTRY = schema.turn.insert(), schema.journal.insert()
_FREE_SLOTS = schema.slot.delete().where(schema.slot.c.operation_id == sa.bindparam("of_operation"))


def _states(states: Iterable[str]) -> list[sa.ColumnElement[str]]:
    return [sa.literal_column(f"'{state}'") for state in states]


# Plans of these: uq_operation_exclusive, ix_operation_subject.
_LOCKED = (_table.c.is_exclusive, _table.c.state.in_(_states((*_LIVE, OperationState.NEEDS_ATTENTION.value))))
_LOCKING = sa.select(_table).where(among_asked(_table.c.subject_id, "subject_ids"), *_LOCKED)
_LOCKING_ONE = sa.select(_table).where(_table.c.subject_id == sa.bindparam("subject"), *_LOCKED)
_LIVE_OF_KIND = (
    sa.select(_table)
    .where(
        _table.c.subject_id == sa.bindparam("subject"),
        _table.c.kind == sa.bindparam("of_kind"),
        _table.c.state.in_(_states(_LIVE)),
    )
    .limit(1)
)


class Fenced(Exception):
    """Another driver took the operation over, it was superseded, or the database is behind: stop at once and write nothing."""


def from_row(row: sa.Row[Any]) -> Operation:
    error = row._mapping["error"]
    return build(Operation, row, error=OperationError.from_json(error) if error else None)


def insert(
    session: Session,
    *,
    operation_id: str,
    kind: str,
    saga_version: int,
    subject_id: str,
    subject_name: str,
    project_id: str,
    is_exclusive: bool,
    params: Mapping[str, Any],
    actor: str,
    request_id: str,
    priority: int,
    deadline: datetime | None,
    now: datetime,
    next_run: datetime | None = None,
) -> Operation:
    """Insert a queued operation, due at `next_run` (None: now). Conflict where another exclusive one on the subject is live."""
    values = {
        "id": operation_id,
        "kind": kind,
        "saga_version": saga_version,
        "project_id": project_id,
        "subject_id": subject_id,
        "subject_name": subject_name,
        "is_exclusive": is_exclusive,
        "state": OperationState.QUEUED.value,
        "params": dict(params),
        "priority": priority,
        "next_run": next_run or now,
        "deadline": deadline,
        "actor": actor,
        "request_id": request_id,
        "created_at": now,
        "updated_at": now,
    }
    try:
        with session.begin_nested():
            row = session.execute(_INSERT, values).one()
    except IntegrityError as error:
        live = live_exclusive(session, subject_id)
        if live is None:
            raise
        raise Conflict(
            "operation-in-progress",
            f"{subject_name} is busy: {live.kind} is {live.state.value} ({live.id}); "
            f"wait with `trimtab op wait {live.id}` or end it with `trimtab op cancel {live.id}`",
            operation_id=live.id,
            operation_kind=live.kind,
        ) from error
    return from_row(row)


def get(session: Session, operation_id: str) -> Operation:
    row = session.execute(_BY_ID, {"operation_id": operation_id}).one_or_none()
    if row is None:
        raise NotFound("operation-not-found", f"no operation {operation_id}")
    return from_row(row)


def live_of(session: Session, subject_id: str) -> tuple[Operation, ...]:
    """Return the operations on the subject that have not ended, exclusive or not."""
    query = sa.select(_table).where(_table.c.subject_id == subject_id, _table.c.state.in_(_LIVE))
    return tuple(from_row(row) for row in session.execute(query))


def live_exclusive(session: Session, subject_id: str) -> Operation | None:
    """Return the operation that locks the subject, if there is one (one that needs attention still does)."""
    row = session.execute(_LOCKING_ONE, {"subject": subject_id}).one_or_none()
    return from_row(row) if row else None


def live_background(session: Session, subject_id: str, kind: str) -> Operation | None:
    """Return the live operation of this kind that runs beside whatever locks the subject."""
    row = session.execute(_LIVE_OF_KIND, {"subject": subject_id, "of_kind": kind}).one_or_none()
    return from_row(row) if row else None


def page(
    session: Session,
    *,
    limit: int,
    before_id: str = "",
    project_ids: Sequence[str] | None = None,
    kind: str = "",
    state: str = "",
    subject_id: str = "",
    is_done: bool | None = None,
) -> tuple[Operation, ...]:
    """Return up to `limit` operations, newest first, with ids below `before_id`."""
    query = sa.select(_table).order_by(_table.c.id.desc()).limit(limit)
    if before_id:
        query = query.where(_table.c.id < before_id)
    if project_ids is not None:
        query = query.where(_table.c.project_id.in_(project_ids))
    for column, value in ((_table.c.kind, kind), (_table.c.state, state), (_table.c.subject_id, subject_id)):
        if value:
            query = query.where(column == value)
    if is_done is not None:
        query = query.where(_table.c.state.in_(_ENDED) if is_done else _table.c.state.not_in(_ENDED))
    return tuple(from_row(row) for row in session.execute(query))


def live_by_subject(session: Session, subject_ids: Sequence[str]) -> dict[str, Operation]:
    """Return the locking operation of each of these subjects that has one."""
    found = session.execute(_LOCKING, {"subject_ids": list(subject_ids)})
    return {row.subject_id: from_row(row) for row in found}


# --- driving -----------------------------------------------------------------------------------------------------------


def count_due(session: Session, now: datetime) -> int:
    """Return how many operations could be driven now. Plan: range scan of ix_operation_due."""
    return int(session.execute(_COUNT_DUE, {"at": now}).scalar_one())


def is_any_due(session: Session, now: datetime) -> bool:
    """Tell whether a driver that is free now would find work. Plan: scan of ix_operation_due, up to the first."""
    return session.execute(_IS_ANY_DUE, {"at": now}).one_or_none() is not None


def is_any_driven(session: Session, now: datetime, *, but_by: str) -> bool:
    """Tell whether a driver other than `but_by` holds an operation now. Plan: scan of ix_operation_due, up to the first."""
    return session.execute(_IS_DRIVEN, {"at": now, "but_by": but_by}).one_or_none() is not None


def claim_due(session: Session, *, driver: str, now: datetime, lease_s: float, limit: int) -> tuple[Operation, ...]:
    """Take up to `limit` due operations and raise their subjects' turns; the caller drives them within `lease_s`."""
    claimed = []
    for row in session.execute(_DUE, {"at": now, "at_most": limit}).all():
        turn = raise_turn(session, row.subject_id)
        lease_until = now + timedelta(seconds=lease_s)
        values = {"driver": driver, "turn": turn, "lease_until": lease_until, "updated_at": now}
        claimed.append(from_row(session.execute(_CLAIM, {"operation_id": row.id, **values}).one()))
    return tuple(claimed)


def raise_turn(session: Session, subject_id: str) -> int:
    """Return the subject's next turn; only grows, survives the subject."""
    raised = session.execute(_RAISE_TURN, {"of_subject": subject_id}).scalar_one_or_none()
    if raised is None:
        session.execute(_INSERT_TURN, {"subject_id": subject_id, "value": 1})
        return 1
    return int(raised)


def raise_turn_to(session: Session, subject_id: str, at_least: int) -> None:
    """Bring the subject's turn to at least this; it never falls."""
    value = raise_turn(session, subject_id)
    if value < at_least:
        session.execute(schema.turn.update().where(schema.turn.c.subject_id == subject_id).values(value=at_least))


def journal_of(session: Session, operation_id: str) -> tuple[JournalEntry, ...]:
    """Return the journal, oldest first."""
    rows = session.execute(_JOURNAL, {"operation_id": operation_id})
    return tuple(
        JournalEntry(
            position=row.position,
            step=row.step,
            direction=Direction(row.direction),
            has_succeeded=row.outcome == "succeeded",
            turn=row.turn,
            result=row.result or {},
            error=OperationError.from_json(row.error) if row.error else None,
            at=row.at,
        )
        for row in rows
    )


def is_cancel_requested(session: Session, operation_id: str) -> bool:
    """Tell whether a cancel was asked for by now."""
    return bool(session.execute(_IS_CANCEL_REQUESTED, {"operation_id": operation_id}).scalar_one())


def append_journal(
    session: Session,
    held: Operation,
    *,
    position: int,
    step: str,
    direction: Direction,
    result: Mapping[str, Any] | None,
    error: OperationError | None,
    now: datetime,
) -> JournalEntry:
    """Record the outcome of a step and return the entry; the caller has fenced the transaction with `hold`."""
    values = {
        "operation_id": held.id,
        "position": position,
        "step": step,
        "direction": direction.value,
        "outcome": "failed" if error else "succeeded",
        "turn": held.turn,
        "result": dict(result) if result is not None else None,
        "error": error.as_json() if error else None,
        "at": now,
    }
    session.execute(_INSERT_ENTRY, values)
    return JournalEntry(
        position=position,
        step=step,
        direction=direction,
        has_succeeded=error is None,
        turn=held.turn,
        result=result or {},
        error=error,
        at=now,
    )


def hold(session: Session, held: Operation, *, now: datetime, lease_s: float, **changes: Any) -> bool:
    """Fence this transaction: renew the driver's lease, write `changes`, return whether a cancel was asked for by now.

    Raises Fenced if the operation moved on.
    """
    return _write_held(session, held, _WRITE_HELD, lease_until=now + timedelta(seconds=lease_s), updated_at=now, **changes)


def release(
    session: Session, held: Operation, *, state: OperationState, next_run: datetime, now: datetime, **changes: Any
) -> None:
    """Give the row back, due at `next_run`, unless someone woke it meanwhile: an earlier `next_run` of theirs wins."""
    freed = {"state": state.value, "driver": "", "lease_until": now, "updated_at": now, **changes}
    _write_held(session, held, _GIVE_BACK_HELD, held_next_run=held.next_run, at=now, due=next_run, **freed)


def _write_held(session: Session, held: Operation, statement: sa.Update, **values: Any) -> bool:
    fence = {"operation_id": held.id, "held_driver": held.driver, "held_turn": held.turn}
    row = session.execute(statement, {**fence, **values}).one_or_none()
    if row is None:
        raise Fenced(held.id)
    return bool(row.is_cancel_requested)


def close(
    session: Session,
    held: Operation,
    *,
    state: OperationState,
    now: datetime,
    error: OperationError | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    """End the operation, tell watchers, and give back its slots; the caller has fenced the transaction."""
    values = {
        "state": state.value,
        "driver": "",
        "lease_until": None,
        "waiting_for": "",
        "error": error.as_json() if error else None,
        "result": dict(result) if result else None,
        "ended_at": now if state in ENDED_STATES else None,
        "updated_at": now,
    }
    session.execute(_WRITE_BY_ID, {"operation_id": held.id, **values})
    if state is not OperationState.NEEDS_ATTENTION:
        session.execute(_FREE_SLOTS, {"of_operation": held.id})
    reason = f": {error.message}" if error else ""
    events.append(
        session,
        kind=f"operation.{state.value}",
        project_id=held.project_id,
        subject_id=held.subject_id,
        operation_id=held.id,
        actor=held.actor,
        message=f"{held.kind} of {held.subject_name} {state.value.replace('_', ' ')}{reason}",
        context=error.as_json() if error else {},
        now=now,
    )


# --- from outside the driver ---------------------------------------------------------------------------------------------


def wake(session: Session, operation_id: str, now: datetime, progress: Mapping[str, Any] | None = None) -> bool:
    """Make a live operation due now (a job ended, the leader decided); False where it has ended."""
    values: dict[str, Any] = {"next_run": now}
    if progress is not None:
        values["progress"] = dict(progress)
    changed = session.execute(_WRITE_LIVE, {"operation_id": operation_id, **values})
    return getattr(changed, "rowcount", 0) == 1


def wake_many(session: Session, operation_ids: Sequence[str], now: datetime) -> None:
    """Make these operations due now, those of them that are live."""
    if operation_ids:
        session.execute(_WAKE_MANY, {"operation_ids": list(operation_ids), "next_run": now})


def note_progress(session: Session, operation_id: str, progress: Mapping[str, Any]) -> None:
    """Show progress without waking the operation."""
    session.execute(_WRITE_LIVE, {"operation_id": operation_id, "progress": dict(progress)})


def request_cancel(session: Session, operation_id: str, *, actor: str, now: datetime) -> Operation:
    """Ask a live operation to end; it is undone unless it is past its pivot. Conflict where it has ended."""
    operation = get(session, operation_id)
    changed = session.execute(
        _table.update()
        .where(_table.c.id == operation_id, _table.c.state.in_(_LIVE))
        .values(is_cancel_requested=True, next_run=now, updated_at=now)
    )
    if getattr(changed, "rowcount", 0) != 1:
        raise Conflict("operation-ended", f"{operation_id} is already {operation.state.value}", state=operation.state.value)
    events.append(
        session,
        kind="operation.cancel_requested",
        project_id=operation.project_id,
        subject_id=operation.subject_id,
        operation_id=operation_id,
        actor=actor,
        message=f"cancel of {operation.kind} of {operation.subject_name} requested",
        now=now,
    )
    return get(session, operation_id)


def retry(session: Session, operation_id: str, *, actor: str, now: datetime) -> Operation:
    """Let an operation that needs attention go on where it stopped. Conflict in any other state."""
    operation = get(session, operation_id)
    undoing = _is_undoing(journal_of(session, operation_id))
    state = OperationState.COMPENSATING if undoing else OperationState.RUNNING
    changed = session.execute(
        _table.update()
        .where(_table.c.id == operation_id, _table.c.state == OperationState.NEEDS_ATTENTION.value)
        .values(
            state=state.value, attempts=0, next_run=now, lease_until=None, driver="", error=None, ended_at=None, updated_at=now
        )
    )
    if getattr(changed, "rowcount", 0) != 1:
        raise Conflict(
            "operation-not-stuck", f"{operation_id} is {operation.state.value}; only one that needs attention is retried"
        )
    events.append(
        session,
        kind="operation.retried",
        project_id=operation.project_id,
        subject_id=operation.subject_id,
        operation_id=operation_id,
        actor=actor,
        message=f"{operation.kind} of {operation.subject_name} is tried again",
        now=now,
    )
    return get(session, operation_id)


def _is_undoing(entries: Sequence[JournalEntry]) -> bool:
    """Tell whether the operation was going back: a step failed, and was not found to have taken place after all."""
    failed = {entry.step: entry.position for entry in entries if not entry.has_succeeded}
    for entry in entries:
        if entry.direction is Direction.DO and entry.has_succeeded and entry.position > failed.get(entry.step, entry.position):
            del failed[entry.step]
    return bool(failed)


def supersede(
    session: Session, subject_id: str, *, by: str, now: datetime, result_of: Callable[[Operation], Mapping[str, Any] | None]
) -> Operation | None:
    """Close the subject's live exclusive operation so that `by` (delete, forced stop, recovery) may take over.

    It has failed, except where it has a `result_of` already: then it is done.

    What it left half-done is now the successor's to clean: claims and the migration row stay as they are. The raised turn makes
    a command of the old driver that is still under way too old for the agents.
    """
    live = live_exclusive(session, subject_id)
    if live is None:
        return None
    raise_turn(session, subject_id)
    result = result_of(live)
    if result is not None:
        close(session, live, state=OperationState.DONE, now=now, result=result)
    else:
        error = OperationError.of(Conflict("superseded", f"superseded by {by}"))
        close(session, live, state=OperationState.FAILED, now=now, error=error)
    session.execute(schema.placement_request.delete().where(schema.placement_request.c.operation_id == live.id))
    return live


def delete_ended_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` operations that ended before `at`, with their journals; return how many."""
    old = session.scalars(sa.select(_table.c.id).where(_table.c.ended_at < at).order_by(_table.c.ended_at).limit(limit)).all()
    for table in (schema.journal, schema.placement_request, schema.slot):
        session.execute(table.delete().where(table.c.operation_id.in_(old)))
    session.execute(_table.delete().where(_table.c.id.in_(old)))
    return len(old)
