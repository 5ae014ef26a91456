"""Gives volumes and network cards to vms and takes them away: the row and the operation in one transaction."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from trimtab_controller import osinfo
from trimtab_controller.core.guest_os import Family, Hardware, hardware_for
from trimtab_controller.core.model import Operation, Project, Vm, Volume
from trimtab_controller.core.resize import OFF
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.encrypted import refuse_any
from trimtab_controller.services import images, layered, secgroups, volumes
from trimtab_controller.services.vm_nics import NicWish, insert_nic, plan_nic, require_spoofing
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.store import describe, lookup, networks, reach, schema, vms
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import DiskBus

# Index of a disk or card: the guest's slots are functions of it (`kvm/domain_xml.py`).
INDEX_MAX = 23


def attach(session: Session, vm: Vm, caller: Caller, *, volume: str, wish: NicWish | None, project: Project) -> Operation:
    """Accept that the vm gets the volume ('' is none), a card as wished for (None is none) or both: both come, or neither.

    Conflict names who has the volume, or why the vm's host cannot reach it or the network.
    """
    if not volume and wish is None:
        raise InvalidRequest("device-missing", "volume: name a volume, a network or both", field="volume")
    device = {}
    if volume:
        device["volume_id"] = _take_volume(session, vm, volume=volume, project=project)
    if wish is not None:
        device["nic_id"] = _take_card(session, vm, caller, wish=wish, project=project)
    return _accept(session, vm, caller, "vm.attach", **device)


def _take_volume(session: Session, vm: Vm, *, volume: str, project: Project) -> str:
    found = volumes.find(session, volume, project=project)
    if found.vm_id is not None:
        name = lookup.names(session, schema.vm, [found.vm_id]).get(found.vm_id, found.vm_id)
        raise Conflict(
            "volume-attached",
            f"volume: {found.name} belongs to vm {name}; `trimtab vm detach {name} --volume {found.name}` frees it",
            field="volume",
        )
    if found.observed_state != "present":
        raise Conflict("volume-not-ready", f"volume: {found.name} is {found.observed_state}, not present yet", field="volume")
    if vm.backup_policy_id:
        refuse_any((found,), "backups")
    disks = describe.volumes_of(session, vm.id)
    _require_reach(session, vm, found, disks)
    index = _free_index("disks", [disk.disk_index or 0 for disk in disks])
    bus = hardware_of(vm).disk_bus
    if bus is DiskBus.SATA and vm.observed_state not in OFF:
        raise Conflict(
            "guest-without-virtio",
            f"volume: vm {vm.name} runs {vm.os or vm.os_family}, whose disks are SATA and come and go with a stop only; "
            f"`trimtab vm stop {vm.name}` first",
            field="volume",
        )
    volume_store.attach(session, found.id, vm_id=vm.id, disk_index=index, boot_order=0, bus=bus)
    return found.id


def _take_card(session: Session, vm: Vm, caller: Caller, *, wish: NicWish, project: Project) -> str:
    """Insert the card; its MAC and address are taken at once. Return its id."""
    cards = vms.nics_of(session, [vm.id])[vm.id]
    index = _free_index("nics", [card.nic_index for card in cards])
    require_spoofing(wish, caller.actor)
    planned = plan_nic(session, vm.id, index, wish, project=project, field="network", model=hardware_of(vm).nic_model)
    if vm.host_id and vm.observed_state not in OFF:
        on_host = {one.host_id: one.state for one in networks.hosts_of(session, [planned.network.id])[planned.network.id]}
        if on_host.get(vm.host_id) != reach.READY:
            host = lookup.names(session, schema.host, [vm.host_id]).get(vm.host_id, vm.host_id)
            raise Conflict(
                "network-not-there",
                f"network: host {host}, where vm {vm.name} runs, does not reach network {planned.network.name}; "
                f"see `trimtab network get {planned.network.name}`",
                field="network",
            )
    return insert_nic(session, planned, now=caller.now, field="network").id


def detach_volume(session: Session, vm: Vm, caller: Caller, *, volume: str, project: Project) -> Operation:
    """Accept that the volume is taken from the vm. Conflict for the disk that it boots from."""
    found = volumes.find(session, volume, project=project)
    if found.vm_id != vm.id:
        raise NotFound("volume-not-attached", f"volume: vm {vm.name} does not have volume {found.name}", volume=found.name)
    if found.boot_order or found.disk_index == 0:
        raise Conflict(
            "volume-boots", f"volume: vm {vm.name} boots from {found.name}; it can only be deleted with the vm", field="volume"
        )
    layered.refuse(session, found, verb="taken from its vm")
    return _accept(session, vm, caller, "vm.detach", volume_id=found.id)


def detach_nic(session: Session, vm: Vm, caller: Caller, *, nic: str) -> Operation:
    """Accept that the card, by id or MAC, is taken from the vm."""
    cards = vms.nics_of(session, [vm.id])[vm.id]
    found = next((card for card in cards if nic.lower() in {card.id, card.mac}), None)
    if found is None:
        known = ", ".join(card.id for card in cards) or "it has none"
        raise NotFound("nic-not-found", f"nic: vm {vm.name} has no nic {nic}; its nics: {known}", nic=nic)
    return _accept(session, vm, caller, "vm.detach", nic_id=found.id)


def change_cdrom(session: Session, vm: Vm, caller: Caller, *, iso: str, project: Project) -> Operation:
    """Accept another ISO in the vm's drive; '' ejects. Conflict where it has no drive and runs."""
    image_id = images.ready_iso(session, iso, project=project, field="iso").id if iso else ""
    home = describe.state_volume(describe.volumes_of(session, vm.id))
    if iso and home is not None and describe.get_pool(session, home.pool_id).kind in describe.BLOCK_KINDS:
        raise Conflict(
            "pool-without-files", f"iso: vm {vm.name} boots from a pool that holds no files, so no ISO either", field="iso"
        )
    if not vm.has_cdrom and vm.observed_state not in OFF:
        raise Conflict(
            "no-cdrom", f"iso: vm {vm.name} has no drive; `trimtab vm stop {vm.name}` first, then it is given one", field="iso"
        )
    lookup.update_version(
        session,
        schema.vm,
        f"vm {vm.name}",
        vm.id,
        expected_version=caller.expected_version,
        has_cdrom=True,
        cdrom_image_id=image_id,
    )
    params = {"vm_id": vm.id, "image_id": image_id, "before_image_id": vm.cdrom_image_id}
    return accept(
        session,
        "vm.change_cdrom",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params=params,
        actor=caller.actor,
        now=caller.now,
    )


