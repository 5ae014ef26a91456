"""vm.bring_back: the disks of a vm whose host is lost come back from its last backup on another host, and the vm is recovered there.

| step   | do                                                                          | undo                                    |
|--------|-----------------------------------------------------------------------------|-----------------------------------------|
| own    | (rows and quota of the new disks came with the acceptance)                    | free their names, space and quota       |
| place  | a host that has room for all of them                                          | give the space back                     |
| fill   | the agent's jobs: fill each new disk, read it back, compare                   | cancel the jobs, delete each new disk   |
| assign | if the host is still fenced: the vm has the new disks and home, and is recovered | - last: from here on it is vm.recover's |

It locks nothing: until `assign` the vm is what it was, and a host that returns in time starts it with what it had. `assign` is one
transaction that looks at host, proof and epoch again, swaps the disks, raises the epoch and accepts `vm.recover`, fenced as every
recovery is. The lost disks belong to nobody from then on; they lie where they lay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity, ObservedState
from trimtab_controller.core.lost_disks import PROOFS, loss_text
from trimtab_controller.core.model import Actor, Backup, Vm, Volume
from trimtab_controller.operations import backup_steps, swap_steps
from trimtab_controller.operations.recovering import recover
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import (
    backup_repos,
    backups,
    claims,
    describe,
    events,
    failover,
    hosts,
    operations,
    reach,
    vms,
    volume_claims,
    volumes,
)
from trimtab_protos.errors import Conflict, NoCapacity
from trimtab_protos.messages import CommandKey, Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    backup_id: str
    # The host that was lost, and the vm's epoch then.
    host_id: str
    epoch: int
    # New volume -> the old one, and the disk of the backup that fills it.
    replaced: Mapping[str, str]
    disks: Mapping[str, str]


def _place(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    _still_lost(context)
    wanted = [describe.get_volume(session, volume_id) for volume_id in params.replaced]
    repo = backup_repos.get(session, backups.get(session, params.backup_id).repo_id)
    for host in reach.hosts_by_space(session, wanted[0].pool_id):
        if repo.host_id in {"", host.id} and host.id != params.host_id and _fits(context, wanted, host.id):
            return {"host_id": host.id}
    raise NoCapacity(
        "no-room-for-disks", f"no host that is up has room for the {len(wanted)} disks in its pools and reaches {repo.name}"
    )


def _fits(context: Transaction[Params], wanted: list[Volume], host_id: str) -> bool:
    with context.session.begin_nested() as attempt:
        for volume in wanted:
            pool = describe.get_pool(context.session, volume.pool_id)
            if not volume_claims.take_place(context.session, volume, pool, host_id):
                attempt.rollback()
                return False
    return True


def _key(context: Effect[Params], volume_id: str) -> CommandKey:
    # Keyed by the operation: the vm's own turn and epoch are not touched before it is assigned.
    return context.key(subject_id=context.operation.id, part=f"fill-{volume_id}", direction=Direction.DO)


def _fill(context: Effect[Params]) -> Json | Wait:
    host_id = str(context.results["place"]["host_id"])
    backup: Backup = context.read(lambda session: backups.get(session, context.params.backup_id))
    backup_steps.open_on(context, host_id, backup.repo_id)
    volumes_here = {volume_id: swap_steps.volume_in_pool(context, volume_id) for volume_id in context.params.disks}
    boots_from = min(volumes_here, key=lambda one: context.params.disks[one])
    for volume_id, disk in context.params.disks.items():
        volume, pool = volumes_here[volume_id]
        job = context.agents.start_restore(
            host_id,
            _key(context, volume_id),
            repo_id=backup.repo_id,
            vm_id=backup.vm_id,
            backup_id=backup.id,
            disk=disk,
            volume=describe.volume_spec(volume, {}),
            pool=pool,
            state_for_vm_id=context.params.vm_id if volume_id == boots_from else "",
        )
        done = backup_steps.follow(job, f"disk {disk}", lambda _job: {})
        if isinstance(done, Wait):
            return done
    return {"host_id": host_id}


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
    for volume_id in context.params.replaced:
        volume, pool = swap_steps.volume_in_pool(context, volume_id)
        key = context.key(subject_id=context.operation.id, part=volume_id)
        context.agents.delete_volume(str(context.results["place"]["host_id"]), key, volume.id, volume.format, pool)
    return None


def _still_lost(context: Transaction[Params]) -> Vm:
    """Return the vm. Conflict where its host is back, or anything else about it is not as it was when this was accepted."""
    session, params = context.session, context.params
    vm, host = vms.get(session, params.vm_id), hosts.get(session, params.host_id)
    record = failover.open_record(session, params.host_id)
    is_lost = host.connectivity is HostConnectivity.FENCED and record is not None and record.proof in PROOFS
    is_same = (vm.host_id, vm.epoch) == (params.host_id, params.epoch) and vm.deleted_at is None and not vm.attention
    is_idle = operations.live_exclusive(session, vm.id) is None and claims.migration_of(session, vm.id) is None
    if not (is_lost and is_same and is_idle and vm.desired_power is DesiredPower.RUNNING):
        raise Conflict(
            "vm-not-lost",
            f"vm {vm.name} or its host {host.name} is not as it was: its disks are left as they are",
            host_id=host.id,
        )
    return vm


def _assign(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    vm, host_id = _still_lost(context), str(context.results["place"]["host_id"])
    backup = backups.get(session, params.backup_id)
    olds = {new_id: describe.get_volume(session, old_id) for new_id, old_id in params.replaced.items()}
    volume_claims.detach(session, [old.id for old in olds.values()])
    for new_id, old in olds.items():
        volumes.rename(session, old.id, f"{old.name[:44]}-lost-{old.id[-8:]}")
        volumes.take_over(session, new_id, old, vm_id=vm.id)
        volumes.rename(session, new_id, old.name)
    volume_claims.mark_present(session, list(olds))
    seen = {"observed_host_id": host_id, "observed_state": ObservedState.ABSENT.value}
    vms.update(session, vm.id, host_id=host_id, **seen)
    lost_s = (context.now - (backup.taken_at or backup.created_at)).total_seconds()
    because = f"its disks came back from backup {backup.id}; {loss_text(lost_s)} of it are lost"
    operation = recover(
        session, vms.get(session, vm.id), because=because, now=context.now, actor=Actor(name=context.operation.actor)
    )
    backups.update(session, backup.id, level=max(2, backup.level), verified_at=context.now)
    _tell(context, vm, because, operation.id)
    return {"host_id": host_id, "operation_id": operation.id, "loss_window_s": lost_s}


def _tell(context: Transaction[Params], vm: Vm, because: str, operation_id: str) -> None:
    session, host_id = context.session, context.params.host_id
    record = failover.open_record(session, host_id)
    assert record is not None
    line = {"at": context.now.isoformat(), "what": f"{vm.name}: {because}", "proof": ""}
    failover.write_record(session, host_id, failover_id=record.id, now=context.now, evidence=[*record.evidence, line])
    failover.write_vm(
        session, record.id, vm.id, now=context.now, operation_id=operation_id, state="starting", why="", ended_at=None
    )
    events.append(
        session,
        kind="vm.brought_back",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name}: {because}",
        context={"backup_id": context.params.backup_id, "host_id": host_id},
        now=context.now,
    )


SAGA = Saga(
    name="vm.bring_back",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: results["assign"],
    steps=(
        transaction("own", swap_steps.own, swap_steps.disown),
        transaction("place", _place, swap_steps.unplace),
        effect("fill", _fill, _unfill, cancel=_cancel_fill),
        transaction("assign", _assign, None, because="from here on it is the recovery's"),
    ),
)
