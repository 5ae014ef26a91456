"""vm.fill: a vm that runs on a backup gets disks that stand alone, copied under it while it runs.

| step   | do                                                                            | undo                               |
|--------|-------------------------------------------------------------------------------|------------------------------------|
| own    | nothing: a cancel comes too late from here on (pivot)                           | - a half is of no use: only forward |
| fill   | the agent's jobs, disk by disk: copy what still reads from the backup           | - a half is of no use: only forward |
| finish | the disks stand alone; `vm.set_ha` is asked for where the vm shall be kept       | - last                             |

Nothing ends it but the disks being whole or the vm being deleted: where the guest is off, its host down, the repository away, it waits
and says for what. While it lives, whatever needs whole disks is refused (`core.background`), and a lost host loses the vm: its disks
are in the backup, which can be restored again.
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.model import Actor, Vm, Volume
from trimtab_controller.operations import backup_steps, restore_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.operations.sagas import set_ha
from trimtab_controller.store import describe, events, operations, vms, volumes
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import Direction

RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    bandwidth_mib_s: int = 0
    # Given to the vm once its disks are whole; '' leaves what it has.
    ha: str = ""


def _own(_context: Transaction[Params]) -> None:
    """Nothing to do: from here on a cancel comes too late."""


def _fill(context: Effect[Params]) -> Json | Wait:
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if _is_leaving(vm):
        return {"is_whole": False, "volume_ids": []}
    done = []
    for volume in context.read(lambda session: volumes.that_fill(session, vm_id=vm.id)):
        try:
            waiting = _fill_one(context, vm, volume)
        except TrimtabError as error:
            # Whatever it is, the disk is not whole, and there is nothing to go back to: said, and tried again.
            return Wait(RETRY_S, f"disk {volume.name} cannot be filled now: {error.message}"[:500])
        if waiting is not None:
            return waiting
        done.append(volume.id)
    return {"is_whole": True, "volume_ids": done}


def _is_leaving(vm: Vm) -> bool:
    return vm.deleted_at is not None or vm.desired_power is DesiredPower.DELETED


def _fill_one(context: Effect[Params], vm: Vm, volume: Volume) -> Wait | None:
    if not vm.host_id:
        return Wait(RETRY_S, f"vm {vm.name} to be started: its disks are filled while it runs")
    parts = context.read(lambda session: describe.read_vm(session, vm.id))
    disk = restore_steps.disk_of(context, volume)
    backup_steps.open_on(context, vm.host_id, disk.repo_id)
    job = context.agents.start_fill(
        vm.host_id,
        # On another host, or after the vm was started again, it is another job.
        context.key(subject_id=context.operation.id, part=f"fill-{volume.id}-{vm.epoch}", direction=Direction.DO),
        disk,
        volume=describe.volume_spec(volume, {}),
        pool=describe.pool_spec(parts.pools[volume.pool_id]),
        domain=context.read(lambda session: describe.domain_spec(session, parts, vm.host_id)),
        bandwidth_mib_s=context.params.bandwidth_mib_s,
    )
    followed = backup_steps.follow(job, f"disk {volume.name} to be filled from {disk.backup_id}", lambda _job: {})
    return followed if isinstance(followed, Wait) else None


def _finish(context: Transaction[Params]) -> Wait | None:
    session, filled = context.session, context.results["fill"]
    if not filled["is_whole"]:
        return None
    for volume_id in filled["volume_ids"]:
        volumes.set_filling(session, volume_id, backup_id="", disk="")
    vm = vms.get(session, context.params.vm_id)
    if context.params.ha not in {"", vm.ha}:
        if operations.live_exclusive(session, vm.id) is not None:
            return Wait(RETRY_S, "what is under way of the vm, before its host is told that it is kept")
        _keep_again(context, vm)
    events.append(
        session,
        kind="vm.filled",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"the disks of vm {vm.name} stand alone",
        now=context.now,
    )
    return None


def _keep_again(context: Transaction[Params], vm: Vm) -> None:
    """Ask for the `ha` that the vm had: its host's warden has to know of the guest before it counts as kept."""
    accept(
        context.session,
        "vm.set_ha",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={"vm_id": vm.id, "ha": context.params.ha, **set_ha.before(vm)},
        actor=Actor(name=context.operation.actor),
        now=context.now,
    )


SAGA = Saga(
    name="vm.fill",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: {"is_whole": results["fill"]["is_whole"]},
    steps=(
        transaction("own", _own, None, because="a half is of no use: only forward, also where somebody cancels", pivot=True),
        effect("fill", _fill, None, because="a half is of no use: only forward"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