def set_secgroups(session: Session, vm: Vm, caller: Caller, *, names: Sequence[str], project: Project) -> Operation:
    """Put the vm into these security groups and no others, and accept that its host follows."""
    lookup.update_version(session, schema.vm, f"vm {vm.name}", vm.id, expected_version=caller.expected_version)
    secgroups.put_into(session, vm.id, names, project=project, field="secgroups")
    return accept(
        session,
        secgroups.APPLY,
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={"vm_id": vm.id},
        actor=caller.actor,
        now=caller.now,
    )


def hardware_of(vm: Vm) -> Hardware:
    """Return the hardware that the vm's operating system finds its way about in."""
    return hardware_for(osinfo.find(vm.os or Family.LINUX.value))


def _require_reach(session: Session, vm: Vm, volume: Volume, disks: tuple[Volume, ...]) -> None:
    """Raise Conflict where no host could ever run the vm with this volume, or the one that runs it does not reach it."""
    pool = describe.get_pool(session, volume.pool_id)
    is_bound = vm.observed_state not in OFF
    at = vm.host_id if is_bound else next((disk.host_id for disk in disks if disk.host_id), "")
    if not pool.is_shared and at and volume.host_id != at:
        names = lookup.names(session, schema.host, [at, volume.host_id])
        raise Conflict(
            "volume-elsewhere",
            f"volume: {volume.name} is on a local pool of host {names.get(volume.host_id, volume.host_id)}, vm {vm.name} on host "
            f"{names.get(at, at)}; `trimtab vm migrate {vm.name} --to {names.get(volume.host_id, '')}` brings it there",
            field="volume",
        )
    if pool.is_shared and is_bound and vm.host_id not in {host.id for host in reach.ready_hosts(session, pool.id)}:
        raise Conflict(
            "pool-not-there",
            f"volume: the host of vm {vm.name} does not reach pool {pool.name}; see `trimtab pool get {pool.name}`",
            field="volume",
        )


def _free_index(what: str, taken: list[int]) -> int:
    index = next((i for i in range(INDEX_MAX + 1) if i not in taken), None)
    if index is None:
        raise Conflict(f"{what}-full", f"a vm has {INDEX_MAX + 1} {what} at most; detach one first")
    return index


def _accept(session: Session, vm: Vm, caller: Caller, kind: str, **device: str) -> Operation:
    lookup.update_version(session, schema.vm, f"vm {vm.name}", vm.id, expected_version=caller.expected_version)
    return accept_on_vm(session, vm, caller, kind, device)
