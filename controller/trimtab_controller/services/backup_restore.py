"""A backup becomes a vm again: rows with a new identity from the settings in its manifest, and the operation that fills its disks."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml
from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.ids import domain_uuid
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Actor, Backup, Operation, Pool, Project, Vm, Volume
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept, accept_placed
from trimtab_controller.services import backups as backup_service
from trimtab_controller.services import boot_criteria, pools, quota, restore_mapping, secgroups, seeds
from trimtab_controller.services.vm_nics import NicWish, PlannedNic, insert_nic, plan_nic
from trimtab_controller.services.vm_power import OFF
from trimtab_controller.services.vm_views import VmView, read
from trimtab_controller.services.vms import resolve_host
from trimtab_controller.store import backup_settings, describe, hosts, snapshots, vms, wires
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import DiskBus, DiskFormat, PoolKind

VOLUME_NAME_MAX = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSpec:
    name: str
    to_host: str = ""
    # Name in the backup -> name here; what is not named keeps its name.
    pools: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)
    # '' keeps the model of the backup, `auto` lets placement choose anew: for hosts with other hardware.
    cpu_model: str = ""
    start: bool = True
    # It runs on the backup at once; its disks are filled while it does, so fast at most.
    is_instant: bool = False
    bandwidth_mib_s: int = 0
    # A boot test has none: it can meet nobody.
    has_nics: bool = True
    # Instead it has the cards that it had, and they end in the agent.
    is_wired: bool = False
    # What its guest has to show, which the operation's result says: '' nothing, `agent`, `pattern`.
    awaits: str = ""
    pattern: str = ""
    timeout_s: int = 300


def restore(
    session: Session, backup_id: str, spec: RestoreSpec, *, project: Project, actor: Actor, now: datetime
) -> tuple[VmView, Operation]:
    """Insert the vm and accept its restore. Raises whatever refuses it, by field: a name that is taken, a pool that is not here."""
    backup = backup_service.listed(session, backup_id, project=project)
    params: dict[str, Any] = {"start": spec.start}
    if spec.awaits:
        params |= {"awaits": spec.awaits, "pattern": spec.pattern, "timeout_s": spec.timeout_s}
    if spec.is_instant:
        if not spec.start:
            raise InvalidRequest(
                "instant-needs-start",
                "start: an instant restore fills the disks while the guest runs; leave out `--no-start` or `--instant`",
                field="start",
            )
        ha = str(settings_of(backup)["vm"]["ha"])
        params |= {"is_instant": True, "bandwidth_mib_s": spec.bandwidth_mib_s, "ha": ha}
    vm_id, operation = _accept(session, "vm.restore", backup, spec, params, project=project, actor=actor, now=now)
    return read(session, vm_id), operation


def replace(session: Session, backup_id: str, vm: Vm, *, project: Project, actor: Actor, now: datetime) -> Operation:
    """Accept that a stopped vm goes back to what a backup of it holds. Conflict where it runs, or has other disks by now."""
    backup = backup_service.listed(session, backup_id, project=project)
    _refuse_damaged(backup)
    if backup.vm_id != vm.id:
        raise Conflict(
            "backup-of-another-vm",
            f"backup {backup.id} is of vm {backup.vm_name}, not of {vm.name}; make a new vm of it: "
            f"`trimtab backup restore {backup.id} --as NAME`",
        )
    if vm.observed_state not in OFF or vm.desired_power is not DesiredPower.STOPPED:
        raise Conflict(
            "vm-not-stopped",
            f"vm {vm.name} is {vm.observed_state.value}; what it has on its disks now would be lost under its hands: "
            f"`trimtab vm stop {vm.name}` first",
            state=vm.observed_state.value,
        )
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; restore the backup to a new vm")
    kept = snapshots.of_vm(session, vm.id)
    clones = snapshots.clones_over(session, [one.id for one in describe.volumes_of(session, vm.id)])
    if kept or clones:
        raise Conflict(
            "vm-has-snapshots",
            f"vm {vm.name} has {len(kept)} snapshots and {len(clones)} clones over its disks, which the backup knows nothing of; "
            f"delete them, or make a new vm of it: `trimtab backup restore {backup.id} --as NAME`",
        )
    backup_steps.require_reach(backup_steps.require_ready(session, backup.repo_id), vm.host_id)
    sizes = disk_sizes(backup)
    olds = {backup_settings.disk_name(one): one for one in describe.volumes_of(session, vm.id) if not one.is_read_only}
    if olds.keys() != sizes.keys():
        raise Conflict(
            "disks-differ",
            f"vm {vm.name} has the disks {', '.join(sorted(olds))}, backup {backup.id} has {', '.join(sorted(sizes))}; make a new vm "
            f"of it: `trimtab backup restore {backup.id} --as NAME`",
        )
    olds_in = {disk: describe.get_pool(session, old.pool_id) for disk, old in olds.items()}
    for disk, old in olds.items():
        _refuse_in_place(session, backup, vm, old, olds_in[disk], size_bytes=sizes[disk])
    # A LUN is one thing and cannot be had twice: it is written over. Every other disk is made beside the old one.
    overwritten = {old.id: disk for disk, old in olds.items() if old.unit}
    quota.charge(
        session, project.id, quota.Charge(disk_bytes=sum(sizes[disk] for disk, old in olds.items() if old.id not in overwritten))
    )
    replaced, disks = {}, {}
    for disk, old in olds.items():
        if old.id in overwritten:
            continue
        is_block = olds_in[disk].kind in describe.BLOCK_KINDS
        new = insert_volume(
            session,
            f"{old.name}-back",
            pool=olds_in[disk],
            size_bytes=sizes[disk],
            project=project,
            now=now,
            is_deleted_with_vm=False,
            **({"format": DiskFormat.RAW.value} if is_block else {}),
        )
        replaced[new.id], disks[new.id] = old.id, disk
    return accept(
        session,
        "vm.replace",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=project.id,
        params={"vm_id": vm.id, "backup_id": backup.id, "replaced": replaced, "disks": disks, "overwritten": overwritten},
        actor=actor,
        now=now,
    )


def _refuse_in_place(session: Session, backup: Backup, vm: Vm, old: Volume, pool: Pool, *, size_bytes: int) -> None:
    if pool.kind not in describe.BLOCK_KINDS:
        return
    instead = f"make a new vm of it: `trimtab backup restore {backup.id} --as NAME [--pool {pool.name}=POOL]`"
    if pool.kind is PoolKind.LVM_THIN:
        raise Conflict(
            "pool-without-files",
            f"volume {old.name} of vm {vm.name} is in pool {pool.name} of kind {pool.kind.value}, whose volumes are not written from a "
            f"backup; {instead}",
        )
    if old.unit and old.size_bytes < size_bytes:
        raise Conflict(
            "lun-too-small",
            f"LUN {old.unit} of vm {vm.name} has {old.size_bytes} bytes, in the backup it had {size_bytes}; {instead}",
        )
    if not snapshots.is_known_to(session, vm.host_id, "restore-raw"):
        message = f"the agent on the host of vm {vm.name} is of a release that writes no backup into pool {pool.name}; {instead}"
        raise Conflict("agent-too-old", message)


def restore_volume(
    session: Session, backup_id: str, disk: str, name: str, pool_name: str, *, project: Project, actor: Actor, now: datetime
) -> Operation:
    """Accept that one disk of a backup becomes a volume of this name. NotFound names the disks that there are."""
    backup = backup_service.listed(session, backup_id, project=project)
    sizes = disk_sizes(backup)
    if disk not in sizes:
        raise NotFound(
            "disk-not-found", f"disk: backup {backup.id} has no disk {disk}; it has {', '.join(sorted(sizes))}", field="disk"
        )
    backup_steps.require_ready(session, backup.repo_id)
    quota.charge(session, project.id, quota.Charge(disk_bytes=sizes[disk]))
    volume = volume_store.insert(
        session,
        volume_id=mint("vol"),
        now=now,
        name=name,
        project_id=project.id,
        pool_id=pools.choose(session, pool_name).id,
        format=DiskFormat.QCOW2.value,
        size_bytes=sizes[disk],
        is_deleted_with_vm=False,
    )
    return accept(
        session,
        "volume.restore",
        subject_id=volume.id,
        subject_name=name,
        project_id=project.id,
        params={"volume_id": volume.id, "backup_id": backup.id, "disk": disk},
        actor=actor,
        now=now,
    )


def boot_test(
    session: Session,
    backup: Backup,
    *,
    project: Project,
    pattern: str,
    timeout_s: int,
    actor: Actor,
    now: datetime,
    tcp_port: int = 0,
    pools: Mapping[str, str] | None = None,
    awaits_agent: bool = True,
    needs_agent: bool = False,
) -> Operation:
    """Accept that the backup is restored to a vm without a network, and has to show a sign of life there: the pattern and the TCP port,
    as far as they are given, else its guest agent.

    `pools`: name in the backup -> name here. Without `awaits_agent`, a pattern and a port its guest's start is enough, which proves less:
    level 2. `needs_agent`: the agent has to show itself beside whatever else is given.
    """
    boot_criteria.check_pattern(pattern, field="boot_pattern")
    if tcp_port:
        boot_criteria.require_cards(settings_of(backup), backup, field="boot_tcp")
    name = f"boot-test-{mint('bk')[-10:]}"
    spec = RestoreSpec(name=name, pools=pools or {}, cpu_model="auto", has_nics=False, is_wired=tcp_port > 0)
    params = {"pattern": pattern, "tcp_port": tcp_port, "timeout_s": timeout_s}
    params |= {} if awaits_agent else {"is_start_enough": True}
    params |= {"needs_agent": True} if needs_agent and (pattern or tcp_port) else {}
    return _accept(session, "backup.boot", backup, spec, params, project=project, actor=actor, now=now)[1]


def _accept(
    session: Session,
    kind: str,
    backup: Backup,
    spec: RestoreSpec,
    params: Mapping[str, Any],
    *,
    project: Project,
    actor: Actor,
    now: datetime,
) -> tuple[str, Operation]:
    """Insert the vm with its disks and ask for a place; return its id with the operation that fills them."""
    _refuse_damaged(backup)
    settings = settings_of(backup)
    repo = backup_steps.require_ready(session, backup.repo_id)
    to_host_id = resolve_host(session, spec.to_host, actor=actor)
    if repo.host_id:
        if to_host_id:
            backup_steps.require_reach(repo, to_host_id)
        to_host_id = repo.host_id
    vm_id = mint("vm")
    _insert_vm(session, spec, settings, vm_id=vm_id, source_id=backup.vm_id, project=project, now=now)
    disks = _insert_volumes(session, backup, spec, settings, vm_id=vm_id, project=project, now=now)
    operation = accept_placed(
        session,
        kind,
        vm_id=vm_id,
        vm_name=spec.name,
        project_id=project.id,
        params={"backup_id": backup.id, "disks": disks, **params},
        to_host_id=to_host_id,
        actor=actor,
        now=now,
    )
    return vm_id, operation


def _refuse_damaged(backup: Backup) -> None:
    if backup.state == "damaged":
        raise Conflict(
            "backup-damaged",
            f"backup {backup.id} cannot be restored whole: {backup.problem}; take another one: "
            f"`trimtab backup list --vm {backup.vm_name}`",
        )


def settings_of(backup: Backup) -> Mapping[str, Any]:
    """Return the settings of the vm as they were. Conflict for a backup that an older release made without."""
    settings: Mapping[str, Any] = backup.manifest.get("settings") or {}
    if not settings:
        raise Conflict(
            "backup-without-settings",
            f"backup {backup.id} says nothing about its vm; restore its disks one by one: `trimtab backup restore-volume "
            f"{backup.id} vda --as NAME`",
        )
    return settings


def disk_sizes(backup: Backup) -> dict[str, int]:
    """Return the size in bytes of each disk of the backup, by its name."""
    return {str(disk["name"]): int(disk["size_bytes"]) for disk in backup.manifest.get("disks", ())}


def _insert_vm(
    session: Session,
    spec: RestoreSpec,
    settings: Mapping[str, Any],
    *,
    vm_id: str,
    source_id: str,
    project: Project,
    now: datetime,
) -> None:
    saved = settings["vm"]
    planned = _plan_nics(session, spec, settings, vm_id=vm_id, project=project)
    quota.charge(session, project.id, quota.Charge(vms=1, vcpus=int(saved["vcpus"]), memory_mib=int(saved["memory_mib"])))
    host_class = str(saved["host_class"])
    vms.insert(
        session,
        id=vm_id,
        uuid=str(uuid.UUID(domain_uuid(vm_id))),
        project_id=project.id,
        name=spec.name,
        labels=dict(saved["labels"]),
        origin="created",
        arch=saved["arch"],
        machine=saved["machine"],
        cpu_model="" if spec.cpu_model == "auto" else spec.cpu_model or saved["cpu_model"],
        cpu_features=[] if spec.cpu_model else list(saved["cpu_features"]),
        vcpus=saved["vcpus"],
        vcpus_max=saved["vcpus_max"],
        memory_mib=saved["memory_mib"],
        memory_max_mib=saved["memory_max_mib"],
        firmware=saved["firmware"],
        has_secure_boot=saved["has_secure_boot"],
        has_tpm=saved["has_tpm"],
        os=saved["os"],
        os_family=saved["os_family"],
        device_addresses={},
        image_id=None,
        host_selector=dict(saved["host_selector"]),
        host_class=host_class if host_class and hosts.find_class(session, host_class) else "",
        wishes={**saved["wishes"], **({wires.WISH: wires.wish_of(settings["nics"])} if spec.is_wired else {})},
        # Not elsewhere before its disks are whole.
        ha=saved["ha"] if spec.has_nics and not spec.is_instant else "none",
        priority=saved["priority"],
        start_delay_s=int(saved.get("start_delay_s", 0)),
        # Backups of earlier releases say nothing of a group.
        start_group=str(saved.get("start_group", "")),
        start_order=int(saved.get("start_order", 0)),
        drain_policy=saved["drain_policy"],
        seed=_seed(
            settings["seed"],
            vm_id=vm_id,
            vm_name=spec.name,
            macs={str(one["mac"]): plan.nic.mac for one, plan in zip(settings["nics"] if planned else (), planned, strict=True)},
            nics=[one.told for one in planned],
            are_addresses_taken=_is_live(session, source_id),
        ),
        desired_power=(DesiredPower.RUNNING if spec.start else DesiredPower.STOPPED).value,
        observed_state=ObservedState.ABSENT.value,
        observed_at=now,
        observed_addresses=[],
        created_at=now,
    )
    if planned and settings.get("secgroups"):
        # Refused where one is gone: restored without it the vm would be open to all.
        secgroups.put_into(session, vm_id, settings["secgroups"], project=project, field="secgroups")
    for one in planned:
        insert_nic(session, one, now=now, field=f"networks[{one.nic.nic_index}]")


def _plan_nics(
    session: Session, spec: RestoreSpec, settings: Mapping[str, Any], *, vm_id: str, project: Project
) -> tuple[PlannedNic, ...]:
    planned: tuple[PlannedNic, ...] = ()
    for i, one in enumerate(settings["nics"] if spec.has_nics else ()):
        joined = restore_mapping.network_for(session, one["network"], spec.networks, project=project)
        wish, where = NicWish(network=joined.id), f"networks[{one['network']}]"
        card = plan_nic(session, vm_id, i, wish, project=project, field=where, model=str(one["model"]), beside=planned)
        planned = (*planned, card)
    return planned


def _is_live(session: Session, vm_id: str) -> bool:
    try:
        return vms.get(session, vm_id).deleted_at is None
    except NotFound:
        return False  # of another fleet, or purged


def _seed(
    saved: Mapping[str, str],
    *,
    vm_id: str,
    vm_name: str,
    macs: Mapping[str, str],
    nics: Sequence[seeds.SeedNic],
    are_addresses_taken: bool,
) -> dict[str, str]:
    """Return the seed of another guest (`seeds.as_another`) with its new MACs; addresses only where the first one is there no more."""
    if not saved:
        return {}
    meta = {**(yaml.safe_load(saved.get("meta_yaml", "")) or {}), "instance-id": vm_id, "local-hostname": vm_name}
    network_yaml = saved.get("network_yaml", "")
    for before, after in macs.items():
        network_yaml = network_yaml.replace(before, after)
    network_yaml = seeds.with_addresses(network_yaml, nics, are_taken=are_addresses_taken)
    return {
        "meta_yaml": yaml.safe_dump(meta, sort_keys=False, allow_unicode=True),
        "user_yaml": seeds.as_another(saved.get("user_yaml") or "#cloud-config\n{}\n", vm_name),
        "network_yaml": network_yaml,
    }


def _insert_volumes(
    session: Session,
    backup: Backup,
    spec: RestoreSpec,
    settings: Mapping[str, Any],
    *,
    vm_id: str,
    project: Project,
    now: datetime,
) -> dict[str, str]:
    """Insert the disks and return which disk of the backup fills each."""
    sizes, disks = disk_sizes(backup), {}
    quota.charge(session, project.id, quota.Charge(disk_bytes=sum(sizes.values())))
    for i, one in enumerate(settings["volumes"]):
        volume = insert_volume(
            session,
            f"{spec.name}-{'root' if i == 0 else one['disk']}",
            pool=restore_mapping.pool_for(session, one["pool"], spec.pools),
            size_bytes=sizes[one["disk"]],
            project=project,
            now=now,
            vm_id=vm_id,
            disk_index=int(one["disk_index"]),
            boot_order=int(one["boot_order"]),
            bus=DiskBus(one["bus"]).value,
            iops_limit=int(one["iops_limit"]),
            bandwidth_limit_mib_s=int(one["bandwidth_limit_mib_s"]),
            is_deleted_with_vm=True,
            fill_backup_id=backup.id if spec.is_instant else "",
            fill_disk=str(one["disk"]) if spec.is_instant else "",
        )
        disks[volume.id] = str(one["disk"])
    return disks


def insert_volume(
    session: Session, name: str, *, pool: Pool, size_bytes: int, project: Project, now: datetime, **values: Any
) -> Volume:
    """Insert a disk that a restore fills, under this name or one with a piece of its id in it."""
    volume_id = mint("vol")
    common: dict[str, Any] = {
        "project_id": project.id,
        "pool_id": pool.id,
        "format": DiskFormat.QCOW2.value,
        "size_bytes": size_bytes,
        "base_image_id": None,
        **values,
    }
    if len(name) <= VOLUME_NAME_MAX:
        try:
            return volume_store.insert(session, volume_id=volume_id, now=now, name=name, **common)
        except AlreadyExists:
            pass  # a deleted vm of that name keeps its disk for undelete
    tail = f"-{volume_id[-8:]}"
    return volume_store.insert(
        session, volume_id=volume_id, now=now, name=f"{name[: VOLUME_NAME_MAX - len(tail)]}{tail}", **common
    )
