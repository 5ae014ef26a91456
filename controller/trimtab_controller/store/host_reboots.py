"""What a reboot of a host asks of the rows: who runs there, and what its hold was."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_OFF = ("stopped", "absent", "crashed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A vm that runs on a host, or may."""

    id: str
    name: str
    project_id: str


def guests_of(session: Session, host_id: str) -> tuple[Guest, ...]:
    """Return the vms of the host that were not seen off."""
    vm = schema.vm
    query = (
        sa.select(vm.c.id, vm.c.name, vm.c.project_id)
        .where(vm.c.host_id == host_id, vm.c.deleted_at.is_(None), vm.c.observed_state.not_in(_OFF))
        .order_by(vm.c.name)
    )
    return tuple(Guest(id=row.id, name=row.name, project_id=row.project_id) for row in session.execute(query))


def stopped_for(session: Session, operation_id: str, *, since: datetime) -> tuple[str, ...]:
    """Return the vms whose stop was begun for this operation; their stops carry its id as the request's."""
    stop = schema.operation
    query = sa.select(stop.c.subject_id).where(
        stop.c.created_at >= since, stop.c.kind == "vm.stop", stop.c.request_id == operation_id
    )
    return tuple(sorted(set(session.scalars(query))))
