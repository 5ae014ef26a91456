"""vm.replace: a stopped vm goes back to what a backup of it holds. Its old disks are kept until the new ones are whole and in place;
but a LUN, of which there are no two, is written over.

| step       | do                                                                  | undo                                    |
|------------|---------------------------------------------------------------------|-----------------------------------------|
| own        | (rows and quota of the new disks came with the acceptance)            | free their names, space and quota       |
| place      | claim the space where the old disks are                               | give it back                            |
| fill       | the agent's jobs: fill each new disk, read it back, compare           | cancel the jobs, delete each new disk   |
| swap       | the vm has the new disks (pivot); the old ones belong to nobody; LUNs | - from here on only forward             |
|            | are marked: the vm starts no more until they are whole                |                                         |
| define     | the agent's jobs: write each LUN over; its domain names the new disks | -                                       |
| remove     | delete the old disks                                                  | -                                       |
| finish     | free their rows; the new ones take their names; LUNs are whole again  | - last                                  |

Writing over a LUN that is cut off begins anew, whole, and so does one that met an error; nothing of what was there before comes back. Where
it cannot go on, the mark stays when the operation is given up, and another `vm.replace` from any backup of the vm takes it away.

Identity, cards and settings stay as they are; UEFI variables and a TPM do too. The new disks are other volumes, so no checkpoint of the
old content is ever believed: the next backup reads them in full.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab_controller.core.model import Backup
from trimtab_controller.operations import backup_steps, swap_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, describe, events, vms, volume_claims, volumes
from trimtab_protos.errors import NoCapacity
from trimtab_protos.messages import CommandKey, Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    backup_id: str
    # New volume -> the old one, and the disk of the backup that fills it.
    replaced: Mapping[str, str]
    disks: Mapping[str, str]
    # LUN -> the disk of the backup that is written over it.
    overwritten: Mapping[str, str] = field(default_factory=dict)


def _place(context: Transaction[Params]) -> Json:
    session = context.session
    vm = vms.get(session, context.params.vm_id)
    for volume_id in context.params.replaced:
        volume = describe.get_volume(session, volume_id)
        pool = describe.get_pool(session, volume.pool_id)
        if not volume_claims.take_place(session, volume, pool, vm.host_id):
            raise NoCapacity(
                "pool-full",
                f"pool {pool.name} has no room for {volume.size_bytes} bytes beside the disk that is replaced; make room, or restore "
                f"to a new vm elsewhere: `trimtab backup restore {context.params.backup_id} --as NAME --pool {pool.name}=OTHER`",
            )
    return {"host_id": vm.host_id, "epoch": vm.epoch}


def _key(context: Effect[Params], volume_id: str) -> CommandKey:
    epoch = int(context.results["place"]["epoch"])
    return context.key(subject_id=context.params.vm_id, epoch=epoch, part=f"fill-{volume_id}", direction=Direction.DO)


def _fill(context: Effect[Params]) -> Json | Wait:
    return _write(context, context.params.disks)


def _write(context: Effect[Params], disks: Mapping[str, str]) -> Json | Wait:
    host_id, written = str(context.results["place"]["host_id"]), 0
    if not disks:
        return {"host_id": host_id, "written_bytes": 0}
    backup: Backup = context.read(lambda session: backups.get(session, context.params.backup_id))
    backup_steps.open_on(context, host_id, backup.repo_id)
    for volume_id, disk in disks.items():
        volume, pool = swap_steps.volume_in_pool(context, volume_id)
        job = context.agents.start_restore(
            host_id,
            _key(context, volume_id),
            repo_id=backup.repo_id,
            vm_id=backup.vm_id,
            backup_id=backup.id,
            disk=disk,
            volume=describe.volume_spec(volume, {}),
            pool=pool,
        )
        done = backup_steps.follow(job, f"disk {disk}", lambda job: {"written": job.restore.written_bytes if job.restore else 0})
        if isinstance(done, Wait):
            return done
        written += int(done["written"])
    return {"host_id": host_id, "written_bytes": written}


def _end_jobs(context: Effect[Params]) -> Wait | None:
    keys = [_key(context, volume_id) for volume_id in context.params.disks]
    return backup_steps.end_all(context, str(context.results["place"]["host_id"]), keys)


def _cancel_fill(context: Effect[Params]) -> Wait | Stopped:
    return _end_jobs(context) or Stopped()


def _unfill(context: Effect[Params]) -> Wait | None:
    if "place" not in context.results:
        return None
    if (waiting := _end_jobs(context)) is not None:
        return waiting
    _delete(context, tuple(context.params.replaced))
    return None


def _delete(context: Effect[Params], volume_ids: tuple[str, ...]) -> None:
    placed = context.results["place"]
    for volume_id in volume_ids:
        volume, pool = swap_steps.volume_in_pool(context, volume_id)
        key = context.key(subject_id=context.params.vm_id, epoch=int(placed["epoch"]), part=volume_id)
        context.agents.delete_volume(str(placed["host_id"]), key, volume.id, volume.format, pool)


def _swap(context: Transaction[Params]) -> None:
    session, params = context.session, context.params
    olds = {new_id: describe.get_volume(session, old_id) for new_id, old_id in params.replaced.items()}
    volume_claims.detach(session, [old.id for old in olds.values()])
    for new_id, old in olds.items():
        volumes.take_over(session, new_id, old, vm_id=params.vm_id)
    volume_claims.mark_present(session, list(olds))
    volumes.set_half_written(session, list(params.overwritten))


def _define(context: Effect[Params]) -> Json | Wait:
    over = _write(context, context.params.overwritten)
    if isinstance(over, Wait):
        return over
    placed, vm_id = context.results["place"], context.params.vm_id
    host_id = str(placed["host_id"])
    spec = context.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm_id), host_id))
    context.agents.define_domain(host_id, context.key(subject_id=vm_id, epoch=int(placed["epoch"])), spec)
    return {"host_id": host_id, "written_bytes": over["written_bytes"]}


def _remove(context: Effect[Params]) -> Json:
    _delete(context, tuple(context.params.replaced.values()))
    return {"volume_ids": list(context.params.replaced.values())}


def _finish(context: Transaction[Params]) -> None:
    session, params = context.session, context.params
    for new_id, old_id in params.replaced.items():
        old = describe.get_volume(session, old_id)
        volume_claims.release(session, old, now=context.now)
        volumes.rename(session, new_id, old.name)
    volume_claims.mark_present(session, list(params.overwritten))
    backup = backups.get(session, params.backup_id)
    backups.update(session, backup.id, level=max(2, backup.level), verified_at=context.now)
    vm = vms.get(session, params.vm_id)
    events.append(
        session,
        kind="vm.replaced",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} is as it was in {backup.id}; start it with `trimtab vm start {vm.name}`",
        context={"backup_id": backup.id},
        now=context.now,
    )


SAGA = Saga(
    name="vm.replace",
    version=1,
    params=Params,
    result=lambda results: {
        "host_id": results["place"]["host_id"],
        "written_bytes": results["fill"]["written_bytes"] + results["define"].get("written_bytes", 0),
    },
    steps=(
        transaction("own", swap_steps.own, swap_steps.disown),
        transaction("place", _place, swap_steps.unplace),
        effect("fill", _fill, _unfill, cancel=_cancel_fill),
        transaction("swap", _swap, None, because="from here on only forward", pivot=True),
        effect("define", _define, None, because="past the pivot"),
        effect("remove", _remove, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
