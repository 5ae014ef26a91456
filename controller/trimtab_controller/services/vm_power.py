"""The verbs of a vm: each records the wish and accepts one operation. What follows is the saga's."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.drift import RUNS_TWICE
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Actor, Operation, Project, Vm
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.superseding import supersede
from trimtab_controller.services import layered
from trimtab_controller.services.vms import resolve_host
from trimtab_controller.store import describe, lookup, operations, schema, vms
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound

OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateSpec:
    to_host: str = ""
    bandwidth_mib_s: int = 0
    auto_converge: bool = False
    allow_postcopy: bool = False
    timeout_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who wants it, under which expectation."""

    actor: Actor
    expected_version: int | None
    now: datetime


def find(session: Session, name_or_id: str, *, project: Project, with_deleted: bool = False) -> Vm:
    """Return the vm. NotFound says so where one was deleted and can come back."""
    vm = vms.find(session, project.id, name_or_id, with_deleted=True)
    if vm is not None and (vm.deleted_at is None or with_deleted):
        return vm
    hint = f"; it was deleted, `trimtab vm undelete {vm.name}` brings it back" if vm is not None else ""
    raise NotFound("vm-not-found", f"there is no vm {name_or_id} in project {project.name}{hint}", vm=name_or_id)


def start(session: Session, vm: Vm, caller: Caller, *, to_host: str = "") -> Operation:
    to_host_id = resolve_host(session, to_host, actor=caller.actor)
    if vm.attention == RUNS_TWICE:
        raise Conflict("vm-runs-twice", f"vm {vm.name} is not started: {vm.problem}"[:1000], vm=vm.name)
    if vm.has_tpm and vm.host_id:
        if to_host_id not in {"", vm.host_id}:
            raise Conflict(
                "tpm-stays",
                f"vm {vm.name} has a TPM, whose state is on its host: it starts there; once it runs, "
                f"`trimtab vm migrate {vm.name} --to {to_host}` takes the TPM along",
            )
        to_host_id = vm.host_id
    return _accept(session, vm, caller, "vm.start", {"to_host_id": to_host_id}, desired=DesiredPower.RUNNING)


def stop(session: Session, vm: Vm, caller: Caller, *, force: bool, timeout_s: int) -> Operation:
    """Stop the guest; with `force` at once, whatever else was under way."""
    params = {"force": force, "timeout_s": timeout_s}
    return _accept(session, vm, caller, "vm.stop", params, desired=DesiredPower.STOPPED, supersedes=force)


def reboot(session: Session, vm: Vm, caller: Caller, *, force: bool) -> Operation:
    _refuse_off(vm, "rebooted")
    return _accept(session, vm, caller, "vm.reboot", {"force": force})


def pause(session: Session, vm: Vm, caller: Caller) -> Operation:
    _refuse_off(vm, "paused")
    return _accept(session, vm, caller, "vm.pause", {}, desired=DesiredPower.PAUSED)


def resume(session: Session, vm: Vm, caller: Caller) -> Operation:
    _refuse_off(vm, "resumed")
    return _accept(session, vm, caller, "vm.resume", {}, desired=DesiredPower.RUNNING)


def migrate(session: Session, vm: Vm, caller: Caller, spec: MigrateSpec) -> Operation:
    _refuse_off(vm, "migrated live")
    devices = ", ".join(sorted(vm.wishes.get("devices", {})))
    if devices:
        raise Conflict(
            "device-keeps-home",
            f"vm {vm.name} has host device {devices}, which cannot move while it runs; stop it and start it elsewhere",
            vm=vm.name,
        )
    to_host_id = resolve_host(session, spec.to_host, actor=caller.actor)
    if to_host_id and to_host_id == vm.host_id:
        raise Conflict("vm-is-there", f"vm {vm.name} is on host {spec.to_host} already")
    layered.refuse_to_copy(session, describe.read_vm(session, vm.id).local_volumes, vm_name=vm.name)
    params = {
        "to_host_id": to_host_id,
        "bandwidth_mib_s": spec.bandwidth_mib_s,
        "auto_converge": spec.auto_converge,
        "allow_postcopy": spec.allow_postcopy,
        "timeout_s": spec.timeout_s,
    }
    return _accept(session, vm, caller, "vm.migrate", params)


