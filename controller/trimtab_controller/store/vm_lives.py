"""When vms were created and deleted: what is learned from about how long they live."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_vm = schema.vm
_COLUMNS = (
    _vm.c.id,
    _vm.c.host_id,
    _vm.c.project_id,
    _vm.c.name,
    _vm.c.vcpus,
    _vm.c.memory_mib,
    _vm.c.created_at,
    _vm.c.deleted_at,
)


@dataclass(frozen=True, slots=True)
class Life:
    vm_id: str
    host_id: str
    project_id: str
    name: str
    vcpus: int
    memory_mib: int
    born_at: datetime
    ended_at: datetime | None


def living(session: Session) -> tuple[Life, ...]:
    """Return all vms on hosts that are not deleted."""
    return tuple(
        Life(*row) for row in session.execute(sa.select(*_COLUMNS).where(_vm.c.deleted_at.is_(None), _vm.c.host_id != ""))
    )


def ended(session: Session, *, since: datetime, limit: int) -> tuple[Life, ...]:
    """Return up to `limit` vms that were deleted since then, the latest first."""
    query = sa.select(*_COLUMNS).where(_vm.c.deleted_at >= since).order_by(_vm.c.deleted_at.desc()).limit(limit)
    return tuple(Life(*row) for row in session.execute(query))
