"""Snapshots and the layers of volumes in SQL."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.layers import Tree, Work
from trimtab_controller.core.model import Snapshot, Volume
from trimtab_controller.store import describe, lookup, project_quota, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NotFound

_table, _layers, _volumes = schema.snapshot, schema.volume_layer, schema.volume
_columns = columns_of(_table, Snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A volume of another vm that lies over one of this vm's."""

    volume_name: str
    vm_name: str
    parent_volume_id: str
    parent_layer_id: str


def insert(session: Session, *, snapshot_id: str, now: datetime, **values: Any) -> Snapshot:
    """Insert a snapshot from column values. AlreadyExists where its name is taken among the vm's."""
    return lookup.insert_named(session, _table, Snapshot, "snapshot", id=snapshot_id, created_at=now, **values)


def get(session: Session, snapshot_id: str) -> Snapshot:
    """Return the snapshot, deleted ones too. NotFound."""
    row = session.execute(sa.select(*_columns).where(_table.c.id == snapshot_id)).one_or_none()
    if row is None:
        raise NotFound("snapshot-not-found", f"no snapshot {snapshot_id}")
    return build(Snapshot, row)


def of_vm(session: Session, vm_id: str) -> tuple[Snapshot, ...]:
    """Return the vm's live snapshots, oldest first."""
    query = sa.select(*_columns).where(_table.c.vm_id == vm_id, _table.c.deleted_at.is_(None))
    return tuple(build(Snapshot, row) for row in session.execute(query.order_by(_table.c.created_at, _table.c.id)))


def update(session: Session, snapshot_id: str, **values: Any) -> None:
    session.execute(_table.update().where(_table.c.id == snapshot_id).values(**values))


def forget(session: Session, snapshot: Snapshot, *, now: datetime) -> None:
    """Leave the snapshot's row as a tombstone; those that began from it began from its parent."""
    session.execute(_table.update().where(_table.c.parent_id == snapshot.id).values(parent_id=snapshot.parent_id))
    table = schema.vm
    session.execute(
        table.update()
        .where(table.c.id == snapshot.vm_id, table.c.current_snapshot_id == snapshot.id)
        .values(current_snapshot_id=snapshot.parent_id or "")
    )
    is_live = get(session, snapshot.id).deleted_at is None
    update(session, snapshot.id, deleted_at=now)
    if is_live and not snapshot.is_temporary:
        _give_back(session, snapshot.vm_id, 1)


def forget_all(session: Session, vm_id: str, *, now: datetime) -> None:
    """Leave the rows of a vm that is gone as tombstones."""
    counted = sa.select(sa.func.count()).where(
        _table.c.vm_id == vm_id, _table.c.deleted_at.is_(None), _table.c.is_temporary.is_(False)
    )
    _give_back(session, vm_id, int(session.execute(counted).scalar_one()))
    session.execute(_table.update().where(_table.c.vm_id == vm_id, _table.c.deleted_at.is_(None)).values(deleted_at=now))


def _give_back(session: Session, vm_id: str, count: int) -> None:
    project_id = session.scalar(sa.select(schema.vm.c.project_id).where(schema.vm.c.id == vm_id))
    if project_id and count:
        project_quota.lower_used(session, project_id, {"snapshots": count})


def unfinished(session: Session, *, limit: int) -> tuple[Snapshot, ...]:
    """Return snapshots that nothing needs: cut short, or temporary with nothing left to be made of them."""
    operation, vm = schema.operation, schema.vm
    is_worked_on = (
        sa.select(operation.c.id)
        .where(operation.c.ended_at.is_(None), operation.c.params["snapshot_id"].as_string() == _table.c.id)
        .exists()
    )
    query = (
        sa.select(*_columns)
        .join(vm, vm.c.id == _table.c.vm_id)
        .where(
            _table.c.deleted_at.is_(None),
            vm.c.deleted_at.is_(None),
            sa.or_(_table.c.state != "ready", _table.c.is_temporary),
            ~is_worked_on,
        )
        .order_by(_table.c.created_at)
        .limit(limit)
    )
    found = [build(Snapshot, row) for row in session.execute(query)]
    return tuple(one for one in found if one.state != "ready" or not clones_of(session, one))


def clones_of(session: Session, snapshot: Snapshot) -> tuple[Clone, ...]:
    """Return the linked clones that lie over what the snapshot keeps."""
    kept = {(str(one["volume_id"]), str(one["layer_id"])) for one in snapshot.volumes}
    found = clones_over(session, [volume_id for volume_id, _layer in kept])
    return tuple(one for one in found if (one.parent_volume_id, one.parent_layer_id) in kept)


