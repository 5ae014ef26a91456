"""Vms whose disks are lost with their host: what there is to bring them back from, and the operation that does."""

from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.core.lost_disks import AFTER, Answer, Lost, judge
from trimtab_controller.core.model import Actor, Backup, Operation, Vm
from trimtab_controller.core.model.failover import FailoverRow
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backup_restore, quota
from trimtab_controller.store import backup_repos, backup_settings, backups, describe, identity, snapshots

KIND = "vm.bring_back"


def look(
    session: Session, vm: Vm, record: FailoverRow, *, now: datetime, after: timedelta = AFTER
) -> tuple[Answer, Backup | None]:
    """Return whether the vm's disks are to come back now, why or why not, and from which backup."""
    policy = backup_repos.policies(session).get(vm.backup_policy_id) if vm.backup_policy_id else None
    whole = [one for one in backups.of_vms(session, [vm.id])[vm.id] if one.state == "ready"]
    backup = whole[-1] if whole else None
    disks = [one for one in describe.volumes_of(session, vm.id) if not one.is_read_only]
    names = {backup_settings.disk_name(one) for one in disks}
    pools = {one.pool_id: describe.get_pool(session, one.pool_id) for one in disks}
    lost = Lost(
        vm_name=vm.name,
        proof=record.proof,
        fenced_at=record.fenced_at,
        is_wanted=vm.ha == "restart" and vm.desired_power.value == "running" and not vm.attention,
        has_policy=policy is not None and policy.recovers_lost,
        is_all_local=bool(disks) and not any(pool.is_shared for pool in pools.values()),
        has_snapshots=bool(snapshots.of_vm(session, vm.id) or snapshots.clones_over(session, [one.id for one in disks])),
        backup_id=backup.id if backup is not None else "",
        backup_at=(backup.taken_at or backup.created_at) if backup is not None else None,
        disks_match=backup is not None and set(backup_restore.disk_sizes(backup)) == names,
    )
    return judge(lost, now=now, after=after), backup


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
