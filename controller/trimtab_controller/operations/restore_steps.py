"""Steps of the sagas that fill a vm's disks from a backup: a restore, and the boot test. Their Params have vm_id, backup_id, disks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab_controller.agents.backups import BackupDisk
from trimtab_controller.core.model import Backup, Volume
from trimtab_controller.operations import backup_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Stopped, Wait
from trimtab_controller.store import backups, describe, vms, wires
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import CommandKey, Direction, DomainObservation, DomainState

POLL_S = 2.0
CONSOLE_BYTES = 64 << 10


def fill(context: Effect[Any]) -> Json | Wait:
    host_id = vm_steps.chosen_host(context.results)
    backup: Backup = context.read(lambda session: backups.get(session, context.params.backup_id))
    backup_steps.open_on(context, host_id, backup.repo_id)
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    home, written = describe.state_volume(disks.volumes), 0
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
            # Its UEFI variables lie beside the disk that it boots from.
            state_for_vm_id=context.params.vm_id if home is not None and volume.id == home.id else "",
        )
        done = backup_steps.follow(job, f"disk {context.params.disks[volume.id]}", lambda job: _written(job.restore))
        if isinstance(done, Wait):
            return done
        written += int(done["written_bytes"])
    return {"volume_ids": [volume.id for volume in disks.volumes], "written_bytes": written, "host_id": host_id}


def disk_of(context: Effect[Any], volume: Volume) -> BackupDisk:
    """Return what a volume that is being filled reads from, opened on no host yet."""
    backup: Backup = context.read(lambda session: backups.get(session, volume.fill_backup_id))
    return BackupDisk(repo_id=backup.repo_id, vm_id=backup.vm_id, backup_id=backup.id, disk=volume.fill_disk)


def lay_over(context: Effect[Any]) -> Json:
    """Make each disk an empty layer over the backup, which is served to it from now on."""
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    home = describe.state_volume(disks.volumes)
    for volume in disks.volumes:
        if volume.fill_backup_id:
            disk = disk_of(context, volume)
            backup_steps.open_on(context, host_id, disk.repo_id)
            context.agents.serve_backup(
                host_id,
                context.key(subject_id=context.params.vm_id, epoch=epoch, part=f"lay-{volume.id}"),
                disk,
                volume=describe.volume_spec(volume, {}),
                pool=describe.pool_spec(disks.pools[volume.pool_id]),
                makes_volume=True,
                state_for_vm_id=context.params.vm_id if home is not None and volume.id == home.id else "",
            )
    return {"volume_ids": [volume.id for volume in disks.volumes], "written_bytes": 0, "host_id": host_id}


def _written(restored: object) -> Json:
    return {"written_bytes": getattr(restored, "written_bytes", 0)}


def _jobs(context: Effect[Any], volumes: tuple[Volume, ...]) -> Iterator[tuple[Volume, CommandKey]]:
    epoch = int(context.results["place"]["epoch"])
    for volume in volumes:
        if volume.id in context.params.disks:
            yield (
                volume,
                context.key(subject_id=context.params.vm_id, epoch=epoch, part=f"fill-{volume.id}", direction=Direction.DO),
            )


def _end_jobs(context: Effect[Any], volumes: tuple[Volume, ...]) -> Wait | None:
    """Cancel every job; return what to wait for. What a job has filled already is deleted by the undo."""
    waiting = None
    for _volume, key in _jobs(context, volumes):
        ended = backup_steps.end_job(context, vm_steps.chosen_host(context.results), key)
        if isinstance(ended, Wait):
            waiting = ended
    return waiting


def cancel_fill(context: Effect[Any]) -> Wait | Stopped:
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    return _end_jobs(context, disks.volumes) or Stopped()


def empty(context: Effect[Any]) -> Wait | None:
    if "place" not in context.results:
        return None
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    if (waiting := _end_jobs(context, disks.volumes)) is not None:
        return waiting
    vm_steps.undefine_everywhere(context)  # nothing is defined yet; the UEFI variables go with it
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    for volume in disks.volumes:
        key = context.key(subject_id=context.params.vm_id, epoch=epoch, part=volume.id)
        context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(disks.pools[volume.pool_id]))
    return None


def sign(context: Effect[Any], *, pattern: str, timeout_s: int, tcp_port: int = 0, needs_agent: bool = False) -> Json | Wait:
    """Wait for the guest's sign of life: the pattern on its serial port and an answer at the TCP port, as far as they are given, else its
    agent, which `needs_agent` asks for beside them too. A guest that shows none is no error but a result."""
    host_id, vm_id = vm_steps.chosen_host(context.results), context.params.vm_id
    seen = context.agents.get_domain(host_id, vm_id)
    took_ms = int((context.now - context.operation.created_at).total_seconds() * 1000)
    wanted = _missing_sign(context, seen, pattern=pattern, tcp_port=tcp_port)
    if wanted is None and not seen.has_guest_agent and (needs_agent or not (pattern or tcp_port)):
        wanted = _Missing("the guest agent")
    if wanted is None:
        return {"recovery_ms": took_ms, "problem": ""}
    if seen.state not in {DomainState.RUNNING, DomainState.PAUSED}:
        return {"recovery_ms": 0, "problem": f"the guest is {seen.state.value}; it never showed {wanted.name}"}
    if context.waited_s >= timeout_s:
        why = f": {wanted.why}" if wanted.why else ""
        return {"recovery_ms": 0, "problem": f"the guest did not show {wanted.name} within {timeout_s} s{why}"}
    return Wait(POLL_S, f"{wanted.name} (for {timeout_s - int(context.waited_s)} s more)")


@dataclass(frozen=True, slots=True)
class _Missing:
    name: str
    why: str = ""


def _missing_sign(context: Effect[Any], seen: DomainObservation, *, pattern: str, tcp_port: int) -> _Missing | None:
    """Return the first sign of these that the guest does not show now."""
    host_id, vm_id = vm_steps.chosen_host(context.results), context.params.vm_id
    if pattern:
        console, _ = context.agents.read_console(host_id, vm_id, -CONSOLE_BYTES, CONSOLE_BYTES)
        if re.search(pattern, console.decode(errors="replace")) is None:
            return _Missing(f"`{pattern}` on the serial port")
    if tcp_port:
        name = f"an answer at TCP port {tcp_port}"
        if seen.state is not DomainState.RUNNING:
            return _Missing(name)
        nics = wires.nics_of(context.read(lambda session: vms.get(session, vm_id)))
        try:
            knocked = context.agents.knock_guest(host_id, vm_id, nics, tcp_port)
        except Conflict as refused:
            if refused.code != "wrong-domain-state":
                raise
            return _Missing(name)  # it ended since it was looked at, which the next look tells
        if not knocked.has_answered:
            return _Missing(name, knocked.problem)
    return None
