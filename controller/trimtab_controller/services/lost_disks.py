"""Vms whose disks are lost with their host: what there is to bring them back from, and the operation that does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.core.lost_disks import AFTER, Answer, Lost, foresee, judge
from trimtab_controller.core.model import Actor, Backup, BackupPolicy, Operation, Vm
from trimtab_controller.core.model.failover import FailoverRow
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backup_restore, quota
from trimtab_controller.store import backup_repos, backup_settings, backups, describe, hosts, identity, snapshots, vms

KIND = "vm.bring_back"
AT_STAKE_MAX = 1000


def look(
    session: Session, vm: Vm, record: FailoverRow, *, now: datetime, after: timedelta = AFTER
) -> tuple[Answer, Backup | None]:
    """Return whether the vm's disks are to come back now, why or why not, and from which backup."""
    policy = backup_repos.policies(session).get(vm.backup_policy_id) if vm.backup_policy_id else None
    lost, backup = _known(session, vm, policy, backups.of_vms(session, [vm.id])[vm.id])
    return judge(replace(lost, proof=record.proof, fenced_at=record.fenced_at), now=now, after=after), backup


@dataclass(frozen=True, slots=True, kw_only=True)
class AtStake:
    """A vm with a disk on its host's own storage, and what would be left of it."""

    vm: Vm
    host_name: str
    answer: Answer
    """`is_due`: it would come back by itself."""
    backup: Backup | None
    """Its newest whole one, whoever restores it."""
    loss_s: float | None
    """The age of that backup's content in seconds; None where everything would be lost."""


def at_stake(session: Session, *, now: datetime) -> tuple[AtStake, ...]:
    """Return the vms with a disk that only their host has, by host and name, at most `AT_STAKE_MAX`."""
    found = vms.with_local_disks(session, limit=AT_STAKE_MAX)
    policies, listed = backup_repos.policies(session), backups.of_vms(session, [vm.id for vm in found])
    names = {host.id: host.name for host in hosts.live(session)}
    stakes = []
    for vm in found:
        lost, backup = _known(session, vm, policies.get(vm.backup_policy_id), listed[vm.id])
        loss_s = (now - lost.backup_at).total_seconds() if lost.backup_at is not None else None
        host_name = names.get(vm.host_id, vm.host_id)
        stakes.append(AtStake(vm=vm, host_name=host_name, answer=foresee(lost, now=now), backup=backup, loss_s=loss_s))
    return tuple(sorted(stakes, key=lambda one: (one.host_name, one.vm.name)))


def _known(session: Session, vm: Vm, policy: BackupPolicy | None, listed: Sequence[Backup]) -> tuple[Lost, Backup | None]:
    """Return what is known of the vm before anything is of its host, and its newest whole backup."""
    whole = [one for one in listed if one.state == "ready"]
    backup = whole[-1] if whole else None
    disks = [one for one in describe.volumes_of(session, vm.id) if not one.is_read_only]
    names = {backup_settings.disk_name(one) for one in disks}
    pools = {one.pool_id: describe.get_pool(session, one.pool_id) for one in disks}
    lost = Lost(
        vm_name=vm.name,
        proof="",
        fenced_at=None,
        is_wanted=vm.ha == "restart" and vm.desired_power.value == "running" and not vm.attention,
        has_policy=policy is not None and policy.recovers_lost,
        is_all_local=bool(disks) and not any(pool.is_shared for pool in pools.values()),
        has_snapshots=bool(snapshots.of_vm(session, vm.id) or snapshots.clones_over(session, [one.id for one in disks])),
        is_all_files=not any(pool.kind in describe.BLOCK_KINDS for pool in pools.values()),
        backup_id=backup.id if backup is not None else "",
        backup_at=(backup.taken_at or backup.created_at) if backup is not None else None,
        disks_match=backup is not None and set(backup_restore.disk_sizes(backup)) == names,
    )
    return lost, backup


def bring_back(session: Session, vm: Vm, backup: Backup, *, actor: Actor, now: datetime) -> Operation:
    """Insert the new disks and accept that they are filled; the vm stays what it is until they are whole."""
    project = identity.find_project(session, vm.project_id)
    assert project is not None
    sizes = backup_restore.disk_sizes(backup)
    quota.charge(session, project.id, quota.Charge(disk_bytes=sum(sizes.values())))
    replaced, disks = {}, {}
    for old in (one for one in describe.volumes_of(session, vm.id) if not one.is_read_only):
        disk, pool = backup_settings.disk_name(old), describe.get_pool(session, old.pool_id)
        new = backup_restore.insert_volume(
            session, f"{old.name}-back", pool=pool, size_bytes=sizes[disk], project=project, now=now, is_deleted_with_vm=False
        )
        replaced[new.id], disks[new.id] = old.id, disk
    return accept(
        session,
        KIND,
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={
            "vm_id": vm.id,
            "backup_id": backup.id,
            "host_id": vm.host_id,
            "epoch": vm.epoch,
            "replaced": replaced,
            "disks": disks,
        },
        actor=actor,
        priority=1000 + vm.priority,
        now=now,
    )