def is_known_to(session: Session, host_id: str, capability: str = "layers") -> bool:
    """Tell whether the host's agent knows layers (or something else), as far as it has told what it knows."""
    inventory = session.scalar(sa.select(schema.host.c.inventory).where(schema.host.c.id == host_id))
    return not inventory or capability in inventory.get("capabilities", ())


# --- layers ------------------------------------------------------------------------------------------------------------------


def insert_layers(session: Session, layers: Mapping[str, str], volumes: Iterable[Volume], *, now: datetime) -> None:
    """Insert a new layer over each volume's active one; `layers`: volume id → the new layer's id."""
    for volume in volumes:
        session.execute(
            _layers.insert().values(id=layers[volume.id], volume_id=volume.id, parent_layer_id=volume.layer_id, created_at=now)
        )


def insert_layer(session: Session, *, layer_id: str, volume_id: str, over: str, now: datetime) -> None:
    session.execute(_layers.insert().values(id=layer_id, volume_id=volume_id, parent_layer_id=over, created_at=now))


def delete_layers(session: Session, layer_ids: Iterable[str]) -> None:
    session.execute(_layers.delete().where(_layers.c.id.in_(list(layer_ids))))


def layer_ids_of(session: Session, volume_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return volume id → {layer: the one below}."""
    found: dict[str, dict[str, str]] = {volume_id: {} for volume_id in volume_ids}
    for row in session.execute(sa.select(_layers).where(_layers.c.volume_id.in_(volume_ids))):
        found[row.volume_id][row.id] = row.parent_layer_id
    return found


def clones_over(session: Session, volume_ids: Sequence[str]) -> tuple[Clone, ...]:
    """Return every volume, hidden ones too, that lies over one of these."""
    vm = schema.vm
    query = (
        sa.select(_volumes.c.name, vm.c.name.label("vm_name"), _volumes.c.parent_volume_id, _volumes.c.parent_layer_id)
        .outerjoin(vm, vm.c.id == _volumes.c.vm_id)
        .where(_volumes.c.parent_volume_id.in_(volume_ids))
        .order_by(_volumes.c.created_at)
    )
    return tuple(
        Clone(
            volume_name=row.name,
            vm_name=row.vm_name or "",
            parent_volume_id=row.parent_volume_id,
            parent_layer_id=row.parent_layer_id,
        )
        for row in session.execute(query)
    )


def trees(session: Session, vm_id: str, *, without: str = "") -> dict[str, Tree]:
    """Return the layers of each of the vm's volumes; what the snapshot `without` names is not pinned by it."""
    volumes = describe.volumes_of(session, vm_id)
    ids = [volume.id for volume in volumes]
    layers, clones = layer_ids_of(session, ids), clones_over(session, ids)
    pinned = [one for snapshot in of_vm(session, vm_id) if snapshot.id != without for one in snapshot.volumes]
    return {
        volume.id: Tree(
            parents=layers[volume.id],
            active=volume.layer_id,
            pinned=frozenset(str(one["layer_id"]) for one in pinned if one["volume_id"] == volume.id),
            clones=frozenset(clone.parent_layer_id for clone in clones if clone.parent_volume_id == volume.id),
        )
        for volume in volumes
    }


def set_active(session: Session, volume_id: str, layer_id: str, *, merges_into: str | None = None, ages: bool = False) -> None:
    """Write which layer the vm writes to; `ages`: its content goes back in time, so that its generation rises."""
    values: dict[str, Any] = {"layer_id": layer_id, "merge_layer_id": merges_into, "version": _volumes.c.version + 1}
    if ages:
        values["generation"] = _volumes.c.generation + 1
    session.execute(_volumes.update().where(_volumes.c.id == volume_id).values(values))


def record(session: Session, vm_id: str, volume_id: str, work: Work) -> None:
    """Record that the work was done: whatever named the upper layer names the lower one."""
    delete_layers(session, [work.top])
    if work.base is None:
        return
    session.execute(
        _layers.update()
        .where(_layers.c.volume_id == volume_id, _layers.c.parent_layer_id == work.top)
        .values(parent_layer_id=work.base)
    )
    session.execute(
        _volumes.update()
        .where(_volumes.c.id == volume_id, _volumes.c.layer_id == work.top)
        .values(layer_id=work.base, merge_layer_id=None, version=_volumes.c.version + 1)
    )
    for snapshot in of_vm(session, vm_id):
        named = [_renamed(one, volume_id, work.top, work.base) for one in snapshot.volumes]
        if tuple(named) != snapshot.volumes:
            update(session, snapshot.id, volumes=named)


def _renamed(one: Mapping[str, Any], volume_id: str, top: str, base: str) -> Mapping[str, Any]:
    if one["volume_id"] == volume_id and one["layer_id"] == top:
        return {**one, "layer_id": base}
    return one
