"""Requests for placement and the decisions about them."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model.placement import DecisionRow, PlacementAsk
from trimtab_controller.release import RELEASE
from trimtab_controller.store import schema
from trimtab_controller.store.many import ManyUpdate
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NoCapacity

_request = schema.placement_request

_INSERT = _request.insert()
_OF_OPERATION = sa.select(_request).where(_request.c.operation_id == sa.bindparam("of_operation"))
_SETTLE = _request.update().where(_request.c.operation_id == sa.bindparam("of_operation"), _request.c.state == "pending")
_IS_ANY_PENDING: sa.Select[tuple[Any]] = (
    sa.select(sa.literal_column("1")).select_from(_request).where(_request.c.state == "pending").limit(1)
)
_WAITING = (
    sa.select(
        _request,
        sa.func.row_number().over(partition_by=_request.c.project_id, order_by=_request.c.created_at).label("turn"),
    )
    .where(_request.c.state == "pending")
    .subquery()
)
_PENDING = sa.select(_WAITING).order_by(_WAITING.c.turn, _WAITING.c.created_at).limit(sa.bindparam("at_most", type_=sa.Integer()))
# For many at once: the caller counts the rows that changed.
SETTLE_MANY = ManyUpdate(
    {
        "of_operation": sa.String(),
        "new_host": sa.String(),
        "new_epoch": sa.BigInteger(),
        "new_decision": sa.String(),
        "at": _request.c.decided_at.type,
    },
    lambda asked: (
        _request.update()
        .where(_request.c.operation_id == asked["of_operation"], _request.c.state == "pending")
        .values(
            state="placed",
            chosen_host_id=asked["new_host"],
            epoch=asked["new_epoch"],
            decision_id=asked["new_decision"],
            refusal="",
            decided_at=asked["at"],
        )
    ),
)


def ask(
    session: Session,
    *,
    operation_id: str,
    vm_id: str,
    project_id: str,
    kind: str,
    to_host_id: str,
    previous_host_id: str,
    now: datetime,
) -> None:
    """Queue a request for the leader's next batch."""
    values = {
        "operation_id": operation_id,
        "vm_id": vm_id,
        "project_id": project_id,
        "kind": kind,
        "requirement": {"to_host_id": to_host_id, "previous_host_id": previous_host_id},
        "state": "pending",
        "created_at": now,
    }
    session.execute(_INSERT, values)


def get(session: Session, operation_id: str) -> PlacementAsk | None:
    row = session.execute(_OF_OPERATION, {"of_operation": operation_id}).one_or_none()
    return _ask(row) if row else None


def is_any_pending(session: Session) -> bool:
    """Tell whether the leader has anything to answer; asked twenty times a second. Plan: ix_placement_request_state."""
    return session.execute(_IS_ANY_PENDING).one_or_none() is not None


def pending(session: Session, *, limit: int) -> tuple[PlacementAsk, ...]:
    """Return up to `limit` pending requests in rounds, the oldest of each project first: a burst does not fill the batch."""
    return tuple(_ask(row) for row in session.execute(_PENDING, {"at_most": limit}))


def _ask(row: sa.Row[Any]) -> PlacementAsk:
    wishes = row.requirement
    return build(PlacementAsk, row, to_host_id=wishes.get("to_host_id", ""), previous_host_id=wishes.get("previous_host_id", ""))


def answer(request: PlacementAsk) -> Mapping[str, Any] | None:
    """Return {host_id, epoch, decision_id} of a placed request, None of a pending one. NoCapacity of a refused one."""
    if request.state == "refused":
        raise NoCapacity(request.refusal_code, request.refusal, decision_id=request.decision_id)
    if request.state == "placed":
        return {
            "host_id": request.chosen_host_id,
            "epoch": request.epoch,
            "decision_id": request.decision_id,
            "previous_host_id": request.previous_host_id,
        }
    return None


def settle(
    session: Session,
    operation_id: str,
    *,
    state: str,
    decision_id: str,
    chosen_host_id: str = "",
    epoch: int = 0,
    refusal: str = "",
    refusal_code: str = "no-host-fits",
    now: datetime,
) -> bool:
    """Answer a pending request; False where it was withdrawn meanwhile (then nothing may be claimed for it)."""
    values = {
        "state": state,
        "chosen_host_id": chosen_host_id,
        "epoch": epoch,
        "decision_id": decision_id,
        "refusal": refusal[:2000],
        "refusal_code": refusal_code,
        "decided_at": now,
    }
    changed = session.execute(_SETTLE, {"of_operation": operation_id, **values})
    return getattr(changed, "rowcount", 0) == 1


def is_placed(session: Session, operation_id: str) -> bool:
    """Tell whether the operation's request was answered with a host, whose room is claimed by now."""
    query = sa.select(_request.c.operation_id).where(_request.c.operation_id == operation_id, _request.c.state == "placed")
    return session.execute(query).first() is not None


def withdraw(session: Session, operation_id: str) -> None:
    session.execute(_request.delete().where(_request.c.operation_id == operation_id))


def record_decision(session: Session, **values: Any) -> None:
    """Keep why: every host's verdict. The values are those of `decision_values`."""
    session.execute(schema.decision.insert(), decision_values(**values))


def decision_values(
    *,
    decision_id: str,
    vm_id: str,
    operation_id: str,
    kind: str,
    chosen_host_id: str,
    policy: str,
    verdicts: Mapping[str, Any],
    inputs_sha256: str = "",
    fleet_revision: int | None = None,
    now: datetime,
) -> dict[str, Any]:
    """Return the row of a decision: what came of it with the release that decided, since another may decide otherwise.

    `inputs_sha256`: of everything that it was decided on. `fleet_revision`: the newest event when that was read.
    """
    return {
        "id": decision_id,
        "vm_id": vm_id,
        "operation_id": operation_id,
        "kind": kind,
        "chosen_host_id": chosen_host_id,
        "policy": policy,
        "verdicts": {**verdicts, "revision": RELEASE},
        "inputs_sha256": inputs_sha256,
        "fleet_revision": fleet_revision,
        "created_at": now,
    }


def latest_decision(session: Session, vm_id: str) -> DecisionRow | None:
    """Return the newest decision about the vm, if it is still kept."""
    table = schema.decision
    query = sa.select(*columns_of(table, DecisionRow)).where(table.c.vm_id == vm_id).order_by(table.c.id.desc()).limit(1)
    row = session.execute(query).one_or_none()
    return build(DecisionRow, row) if row else None


def decision_of_operation(session: Session, operation_id: str) -> DecisionRow | None:
    table = schema.decision
    query = sa.select(*columns_of(table, DecisionRow)).where(table.c.operation_id == operation_id).order_by(table.c.id.desc())
    row = session.execute(query.limit(1)).one_or_none()
    return build(DecisionRow, row) if row else None


def delete_decisions_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` decisions older than `at`; return how many. The newest about a vm that is there stays: it says why."""
    table, vm, newer = schema.decision, schema.vm, schema.decision.alias("newer")
    is_replaced = sa.exists().where(newer.c.vm_id == table.c.vm_id, newer.c.id > table.c.id)
    is_there = sa.exists().where(vm.c.id == table.c.vm_id, vm.c.deleted_at.is_(None))
    query = sa.select(table.c.id).where(table.c.created_at < at, sa.or_(is_replaced, ~is_there)).limit(limit)
    old = session.scalars(query).all()
    session.execute(table.delete().where(table.c.id.in_(old)))
    return len(old)
