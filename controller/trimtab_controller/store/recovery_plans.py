"""Recovery plans in SQL. Whoever changes a run locks its plan's row first: the leader's loop and the run's own operation both do."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import RecoveryPlan
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NotFound

_table = schema.recovery_plan
_columns = columns_of(_table, RecoveryPlan)
# The leader asks in every round. Plan: ix_operation_subject, from the few plans there are.
_RUNNING = (
    sa.select(*_columns)
    .join(schema.operation, schema.operation.c.subject_id == _table.c.id)
    .where(schema.operation.c.kind == "recovery.run", schema.operation.c.ended_at.is_(None))
)
FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name), "repo": keyset.named(_table.c.repo_id, schema.backup_repo)}


def insert(session: Session, *, plan_id: str, now: datetime, **values: Any) -> RecoveryPlan:
    """Insert a plan. AlreadyExists where its name is taken in the project."""
    return lookup.insert_named(session, _table, RecoveryPlan, "recovery plan", id=plan_id, created_at=now, last_run={}, **values)


def get(session: Session, plan_id: str) -> RecoveryPlan:
    """Return the plan, deleted ones too. NotFound."""
    return _one(session, sa.select(*_columns).where(_table.c.id == plan_id), plan_id)


def lock(session: Session, plan_id: str) -> RecoveryPlan:
    """Return the plan as it is now; nobody else changes it before this transaction ends."""
    return _one(session, sa.select(*_columns).where(_table.c.id == plan_id).with_for_update(), plan_id)


def _one(session: Session, query: Any, plan_id: str) -> RecoveryPlan:
    row = session.execute(query).one_or_none()
    if row is None:
        raise NotFound("recovery-plan-not-found", f"there is no recovery plan {plan_id}")
    return build(RecoveryPlan, row)


def find(session: Session, project_id: str, name_or_id: str) -> RecoveryPlan | None:
    return lookup.find(session, _table, RecoveryPlan, name_or_id, project_ids=(project_id,))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[RecoveryPlan, ...], tuple[str, str] | None]:
    query = sa.select(*_columns).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(RecoveryPlan, row) for row in found.rows), found.next_after


def of_repo(session: Session, repo_id: str) -> tuple[str, ...]:
    """Return the names of the live plans that restore from the repository."""
    query = sa.select(_table.c.name).where(_table.c.repo_id == repo_id, _table.c.deleted_at.is_(None)).order_by(_table.c.name)
    return tuple(session.scalars(query))


def naming(session: Session, project_id: str, vm_name: str, *, repo_id: str) -> tuple[RecoveryPlan, ...]:
    """Return the project's live plans that bring a vm of this name back from the repository."""
    query = (
        sa.select(*_columns)
        .where(_table.c.project_id == project_id, _table.c.repo_id == repo_id, _table.c.deleted_at.is_(None))
        .order_by(_table.c.name)
    )
    plans = (build(RecoveryPlan, row) for row in session.execute(query))
    return tuple(one for one in plans if any(vm_name in group["vms"] for group in one.groups))


def running(session: Session) -> tuple[RecoveryPlan, ...]:
    """Return the plans whose run goes on, by their live operations."""
    return tuple(build(RecoveryPlan, row) for row in session.execute(_RUNNING))


def update(session: Session, plan_id: str, **values: Any) -> None:
    session.execute(_table.update().where(_table.c.id == plan_id).values(**values))


def change(session: Session, plan_id: str, *, expected_version: int | None, **values: Any) -> None:
    lookup.update_version(session, _table, "the recovery plan", plan_id, expected_version=expected_version, **values)


def vms_present(session: Session, project_id: str, names: Sequence[str]) -> Mapping[str, str]:
    """Return the ids of the project's live vms of these names."""
    vm = schema.vm
    query = sa.select(vm.c.name, vm.c.id).where(
        vm.c.project_id == project_id, vm.c.name.in_(list(names)), vm.c.deleted_at.is_(None)
    )
    return {row.name: row.id for row in session.execute(query)}
