"""Which vms are looked at for what was changed by hand, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import LIVE_STATES, HostConnectivity
from trimtab_controller.store import adoptions, describe, schema, vms
from trimtab_protos.messages import DomainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A vm as its domain shall be."""

    vm_id: str
    name: str
    project_id: str
    host_id: str
    spec: DomainSpec
    known: tuple[str, ...]
    is_original_in_force: bool


def settled(session: Session, *, after: str, limit: int) -> tuple[str, ...]:
    """Return the next vms, by id, that are at a host that answers, and that no operation works on."""
    vm, host, operation = schema.vm, schema.host, schema.operation
    busy = sa.select(operation.c.subject_id).where(operation.c.state.in_([state.value for state in LIVE_STATES]))
    query = (
        sa.select(vm.c.id)
        .join(host, host.c.id == vm.c.host_id)
        .where(
            vm.c.id > after,
            vm.c.deleted_at.is_(None),
            vm.c.observed_host_id == vm.c.host_id,
            vm.c.observed_state.in_(("running", "paused", "stopped")),
            host.c.connectivity == HostConnectivity.UP.value,
            vm.c.id.not_in(busy),
        )
        .order_by(vm.c.id)
        .limit(limit)
    )
    return tuple(session.scalars(query))


def wanted(session: Session, vm_id: str) -> Wanted | None:
    """Return the vm as it shall be; None once it is nowhere, deleted, or worked on."""
    vm = vms.get(session, vm_id)
    if not vm.host_id or vm.deleted_at is not None or is_busy(session, vm_id):
        return None
    adopted = adoptions.find(session, vm_id)
    return Wanted(
        vm_id=vm_id,
        name=vm.name,
        project_id=vm.project_id,
        host_id=vm.host_id,
        spec=describe.domain_spec(session, describe.read_vm(session, vm_id), vm.host_id),
        known=vm.hand_changes,
        is_original_in_force=adopted is not None and adopted.ended_at is None,
    )


def is_busy(session: Session, vm_id: str) -> bool:
    operation = schema.operation
    query = sa.select(sa.literal(1)).where(
        operation.c.subject_id == vm_id, operation.c.state.in_([state.value for state in LIVE_STATES])
    )
    return session.execute(query.limit(1)).first() is not None


def record(session: Session, vm_id: str, fields: Sequence[str]) -> None:
    session.execute(schema.vm.update().where(schema.vm.c.id == vm_id).values(hand_changes=list(fields)))
