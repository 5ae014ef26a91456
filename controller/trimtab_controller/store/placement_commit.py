"""Writes many decided placements in one transaction, each kind of row in one statement for all of them.

A placement alone is some ten statements and a commit; a batch of a hundred is the same ten statements. Every claim is still the
conditional UPDATE of `claims.py`, of all vms that go to one host together. Where one of them is refused, `place_many` raises and has
to be undone (the caller's savepoint); the caller then writes one by one, so that the refused one falls out alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.store import claims, operations, placements, schema
from trimtab_controller.store.many import Asked, ManyInsert, ManyUpdate, Row

_vm, _volume = schema.vm, schema.volume


def _moving_in(asked: Asked) -> sa.Update:
    """The vm as the decision knew it: placed, resized or deleted meanwhile, it is decided again."""
    return (
        _vm.update()
        .where(
            _vm.c.id == asked["of_vm"],
            _vm.c.epoch == asked["epoch_before"],
            _vm.c.vcpus == asked["decided_vcpus"],
            _vm.c.memory_mib == asked["decided_memory_mib"],
            _vm.c.deleted_at.is_(None),
        )
        .values(
            host_id=asked["new_host"],
            epoch=_vm.c.epoch + 1,
            version=_vm.c.version + 1,
            machine=sa.case((_vm.c.machine == "", asked["new_machine"]), else_=_vm.c.machine),
            cpu_model=sa.case((_vm.c.cpu_model == "", asked["new_cpu_model"]), else_=_vm.c.cpu_model),
        )
    )


_MOVE_IN = ManyUpdate(
    {
        "of_vm": sa.String(),
        "epoch_before": sa.BigInteger(),
        "decided_vcpus": sa.Integer(),
        "decided_memory_mib": sa.BigInteger(),
        "new_host": sa.String(),
        "new_machine": sa.String(),
        "new_cpu_model": sa.String(),
    },
    _moving_in,
)
_BIND = ManyUpdate(
    {"of_volume": sa.String(), "to_host": sa.String()},
    lambda asked: (
        _volume.update().where(_volume.c.id == asked["of_volume"]).values(host_id=asked["to_host"], version=_volume.c.version + 1)
    ),
)
_CLAIMS = ManyInsert(schema.claim, ("vm_id", "host_id", "role", "epoch", "vcpus", "memory_mib", "operation_id", "created_at"))
_DISK_CLAIMS = ManyInsert(schema.disk_claim, ("volume_id", "pool_id", "host_id", "size_bytes"))
_DECISIONS = ManyInsert(
    schema.decision,
    (
        "id",
        "vm_id",
        "operation_id",
        "kind",
        "chosen_host_id",
        "policy",
        "verdicts",
        "inputs_sha256",
        "fleet_revision",
        "created_at",
    ),
)
_EVENTS = ManyInsert(schema.event, ("at", "kind", "project_id", "subject_id", "operation_id", "actor", "message", "context"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceTaken:
    """Space of one volume that is not claimed yet, at the place that was decided ('' for a shared pool)."""

    volume_id: str
    pool_id: str
    host_id: str
    size_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A vm that is created or started on a host, with all that is written for it."""

    operation_id: str
    vm_id: str
    project_id: str
    kind: str
    host_id: str
    host_name: str
    epoch_before: int
    vcpus: int
    memory_mib: int
    machine: str
    cpu_model: str
    spaces: tuple[SpaceTaken, ...]
    local_volume_ids: tuple[str, ...]
    decision_id: str
    policy: str
    verdicts: Mapping[str, Any]
    inputs_sha256: str
    fleet_revision: int


def place_many(session: Session, placed: Sequence[Placed], *, now: datetime) -> None:
    """Write all of them. ClaimRefused where one was withdrawn, changed, or has no room any more: then nothing may stay written."""
    try:
        _write(session, placed, now)
    except IntegrityError as error:
        raise claims.ClaimRefused("one of a batch") from error


