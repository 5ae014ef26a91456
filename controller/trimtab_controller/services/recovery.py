"""Failover's transactions: take a vm from its dead host, and what operators may say to failover. One transaction each."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from trimtab_controller.core.model import Actor, Host, Operation, Vm
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.recovering import recover
from trimtab_controller.operations.superseding import supersede
from trimtab_controller.store import events, failover, operations
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, InvalidRequest

__all__ = ["clean_copy", "confirm_off", "recover", "release", "set_paused", "settle_move"]

REASON_MAX = 400


def settle_move(session: Session, vm: Vm, host_id: str, *, now: datetime, actor: Actor) -> Operation:
    """Supersede a migration whose other side is proven gone; accept vm.settle_move, which makes this host the vm's home.

    Its record, claims of both sides included, stays until the guest was seen there.
    """
    supersede(session, vm.id, by="the end of its broken move", now=now)
    return _accept_own(session, "vm.settle_move", vm, {"vm_id": vm.id, "host_id": host_id}, now=now, actor=actor)


def clean_copy(session: Session, vm: Vm, host_id: str, *, kill: bool, now: datetime, actor: Actor) -> Operation | None:
    """Accept the removal of what a host holds of a vm that lives elsewhere; None where that is under way already."""
    params = {"vm_id": vm.id, "host_id": host_id, "kill": kill}
    if any(one.kind == "vm.clean_copy" and one.params == params for one in operations.live_of(session, vm.id)):
        return None
    return _accept_own(session, "vm.clean_copy", vm, params, now=now, actor=actor)


def _accept_own(session: Session, kind: str, vm: Vm, params: Mapping[str, Any], *, now: datetime, actor: Actor) -> Operation:
    return accept(
        session,
        kind,
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params=params,
        actor=actor,
        priority=1000 + vm.priority,
        now=now,
    )


def set_paused(session: Session, is_paused: bool, *, actor: Actor, now: datetime) -> None:
    failover.set_control(session, now=now, is_paused=is_paused)
    verb = "paused" if is_paused else "resumed"
    _tell(session, f"failover.{verb}", "failover", f"{actor.name} {verb} failover", actor, now)


def release(session: Session, host: Host, *, reason: str, actor: Actor, now: datetime) -> None:
    """Let a host be recovered although failover is frozen."""
    _check_reason(reason)
    present = failover.control(session).released
    failover.set_control(session, now=now, released={**present, host.id: {"by": actor.name, "reason": reason}})
    _tell(session, "failover.released", host.id, f"{actor.name} released {host.name} for recovery: {reason}", actor, now)


def confirm_off(session: Session, host: Host, *, reason: str, actor: Actor, now: datetime) -> None:
    """Take an operator's word that a host is off. Conflict where the host is heard from: then it is not."""
    _check_reason(reason)
    if host.connectivity.value in {"up", "new"}:
        raise Conflict(
            "host-is-heard",
            f"{host.name} renews its lease, so it is not off; see `trimtab host get {host.name}`",
            host_id=host.id,
        )
    present = failover.control(session).confirmed_off
    failover.set_control(session, now=now, confirmed_off={**present, host.id: {"by": actor.name, "reason": reason}})
    _tell(session, "host.confirmed_off", host.id, f"{actor.name} confirmed that {host.name} is off: {reason}", actor, now)


def _check_reason(reason: str) -> None:
    if not 1 <= len(reason.strip()) <= REASON_MAX:
        raise InvalidRequest("reason-missing", f"reason: say why, in 1 to {REASON_MAX} characters", field="reason")


def _tell(session: Session, kind: str, subject_id: str, message: str, actor: Actor, now: datetime) -> None:
    events.append(session, kind=kind, subject_id=subject_id, actor=actor.name, message=message, now=now)
