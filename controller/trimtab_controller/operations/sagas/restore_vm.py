"""vm.restore: a backup becomes a new vm with an identity of its own, wherever the scheduler finds a place for it.

| step          | do                                                                    | undo                                        |
|---------------|-----------------------------------------------------------------------|---------------------------------------------|
| own           | (row, disks, nics and placement request came with the acceptance)       | withdraw, erase names, MACs, space, quota   |
| place         | wait for the leader's answer: host and epoch                            | give the claims back                        |
| make_volumes  | the agent's jobs: fill each disk, read it back, compare                 | cancel the jobs, delete each volume         |
| define        | define domain, seed, NVRAM                                              | kill and undefine                           |
| power_on      | start (unless `start` is false)                                         | - define's undo kills                       |
| finish        | record what was seen; the backup was restored and compared: level 2     | - last                                      |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Backup, Volume
from trimtab_controller.operations import backup_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, describe, events, placements, vms, volume_claims
from trimtab_protos.messages import CommandKey, Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    backup_id: str
    # Volume -> the disk of the backup that fills it.
    disks: Mapping[str, str]
    start: bool = True
    to_host_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """Nothing to do: the rows were inserted with the operation, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    placements.withdraw(context.session, context.operation.id)
    vm_steps.erase_vm(context)


def _fill(context: Effect[Params]) -> Json | Wait:
    host_id = vm_steps.chosen_host(context.results)
    backup: Backup = context.read(lambda session: backups.get(session, context.params.backup_id))
    backup_steps.open_on(context, host_id, backup.repo_id)
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    written = 0
    for volume, key in _jobs(context, disks.volumes):
        job = context.agents.start_restore(
            host_id,
            key,
            repo_id=backup.repo_id,
            vm_id=backup.vm_id,
            backup_id=backup.id,
            disk=context.params.disks[volume.id],
            volume=describe.volume_spec(volume, {}),
            pool=describe.pool_spec(disks.pools[volume.pool_id]),
        )
        done = backup_steps.follow(job, f"disk {context.params.disks[volume.id]}", lambda job: _written(job.restore))
        if isinstance(done, Wait):
            return done
        written += int(done["written_bytes"])
    return {"volume_ids": [volume.id for volume in disks.volumes], "written_bytes": written, "host_id": host_id}


def _written(restored: object) -> Json:
    return {"written_bytes": getattr(restored, "written_bytes", 0)}


def _jobs(context: Effect[Params], volumes: tuple[Volume, ...]) -> Iterator[tuple[Volume, CommandKey]]:
    epoch = int(context.results["place"]["epoch"])
    for volume in volumes:
        if volume.id in context.params.disks:
            yield (
                volume,
                context.key(subject_id=context.params.vm_id, epoch=epoch, part=f"fill-{volume.id}", direction=Direction.DO),
            )


def _end_jobs(context: Effect[Params], volumes: tuple[Volume, ...]) -> Wait | None:
    """Cancel every job; return what to wait for. What a job has filled already is deleted by the undo."""
    waiting = None
    for _volume, key in _jobs(context, volumes):
        ended = backup_steps.end_job(context, vm_steps.chosen_host(context.results), key)
        if isinstance(ended, Wait):
            waiting = ended
    return waiting


def _cancel_fill(context: Effect[Params]) -> Wait | Stopped:
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    return _end_jobs(context, disks.volumes) or Stopped()


def _empty(context: Effect[Params]) -> Wait | None:
    if "place" not in context.results:
        return None
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    if (waiting := _end_jobs(context, disks.volumes)) is not None:
        return waiting
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    for volume in disks.volumes:
        key = context.key(subject_id=context.params.vm_id, epoch=epoch, part=volume.id)
        context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(disks.pools[volume.pool_id]))
    return None


def _power_on(context: Effect[Params]) -> Json:
    if context.params.start:
        return vm_steps.power_on(context)
    host_id = vm_steps.chosen_host(context.results)
    return vm_steps.seen_json(host_id, context.agents.get_domain(host_id, context.params.vm_id))


def _finish(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    volume_claims.mark_present(session, context.results["make_volumes"]["volume_ids"])
    vm_steps.record_seen(context, "power_on")
    vms.update(session, vm_id, problem="")
    if context.results["power_on"]["state"] == ObservedState.STOPPED.value:
        vm_steps.give_back_compute(context)
    backup = backups.get(session, context.params.backup_id)
    # Each disk was read back and compared with what was backed up.
    backups.update(session, backup.id, level=max(2, backup.level), verified_at=context.now)
    vm = vms.get(session, vm_id)
    events.append(
        session,
        kind="vm.restored",
        project_id=vm.project_id,
        subject_id=vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} restored from {backup.id} of {backup.vm_name}",
        context={"host_id": vm.host_id, "backup_id": backup.id},
        now=context.now,
    )


SAGA = Saga(
    name="vm.restore",
    version=1,
    params=Params,
    result=lambda results: {
        "host_id": results["place"]["host_id"],
        "written_bytes": results["make_volumes"]["written_bytes"],
    },
    steps=(
        transaction("own", _own, _disown),
        vm_steps.place("create"),
        effect("make_volumes", _fill, _empty, cancel=_cancel_fill),
        effect("define", vm_steps.define, vm_steps.undefine_everywhere),
        effect("power_on", _power_on, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