def delete(session: Session, vm: Vm, caller: Caller) -> Operation:
    """Accept the deletion, whatever else was under way. Conflict while other vms are linked clones of this one."""
    layered.refuse_base(session, vm)
    return _accept(session, vm, caller, "vm.delete", {}, desired=DesiredPower.DELETED, supersedes=True)


def undelete(session: Session, vm: Vm, caller: Caller) -> Operation:
    """Accept the return of a deleted vm. Conflict past its grace, AlreadyExists where its name was given away."""
    if vm.deleted_at is None:
        raise Conflict("vm-not-deleted", f"vm {vm.name} is not deleted")
    if vm.purge_after is None or vm.purge_after <= caller.now:
        raise Conflict("vm-purged", f"vm {vm.name} is past its 24 h; restore it from a backup")
    if vms.find(session, vm.project_id, vm.name) is not None:
        raise AlreadyExists("vm-exists", f"another vm is called {vm.name} now; delete that one first", name=vm.name)
    if caller.expected_version is not None and vm.version != caller.expected_version:
        raise Conflict("stale-etag", f"vm {vm.name} changed since you read it; read it again, then decide")
    return accept_on_vm(session, vm, caller, "vm.undelete", {})


def purge(session: Session, vm: Vm, caller: Caller) -> Operation:
    """Accept the end of a deleted vm's grace: its disks, addresses and quota go now. Conflict where it is not deleted."""
    if vm.deleted_at is None:
        raise Conflict(
            "vm-not-deleted",
            f"vm {vm.name} is not deleted: `trimtab vm delete {vm.name}` comes first; a deleted vm of the same name goes by its id "
            "(`trimtab vm list --deleted -o wide`)",
        )
    if caller.expected_version is not None and vm.version != caller.expected_version:
        raise Conflict("stale-etag", f"vm {vm.name} changed since you read it; read it again, then decide")
    return accept_on_vm(session, vm, caller, "vm.purge", {})


def _refuse_off(vm: Vm, what: str) -> None:
    """A guest that was proven off cannot be paused or moved live; an unknown one is left to the host to answer for."""
    if vm.observed_state in OFF and vm.desired_power is not DesiredPower.RUNNING:
        raise Conflict(
            "vm-not-running",
            f"vm {vm.name} is {vm.observed_state.value} and cannot be {what}; start it with `trimtab vm start {vm.name}`",
            state=vm.observed_state.value,
        )


def _accept(
    session: Session,
    vm: Vm,
    caller: Caller,
    kind: str,
    params: Mapping[str, Any],
    *,
    desired: DesiredPower | None = None,
    supersedes: bool = False,
) -> Operation:
    # What a user wishes answers all that was left to them but one: only the drift loop sees whether a second guest is gone.
    attention = vm.attention if vm.attention == RUNS_TWICE else ""
    values = {"desired_power": desired.value, "attention": attention} if desired is not None else {}
    if values or caller.expected_version is not None:
        lookup.update_version(session, schema.vm, f"vm {vm.name}", vm.id, expected_version=caller.expected_version, **values)
    operation_id = mint("op")
    if supersedes:
        _supersede(session, vm, by=f"{kind} {operation_id}", now=caller.now)
    return accept_on_vm(session, vm, caller, kind, params, operation_id=operation_id)


def _supersede(session: Session, vm: Vm, *, by: str, now: datetime) -> None:
    """Close what locks the vm, except a deletion: nothing takes over from that but itself."""
    live = operations.live_exclusive(session, vm.id)
    if live is not None and live.kind not in {"vm.delete", "vm.purge"}:
        supersede(session, vm.id, by=by, now=now)


def accept_on_vm(
    session: Session, vm: Vm, caller: Caller, kind: str, params: Mapping[str, Any], *, operation_id: str = ""
) -> Operation:
    """Accept an operation of this caller on the vm."""
    return accept(
        session,
        kind,
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={"vm_id": vm.id, **params},
        actor=caller.actor,
        now=caller.now,
        operation_id=operation_id or None,
    )
