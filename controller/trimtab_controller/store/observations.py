"""What SQL knows of vms and their holders, as the judgement of a host's report needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.guest_agents import GuestAgent
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
    observed_balloon_mib: int = 0
    guest_agent: str = ""
    """See `core/guest_agents.py`."""
    turn: int = 0
    """The highest that was given for it; an agent that has a higher one knows of a driver that this database does not."""

    def known_epoch(self, host_id: str) -> int | None:
        """Return the epoch from which this host's word about the vm counts; None where it holds nothing of it."""
        if host_id in self.claims:
            return self.claims[host_id]
        return self.epoch if host_id == self.host_id else None


_vm, _claim, _turn = schema.vm, schema.claim, schema.turn
_CLAIMS = sa.select(_claim.c.vm_id, _claim.c.host_id, _claim.c.epoch)
_VMS = sa.select(
    _vm.c.id,
    _vm.c.name,
    _vm.c.project_id,
    _vm.c.host_id,
    _vm.c.epoch,
    _vm.c.deleted_at,
    _vm.c.observed_state,
    _vm.c.observed_reason,
    _vm.c.observed_host_id,
    _vm.c.observed_addresses,
    _vm.c.observed_balloon_mib,
    _vm.c.guest_agent,
    sa.func.coalesce(sa.select(_turn.c.value).where(_turn.c.subject_id == _vm.c.id).scalar_subquery(), 0).label("turn"),
)
_ONE: sa.BindParameter[str] = sa.bindparam("wanted")
_MANY: sa.BindParameter[str] = sa.bindparam("wanted", expanding=True)
_OF_ONE = (_CLAIMS.where(_claim.c.vm_id == _ONE), _VMS.where(_vm.c.id == _ONE))
_OF_MANY = (_CLAIMS.where(_claim.c.vm_id.in_(_MANY)), _VMS.where(_vm.c.id.in_(_MANY)))


def holdings(session: Session, vm_ids: Sequence[str]) -> dict[str, Holding]:
    """Return the holdings of those ids that are vms of ours, deleted ones too; two queries per 500."""
    found: dict[str, Holding] = {}
    for start in range(0, len(vm_ids), _CHUNK):
        chunk = list(vm_ids[start : start + _CHUNK])
        # An event is of one vm; a list of parameters is put into the statement's text anew at each execution.
        of_claims, of_vms = _OF_ONE if len(chunk) == 1 else _OF_MANY
        wanted = {"wanted": chunk[0] if len(chunk) == 1 else chunk}
        claims: dict[str, dict[str, int]] = {}
        row: Any
        for row in session.execute(of_claims, wanted):
            claims.setdefault(row.vm_id, {})[row.host_id] = int(row.epoch)
        for row in session.execute(of_vms, wanted):
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
                observed_balloon_mib=int(row.observed_balloon_mib),
                guest_agent=row.guest_agent,
                turn=int(row.turn),
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


def note_balloon(session: Session, vm_id: str, balloon_mib: int) -> None:
    """Note what a vm's balloon leaves it."""
    session.execute(schema.vm.update().where(schema.vm.c.id == vm_id).values(observed_balloon_mib=balloon_mib))


def note_guest_agent(session: Session, vm_id: str, known: GuestAgent, *, at: datetime) -> None:
    """Note what is known of the guest's agent from `at` on."""
    values = {"guest_agent": known.value, "guest_agent_since": at}
    session.execute(schema.vm.update().where(schema.vm.c.id == vm_id).values(values))


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
