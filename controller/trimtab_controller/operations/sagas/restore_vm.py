"""vm.restore: a backup becomes a new vm with an identity of its own, wherever the scheduler finds a place for it.

| step          | do                                                                    | undo                                        |
|---------------|-----------------------------------------------------------------------|---------------------------------------------|
| own           | (row, disks, nics and placement request came with the acceptance)       | withdraw, erase names, MACs, space, quota   |
| place         | wait for the leader's answer: host and epoch                            | give the claims back                        |
| make_volumes  | the agent's jobs: fill each disk, read it back, compare                 | cancel the jobs, delete each volume         |
|               | or, `is_instant`: an empty layer over each disk of the backup          |                                             |
| define        | define domain, seed, NVRAM                                              | kill and undefine                           |
| power_on      | start (unless `start` is false)                                         | - define's undo kills                       |
| sign          | where asked: wait for a sign of life of the guest, or too long          | - it only looks                             |
| finish        | record what was seen; the backup was restored and compared: level 2     | - last                                      |
|               | instant: accept `vm.fill`, which fills the disks while the guest runs   |                                             |
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Actor
from trimtab_controller.operations import restore_steps, vm_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, events, placements, vms, volume_claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    backup_id: str
    # Volume -> the disk of the backup that fills it.
    disks: Mapping[str, str]
    start: bool = True
    is_instant: bool = False
    # Of an instant one: how fast its disks are filled, and what it gets once they are.
    bandwidth_mib_s: int = 0
    ha: str = ""
    to_host_id: str = ""
    # What its guest has to show: '' nothing, `agent`, `pattern`. The result says whether it did.
    awaits: str = ""
    pattern: str = ""
    timeout_s: int = 300


def _own(context: Transaction[Params]) -> Json:
    """Nothing to do: the rows were inserted with the operation, so that the name was taken at once."""
    return {"awaits": context.params.awaits}


def _disown(context: Transaction[Params]) -> None:
    placements.withdraw(context.session, context.operation.id)
    vm_steps.erase_vm(context)


def _finish(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    volume_claims.mark_present(session, context.results["make_volumes"]["volume_ids"])
    vm_steps.record_seen(context, "power_on")
    vms.update(session, vm_id, problem="")
    if context.results["power_on"]["state"] == ObservedState.STOPPED.value:
        vm_steps.give_back_compute(context)
    if context.params.is_instant:
        _fill_on(context)
        return
    backup = backups.get(session, context.params.backup_id)
    # Each disk was read back and compared with what was backed up.
    backups.update(session, backup.id, level=max(2, backup.level), verified_at=context.now)
    _tell(context)


def _tell(context: Transaction[Params], how: str = "") -> None:
    session, backup_id = context.session, context.params.backup_id
    vm, of = vms.get(session, context.params.vm_id), backups.get(session, backup_id).vm_name
    events.append(
        session,
        kind="vm.restored",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} restored from {backup_id} of {of}{how}",
        context={"host_id": vm.host_id, "backup_id": backup_id},
        now=context.now,
    )


def _make(context: Effect[Params]) -> Json | Wait:
    return restore_steps.lay_over(context) if context.params.is_instant else restore_steps.fill(context)


def _sign(context: Effect[Params]) -> Json | Wait:
    params = context.params
    return restore_steps.sign(context, pattern=params.pattern if params.awaits == "pattern" else "", timeout_s=params.timeout_s)


def _nothing_awaited(results: Mapping[str, Json]) -> Json | None:
    return None if results["own"].get("awaits") else {"recovery_ms": 0, "problem": ""}


def _fill_on(context: Transaction[Params]) -> None:
    """The guest runs on the backup; another operation fills its disks and gives it what a whole vm may have."""
    params, vm = context.params, vms.get(context.session, context.params.vm_id)
    accept(
        context.session,
        "vm.fill",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={"vm_id": vm.id, "bandwidth_mib_s": params.bandwidth_mib_s, "ha": params.ha},
        actor=Actor(name=context.operation.actor),
        now=context.now,
    )
    _tell(context, "; its disks are filled while it runs")


SAGA = Saga(
    name="vm.restore",
    version=1,
    params=Params,
    result=lambda results: {
        "host_id": results["place"]["host_id"],
        "written_bytes": results["make_volumes"]["written_bytes"],
        "recovery_ms": results["sign"]["recovery_ms"],
        "problem": results["sign"]["problem"],
    },
    steps=(
        transaction("own", _own, _disown),
        vm_steps.place("create"),
        effect("make_volumes", _make, restore_steps.empty, cancel=restore_steps.cancel_fill),
        effect("define", vm_steps.define, vm_steps.undefine_everywhere),
        effect("power_on", vm_steps.power_on_if_asked, None, because="the undo of `define` kills"),
        effect("sign", _sign, None, because="it only looks", known=_nothing_awaited),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
