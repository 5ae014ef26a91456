"""Adoptions in SQL, and a host's share of strangers, which a domain leaves and comes back to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build

_table, _host, _mac = schema.adoption, schema.host, schema.unmanaged_mac
_OF_VM = sa.select(_table).where(_table.c.vm_id == sa.bindparam("of_vm"))
_END = _table.update().where(_table.c.vm_id == sa.bindparam("of_vm"), _table.c.ended_at.is_(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    vm_id: str
    host_id: str
    domain_name: str
    original_xml: str
    kept: Sequence[str]
    changes: Sequence[str]
    disks: Sequence[Mapping[str, str]]
    had_autostart: bool
    unmanaged_vcpus: int
    unmanaged_memory_mib: int
    created_at: datetime
    ended_at: datetime | None


def insert(session: Session, **values: Any) -> None:
    session.execute(_table.insert(), values)


def find(session: Session, vm_id: str) -> Adoption | None:
    """Return how the vm was adopted; None where it was created."""
    row = session.execute(_OF_VM, {"of_vm": vm_id}).one_or_none()
    return build(Adoption, row) if row is not None else None


def end(session: Session, vm_id: str, *, now: datetime) -> None:
    """Say that the vm is defined as Trimtab does from now on; nothing where it was so before."""
    session.execute(_END, {"of_vm": vm_id, "ended_at": now})


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedFile:
    """A volume that has a file still; `vm_name` is '' where no vm has it."""

    volume_name: str
    vm_name: str


def owned(session: Session, volume_ids: Sequence[str]) -> dict[str, OwnedFile]:
    """Return those of these volumes whose files are ours: live ones, and deleted ones that can come back. Released ones are not."""
    volume, vm = schema.volume, schema.vm
    query = (
        sa.select(volume.c.id, volume.c.name, vm.c.name.label("vm_name"))
        .outerjoin(vm, vm.c.id == volume.c.vm_id)
        .where(volume.c.id.in_(volume_ids), sa.or_(volume.c.deleted_at.is_(None), volume.c.purge_after.is_not(None)))
    )
    return {row.id: OwnedFile(volume_name=row.name, vm_name=row.vm_name or "") for row in session.execute(query)}


def image_name(session: Session, image_id: str) -> str:
    """Return the image's name, of a deleted one too as its file may be there yet; '' where there never was one."""
    return str(session.scalar(sa.select(schema.image.c.name).where(schema.image.c.id == image_id)) or "")


def leave_unmanaged(session: Session, host_id: str, *, vcpus: int, memory_mib: int, macs: Sequence[str]) -> tuple[int, int]:
    """Take a domain out of what the host counts as strangers', as its next inventory will; return what was taken."""
    row = session.execute(sa.select(_host.c.unmanaged_vcpus, _host.c.unmanaged_memory_mib).where(_host.c.id == host_id)).one()
    taken = min(vcpus, row.unmanaged_vcpus), min(memory_mib, row.unmanaged_memory_mib)
    _add(session, host_id, vcpus=-taken[0], memory_mib=-taken[1])
    session.execute(_mac.delete().where(_mac.c.host_id == host_id, _mac.c.mac.in_(macs)))
    return taken


def join_unmanaged(session: Session, host_id: str, *, vcpus: int, memory_mib: int, macs: Sequence[str]) -> None:
    """Count a domain as a stranger's, as the host's next inventory will."""
    _add(session, host_id, vcpus=vcpus, memory_mib=memory_mib)
    session.execute(_mac.delete().where(_mac.c.host_id == host_id, _mac.c.mac.in_(macs)))
    if macs:
        session.execute(_mac.insert(), [{"host_id": host_id, "mac": mac} for mac in macs])


def _add(session: Session, host_id: str, *, vcpus: int, memory_mib: int) -> None:
    session.execute(
        _host.update()
        .where(_host.c.id == host_id)
        .values(
            unmanaged_vcpus=_host.c.unmanaged_vcpus + vcpus,
            unmanaged_memory_mib=_host.c.unmanaged_memory_mib + memory_mib,
            generation=_host.c.generation + 1,
        )
    )
