"""Counts for the leader's gauges."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import LIVE_STATES, OperationState
from trimtab_controller.store import operations, schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    hosts: Mapping[str, int]
    vms: Mapping[str, int]
    operations: Mapping[str, int]
    operations_due: int
    # By limit, claimed, unmanaged.
    vcpus: Mapping[str, int]
    memory_mib: Mapping[str, int]


def read(session: Session, now: datetime) -> Figures:
    """Return the counts; five aggregate queries."""
    host, vm, operation = schema.host, schema.vm, schema.operation
    live = [state.value for state in LIVE_STATES | {OperationState.NEEDS_ATTENTION}]
    sums = session.execute(
        sa.select(
            *(
                sa.func.coalesce(sa.func.sum(column), 0)
                for column in (
                    host.c.vcpus_limit,
                    host.c.vcpus_claimed,
                    host.c.unmanaged_vcpus,
                    host.c.memory_limit_mib,
                    host.c.memory_claimed_mib,
                    host.c.unmanaged_memory_mib,
                )
            )
        ).where(host.c.deleted_at.is_(None))
    ).one()
    names = ("limit", "claimed", "unmanaged")
    return Figures(
        hosts=_counts(session, host.c.connectivity, host.c.deleted_at.is_(None)),
        vms=_counts(session, vm.c.observed_state, vm.c.deleted_at.is_(None)),
        operations=_counts(session, operation.c.state, operation.c.state.in_(live)),
        operations_due=operations.count_due(session, now),
        vcpus=dict(zip(names, (int(value) for value in sums[:3]), strict=True)),
        memory_mib=dict(zip(names, (int(value) for value in sums[3:]), strict=True)),
    )


def _counts(session: Session, column: sa.Column[str], condition: sa.ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(sa.select(column, sa.func.count()).where(condition).group_by(column))
    return {row[0]: int(row[1]) for row in rows}
