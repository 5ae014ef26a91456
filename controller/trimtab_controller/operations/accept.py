"""Accepts durable work: the one way in which an operation comes to be."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Operation
from trimtab_controller.core.resize import OFF, When
from trimtab_controller.operations import background
from trimtab_controller.operations.registry import saga_named
from trimtab_controller.operations.vm_steps import PLACEMENT_POLL_S
from trimtab_controller.store import adoptions, events, operations, placements, vms, volume_moves
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict

_NEEDS_OWN_DEFINITION = frozenset(
    {
        "vm.reconcile",
        "vm.resize",
        "vm.attach",
        "vm.detach",
        "vm.change_cdrom",
        "vm.set_resources",
        "vm.set_ha",
        "snapshot.create",
        "backup.run",
    }
)

# What relies on each disk being in one place.
_ON_SETTLED_DISKS = frozenset(
    {
        "backup.run",
        "snapshot.create",
        "snapshot.revert",
        "vm.attach",
        "vm.detach",
        "vm.migrate",
        "vm.replace",
        "volume.resize",
    }
)


def accept(
    session: Session,
    kind: str,
    *,
    subject_id: str,
    subject_name: str,
    project_id: str,
    params: Mapping[str, Any],
    actor: Actor,
    now: datetime,
    operation_id: str | None = None,
    priority: int = 0,
    deadline: datetime | None = None,
    first_run: datetime | None = None,
) -> Operation:
    """Insert a queued operation of `kind` and its first event, in the caller's transaction.

    `first_run`: when a driver looks at it at the latest, where somebody else works on it first and wakes it; None: at once.

    The caller nudges after commit (`services.nudge`). Conflict (`operation-in-progress`, names the live operation) where an
    exclusive operation on the subject is already live: a partial unique index decides, not a look beforehand.
    """
    saga = saga_named(kind)
    saga.params_from_json(params)  # a defect of ours shows here, not in a worker
    if kind in _NEEDS_OWN_DEFINITION:
        _refuse_adopted(session, subject_id, subject_name, params)
    if saga.is_exclusive and subject_id.startswith("vm-"):
        background.make_room(session, kind, subject_id=subject_id, subject_name=subject_name, actor=actor.name, now=now)
    if kind in _ON_SETTLED_DISKS:
        volume_moves.require_settled(session, subject_id, subject_name)
    operation = operations.insert(
        session,
        operation_id=operation_id or mint("op"),
        kind=kind,
        saga_version=saga.version,
        subject_id=subject_id,
        subject_name=subject_name,
        project_id=project_id,
        is_exclusive=saga.is_exclusive,
        params=params,
        actor=actor.name,
        request_id=actor.request_id,
        priority=priority,
        deadline=deadline,
        next_run=first_run,
        now=now,
    )
    events.append(
        session,
        kind="operation.accepted",
        project_id=project_id,
        subject_id=subject_id,
        operation_id=operation.id,
        actor=actor.name,
        message=f"{kind} of {subject_name} accepted",
        now=now,
    )
    return operation


def _refuse_adopted(session: Session, vm_id: str, name: str, params: Mapping[str, Any]) -> None:
    """Refuse what finds its way in a running guest by devices as Trimtab defines them, of one that was adopted and not stopped since."""
    adoption = adoptions.find(session, vm_id)
    if adoption is None or adoption.ended_at is not None or params.get("when") == When.NEXT_STOP.value:
        return
    if vms.get(session, vm_id).observed_state not in OFF:
        raise Conflict(
            "adopted-definition",
            f"vm {name} was adopted and runs under its original definition until its next stop; "
            f"`trimtab vm stop {name}` and `trimtab vm start {name}` first",
            vm=name,
        )


def accept_placed(
    session: Session,
    kind: str,
    *,
    vm_id: str,
    vm_name: str,
    project_id: str,
    params: Mapping[str, Any],
    to_host_id: str,
    actor: Actor,
    now: datetime,
    operation_id: str | None = None,
) -> Operation:
    """As `accept`, for a vm that has no host yet: its placement is asked for at once.

    A driver has something to do only when the leader has answered, and is woken then.
    """
    operation = accept(
        session,
        kind,
        subject_id=vm_id,
        subject_name=vm_name,
        project_id=project_id,
        params={**params, "vm_id": vm_id, "to_host_id": to_host_id},
        actor=actor,
        now=now,
        operation_id=operation_id,
        first_run=now + timedelta(seconds=PLACEMENT_POLL_S),
    )
    placements.ask(
        session,
        operation_id=operation.id,
        vm_id=vm_id,
        project_id=project_id,
        kind="create",
        to_host_id=to_host_id,
        previous_host_id="",
        now=now,
    )
    return operation
