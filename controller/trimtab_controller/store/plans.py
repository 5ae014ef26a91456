"""Plans, how far their steps have come, and hosts in maintenance."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Maintenance, PlanRow, PlanStepRow
from trimtab_controller.core.planning.plan import Plan
from trimtab_controller.store import keyset, schema
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import Conflict, NotFound

_plan, _step, _held = schema.plan, schema.plan_step, schema.host_maintenance
_columns = columns_of(_plan, PlanRow)
UNDER_WAY = ("running", "stopping")


def insert(session: Session, plan: Plan, *, plan_id: str, created_by: str, now: datetime) -> PlanRow:
    """Store a plan as open."""
    values = {
        "id": plan_id,
        "kind": plan.kind.value,
        "state": "open",
        "changes": plan.as_json(),
        "created_by": created_by,
        "created_at": now,
        "summary": plan.summary[:1000],
    }
    return build(PlanRow, session.execute(_plan.insert().values(**values).returning(*_columns)).one())


def get(session: Session, plan_id: str) -> PlanRow:
    row = session.execute(sa.select(*_columns).where(_plan.c.id == plan_id)).one_or_none()
    if row is None:
        raise NotFound("plan-not-found", f"there is no plan {plan_id}; see `trimtab plan list`", plan=plan_id)
    return build(PlanRow, row)


def page(session: Session, page: keyset.Page) -> tuple[tuple[PlanRow, ...], tuple[str, str] | None]:
    filters = {name: keyset.equals(_plan.c[name]) for name in ("kind", "state", "created_by")}
    found = keyset.fetch(session, sa.select(*_columns), _plan, page, filters=filters)
    return tuple(build(PlanRow, row) for row in found.rows), found.next_after


def move(session: Session, plan_id: str, *, expected: Collection[str], state: str, **values: Any) -> None:
    """Bring a plan from one of the expected states to another. Conflict (`plan-state`) where it is in none of them."""
    statement = _plan.update().where(_plan.c.id == plan_id, _plan.c.state.in_(expected)).values(state=state, **values)
    if getattr(session.execute(statement), "rowcount", 0) != 1:
        present = get(session, plan_id)
        message = f"plan {plan_id} is {present.state}; only one that is {' or '.join(sorted(expected))} can become {state}"
        raise Conflict("plan-state", message, state=present.state)


def delete(session: Session, plan_id: str) -> None:
    session.execute(_step.delete().where(_step.c.plan_id == plan_id))
    session.execute(_plan.delete().where(_plan.c.id == plan_id))


def delete_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete old plans that are not under way; return how many."""
    query = sa.select(_plan.c.id).where(_plan.c.created_at < at, _plan.c.state != "applying").limit(limit)
    ids = list(session.scalars(query))
    session.execute(_step.delete().where(_step.c.plan_id.in_(ids)))
    session.execute(_plan.delete().where(_plan.c.id.in_(ids)))
    return len(ids)


# --- steps -----------------------------------------------------------------------------------------------------------------


def begin_steps(session: Session, plan_id: str, plan: Plan) -> None:
    """Write every step as pending; those of an attempt before are replaced."""
    session.execute(_step.delete().where(_step.c.plan_id == plan_id))
    rows = [
        {
            "plan_id": plan_id,
            "position": step.position,
            "state": "pending",
            "host_id": step.host_id,
            "target_host_id": step.target_host_id,
        }
        for step in plan.steps
    ]
    if rows:
        session.execute(_step.insert(), rows)


def steps_of(session: Session, plan_id: str) -> tuple[PlanStepRow, ...]:
    query = sa.select(_step).where(_step.c.plan_id == plan_id).order_by(_step.c.position)
    return tuple(build(PlanStepRow, row) for row in session.execute(query))


def set_step(session: Session, step: PlanStepRow, **values: Any) -> None:
    if "message" in values:
        values["message"] = str(values["message"])[:1000]
    where = (_step.c.plan_id == step.plan_id, _step.c.position == step.position)
    session.execute(_step.update().where(*where).values(**values))


@dataclass(frozen=True, slots=True)
class MovesUnderWay:
    """The moves of all plans that are under way: a hold, which waits for people, is none."""

    by_host: Mapping[str, int]
    """How many each host takes part in."""
    between: tuple[tuple[str, str], ...]
    """From where to where each goes; the target is '' where it stays on its host."""


def moves_under_way(session: Session) -> MovesUnderWay:
    query = sa.select(_step.c.host_id, _step.c.target_host_id).where(_step.c.state.in_(UNDER_WAY), _step.c.operation_id != "")
    rows = session.execute(query).all()
    by_host = Counter(host_id for row in rows for host_id in {row.host_id, row.target_host_id} - {""})
    return MovesUnderWay(by_host, tuple((row.host_id, row.target_host_id) for row in rows))


def moved_since(session: Session, at: datetime, kinds: Collection[str]) -> dict[str, datetime]:
    """Return when each vm was last moved by plans of these kinds that were made since `at`."""
    operation = schema.operation
    query = (
        sa.select(operation.c.subject_id, sa.func.max(operation.c.ended_at).label("at"))
        .join(_step, _step.c.operation_id == operation.c.id)
        .join(_plan, _plan.c.id == _step.c.plan_id)
        .where(_step.c.state == "done", _plan.c.kind.in_(kinds), operation.c.ended_at >= at)
        .group_by(operation.c.subject_id)
    )
    return {row.subject_id: row.at for row in session.execute(query)}


# --- maintenance -------------------------------------------------------------------------------------------------------------


def hold_host(session: Session, host_id: str, *, plan_id: str, was_cordoned: bool, created_by: str, now: datetime) -> None:
    """Hold a host out of service; one that is held already stays as it is."""
    values = {
        "host_id": host_id,
        "plan_id": plan_id,
        "was_cordoned": was_cordoned,
        "created_by": created_by,
        "created_at": now,
    }
    insert_unless_taken(session, _held, values)


def maintenance_of(session: Session, host_ids: Collection[str]) -> Mapping[str, Maintenance]:
    query = sa.select(_held).where(_held.c.host_id.in_(host_ids))
    return {row.host_id: build(Maintenance, row) for row in session.execute(query)}


def end_hold(session: Session, host_id: str) -> bool:
    """End the hold; return whether there was one."""
    return getattr(session.execute(_held.delete().where(_held.c.host_id == host_id)), "rowcount", 0) == 1


def end_holds_of(session: Session, plan_id: str) -> None:
    session.execute(_held.delete().where(_held.c.plan_id == plan_id))
