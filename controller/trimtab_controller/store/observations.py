"""What SQL knows of vms and their holders, as the judgement of a host's report needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One vm: who may hold it, at which epoch, and what was last seen. `claims`: epoch per holding host."""

    vm_id: str
    name: str
    project_id: str
    host_id: str
    epoch: int
    claims: Mapping[str, int]
    is_deleted: bool
    observed_state: str
    observed_reason: str
    observed_host_id: str
    observed_addresses: tuple[str, ...]

    def known_epoch(self, host_id: str) -> int | None:
        """Return the epoch from which this host's word about the vm counts; None where it holds nothing of it."""
        if host_id in self.claims:
            return self.claims[host_id]
        return self.epoch if host_id == self.host_id else None


def holdings(session: Session, vm_ids: Sequence[str]) -> dict[str, Holding]:
    """Return the holdings of those ids that are vms of ours, deleted ones too; two queries per 500."""
    vm, claim = schema.vm, schema.claim
    found: dict[str, Holding] = {}
    for start in range(0, len(vm_ids), _CHUNK):
        chunk = vm_ids[start : start + _CHUNK]
        claims: dict[str, dict[str, int]] = {}
        query = sa.select(claim.c.vm_id, claim.c.host_id, claim.c.epoch).where(claim.c.vm_id.in_(chunk))
        for row in session.execute(query):
            claims.setdefault(row.vm_id, {})[row.host_id] = int(row.epoch)
        columns = [
            vm.c.id,
            vm.c.name,
            vm.c.project_id,
            vm.c.host_id,
            vm.c.epoch,
            vm.c.deleted_at,
            vm.c.observed_state,
            vm.c.observed_reason,
            vm.c.observed_host_id,
            vm.c.observed_addresses,
        ]
        for row in session.execute(sa.select(*columns).where(vm.c.id.in_(chunk))):
            found[row.id] = Holding(
                vm_id=row.id,
                name=row.name,
                project_id=row.project_id,
                host_id=row.host_id,
                epoch=int(row.epoch),
                claims=claims.get(row.id, {}),
                is_deleted=row.deleted_at is not None,
                observed_state=row.observed_state,
                observed_reason=row.observed_reason,
                observed_host_id=row.observed_host_id,
                observed_addresses=tuple(row.observed_addresses or ()),
            )
    return found


def held_by(session: Session, host_id: str) -> frozenset[str]:
    """Return the ids of live vms that are assigned to the host or have a claim on it."""
    vm, claim = schema.vm, schema.claim
    assigned = sa.select(vm.c.id).where(vm.c.host_id == host_id, vm.c.deleted_at.is_(None))
    claimed = (
        sa.select(vm.c.id).join(claim, claim.c.vm_id == vm.c.id).where(claim.c.host_id == host_id, vm.c.deleted_at.is_(None))
    )
    return frozenset(session.scalars(assigned.union(claimed)))


def refresh(session: Session, vm_ids: Sequence[str], *, at: datetime) -> None:
    """Give an unchanged observation its new age."""
    vm = schema.vm
    for start in range(0, len(vm_ids), _CHUNK):
        session.execute(vm.update().where(vm.c.id.in_(vm_ids[start : start + _CHUNK])).values(observed_at=at))


def last_drift(session: Session, subject_id: str) -> Mapping[str, object]:
    """Return the context of the subject's latest drift event, {} where there is none. Plan: backward scan of ix_event_subject."""
    event = schema.event
    query = (
        sa.select(event.c.context)
        .where(event.c.subject_id == subject_id, event.c.kind == "vm.drift")
        .order_by(event.c.seq.desc())
        .limit(1)
    )
    return dict(session.execute(query).scalar_one_or_none() or {})