def _write(session: Session, placed: Sequence[Placed], now: datetime) -> None:
    _every(session, placements.SETTLE_MANY, [_answer(one, now) for one in placed])
    _every(session, claims.TAKE_MANY, _compute(placed))
    _every(session, _MOVE_IN, [_move(one) for one in placed])
    spaces = [space for one in placed for space in one.spaces]
    _every(session, claims.TAKE_SPACE_MANY, _space(spaces))
    bound = [(volume_id, one.host_id) for one in placed for volume_id in one.local_volume_ids]
    _every(session, _BIND, [{"of_volume": volume_id, "to_host": host_id} for volume_id, host_id in bound])
    _CLAIMS.run(session, [_claim(one, now) for one in placed])
    _DISK_CLAIMS.run(session, [_disk_claim(one) for one in spaces])
    _DECISIONS.run(session, [_decision(one, now) for one in placed])
    _EVENTS.run(session, [_event(one, now) for one in placed])
    operations.wake_many(session, [one.operation_id for one in placed], now)


def _every(session: Session, statement: ManyUpdate, rows: Sequence[Row]) -> None:
    """Run a conditional UPDATE for each row; ClaimRefused where one of them changed nothing."""
    if statement.run(session, rows) != len(rows):
        raise claims.ClaimRefused("one of a batch")


def _answer(one: Placed, now: datetime) -> dict[str, Any]:
    return {
        "of_operation": one.operation_id,
        "new_host": one.host_id,
        "new_epoch": one.epoch_before + 1,
        "new_decision": one.decision_id,
        "at": now,
    }


def _compute(placed: Sequence[Placed]) -> list[Row]:
    """Return what is taken of each host. The sum fits where the claims fit one after the other, and a host is written once.

    Writing a host's row for each of its vms took PostgreSQL longer with every one: a transaction's own versions of a row are a chain.
    """
    taken: dict[str, list[int]] = {}
    for one in placed:
        sums = taken.setdefault(one.host_id, [0, 0])
        sums[0] += one.vcpus
        sums[1] += one.memory_mib
    return [
        {"at_host": host_id, "more_vcpus": vcpus, "more_memory_mib": memory_mib}
        for host_id, (vcpus, memory_mib) in sorted(taken.items())
    ]


def _move(one: Placed) -> dict[str, Any]:
    return {
        "of_vm": one.vm_id,
        "epoch_before": one.epoch_before,
        "decided_vcpus": one.vcpus,
        "decided_memory_mib": one.memory_mib,
        "new_host": one.host_id,
        "new_machine": one.machine,
        "new_cpu_model": one.cpu_model,
    }


def _space(spaces: Sequence[SpaceTaken]) -> list[Row]:
    """Return what is taken of each place."""
    taken: dict[tuple[str, str], int] = defaultdict(int)
    limits: dict[tuple[str, str], int] = {}
    for one in spaces:
        place = (one.pool_id, one.host_id)
        taken[place] += one.size_bytes
        limits[place] = min(one.limit_bytes, limits.get(place, one.limit_bytes))
    return [
        {"of_pool": place[0], "of_host": place[1], "more_bytes": taken[place], "limit_bytes": limits[place]}
        for place in sorted(taken)
    ]


def _claim(one: Placed, now: datetime) -> dict[str, Any]:
    return {
        "vm_id": one.vm_id,
        "host_id": one.host_id,
        "role": "home",
        "epoch": one.epoch_before + 1,
        "vcpus": one.vcpus,
        "memory_mib": one.memory_mib,
        "operation_id": one.operation_id,
        "created_at": now,
    }


def _disk_claim(one: SpaceTaken) -> dict[str, Any]:
    return {"volume_id": one.volume_id, "pool_id": one.pool_id, "host_id": one.host_id, "size_bytes": one.size_bytes}


def _decision(one: Placed, now: datetime) -> dict[str, Any]:
    return placements.decision_values(
        decision_id=one.decision_id,
        vm_id=one.vm_id,
        operation_id=one.operation_id,
        kind=one.kind,
        chosen_host_id=one.host_id,
        policy=one.policy,
        verdicts=one.verdicts,
        inputs_sha256=one.inputs_sha256,
        fleet_revision=one.fleet_revision,
        now=now,
    )


def _event(one: Placed, now: datetime) -> dict[str, Any]:
    return {
        "at": now,
        "kind": "vm.placed",
        "project_id": one.project_id,
        "subject_id": one.vm_id,
        "operation_id": one.operation_id,
        "actor": "system:placement",
        "message": f"placed on {one.host_name} for {one.kind}",
        "context": {"host_id": one.host_id, "decision_id": one.decision_id},
    }
