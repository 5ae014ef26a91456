"""Adopts domains of others and releases vms: what is decided about them, and all that is taken in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core import cpu_features
from trimtab_controller.core.adoption import (
    AdoptionPlan,
    HostFacts,
    NetworkChoice,
    PoolPlace,
    Refusal,
    image_id_of,
    plan,
    volume_id_of,
)
from trimtab_controller.core.drift_fields import Difference
from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Actor, Nic, Operation, Project, Role, Vm
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.encrypted import refuse_any
from trimtab_controller.services import hand_changes, quota
from trimtab_controller.services import networks as network_service
from trimtab_controller.services.authorise import require
from trimtab_controller.services.vm_nics import PlannedNic, insert_nic
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.services.vms import VOLUME_NAME_MAX
from trimtab_controller.store import adoptions, claims, describe, hosts, lookup, schema, snapshots, vms, volume_claims
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.adoption_messages import DomainDescription
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NoCapacity, NotFound
from trimtab_protos.messages import NetworkKind


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptSpec:
    host: str
    domain: str
    name: str = ""
    # Networks by the bridge or libvirt network that a card is on, where the fleet's own do not say.
    networks: Mapping[str, str]


def find_host(session: Session, name_or_id: str, *, actor: Actor) -> str:
    """Return the host's id. Whoever takes over what runs on a host must be an operator of the fleet."""
    require(actor, Role.OPERATOR, "")
    host = hosts.find(session, name_or_id)
    if host is None:
        raise NotFound("host-not-found", f"host: there is no host {name_or_id}", field="host")
    return host.id


def preview(session: Session, spec: AdoptSpec, described: DomainDescription, host_id: str, *, project: Project) -> AdoptionPlan:
    """Return what adopting the domain would make of it, with all that refuses."""
    planned = plan(described, _host_facts(session, spec, host_id, project=project))
    return replace(planned, refusals=(*planned.refusals, *_of_other_vms(session, planned), *_of_images(session, planned)))


def _of_other_vms(session: Session, planned: AdoptionPlan) -> list[Refusal]:
    """Refuse disks whose file is a volume's: two guests would write to it. A released vm's files are its domain's."""
    ids = {disk.target: volume_id_of(disk.path) for disk in planned.disks}
    owned = adoptions.owned(session, sorted({one for one in ids.values() if one}))
    found = []
    for target, volume_id in ids.items():
        one = owned.get(volume_id)
        if one is None:
            continue
        whose = f" of vm {one.vm_name}" if one.vm_name else ""
        cure = f"vm release {one.vm_name}` gives it up" if one.vm_name else f"volume get {one.volume_name}` shows it"
        found.append(Refusal("disk-is-a-volume", f"disk {target} is volume {one.volume_name}{whose}; `trimtab {cure}"))
    return found


def _of_images(session: Session, planned: AdoptionPlan) -> list[Refusal]:
    """Refuse disks whose file lies where its pool keeps images: vms' disks lie over it, and it is deleted with the image."""
    found = []
    for disk in planned.disks:
        image_id = image_id_of(disk)
        if image_id is None:
            continue
        name = adoptions.image_name(session, image_id)
        what = f"the file of image {name}" if name else f"in the folder where pool {disk.pool.name} keeps its images"
        cure = "its domain can be given a copy that lies elsewhere in the pool (`virsh edit`)"
        found.append(Refusal("disk-is-an-image", f"disk {disk.target} is {what}, {disk.path}, which nobody may write to; {cure}"))
    return found


def adopt(
    session: Session,
    spec: AdoptSpec,
    described: DomainDescription,
    host_id: str,
    *,
    project: Project,
    actor: Actor,
    now: datetime,
) -> tuple[Vm, Operation, AdoptionPlan]:
    """Insert the vm with its volumes and cards, claim all it has, and accept vm.adopt. Conflict names the first refusal."""
    planned = preview(session, spec, described, host_id, project=project)
    if planned.refusals:
        first = planned.refusals[0]
        more = f" (and {len(planned.refusals) - 1} more: see the dry run)" if len(planned.refusals) > 1 else ""
        raise Conflict(first.code, first.message + more, domain=described.name)
    name = _name(spec, described)
    disk_bytes = sum(disk.size_bytes for disk in planned.disks)
    charge = quota.Charge(vms=1, vcpus=described.vcpus, memory_mib=described.memory_mib, disk_bytes=disk_bytes)
    quota.charge(session, project.id, charge)
    vm_id = mint("vm")
    _refuse_known(session, described)
    macs = [nic.mac for nic in planned.nics]
    counted = (described.vcpus, described.memory_mib) if planned.is_running else (0, 0)
    taken = adoptions.leave_unmanaged(session, host_id, vcpus=counted[0], memory_mib=counted[1], macs=macs)
    vm = vms.insert(session, **_vm_values(described, planned, vm_id=vm_id, name=name, project=project, host_id=host_id, now=now))
    disks = _insert_volumes(session, vm, planned, host_id, now=now)
    for nic in planned.nics:
        _insert_nic(session, vm_id, nic, now=now)
    adoptions.insert(
        session,
        vm_id=vm_id,
        host_id=host_id,
        domain_name=described.name,
        original_xml=described.original_xml,
        kept=list(planned.kept),
        changes=list(planned.changes),
        disks=disks,
        had_autostart=described.has_autostart,
        unmanaged_vcpus=taken[0],
        unmanaged_memory_mib=taken[1],
        created_at=now,
    )
    operation = accept(
        session,
        "vm.adopt",
        subject_id=vm_id,
        subject_name=name,
        project_id=project.id,
        params={"vm_id": vm_id},
        actor=actor,
        now=now,
    )
    if planned.is_running:
        _claim(session, vm, host_id, operation, now=now)
    return vm, operation, planned


def release(session: Session, vm: Vm, caller: Caller, *, has_autostart: bool) -> Operation:
    """Accept that the vm becomes a plain domain. Conflict names what would hang in the air."""
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host, so there is no domain to release; delete it instead")
    if vm.backup_policy_id:
        raise Conflict(
            "vm-backed-up",
            f"vm {vm.name} has a backup policy, which would go on asking for it; `trimtab vm update {vm.name} --backup-policy ''`",
        )
    refuse_any(describe.volumes_of(session, vm.id), "plain domains")
    if snapshots.of_vm(session, vm.id):
        raise Conflict("vm-has-snapshots", f"vm {vm.name} has snapshots, which no plain domain has; delete them first")
    clones = snapshots.clones_over(session, [volume.id for volume in describe.volumes_of(session, vm.id)])
    if clones:
        raise Conflict("vm-has-clones", f"vm {vm.name} has linked clones, whose disks lie over its own; delete them first")
    if vm.ha != "none":
        raise Conflict("vm-is-kept", f"vm {vm.name} restarts elsewhere when its host dies; a plain domain must not", vm=vm.name)
    return accept_on_vm(session, vm, caller, "vm.release", {"has_autostart": has_autostart})


def reconcile(
    session: Session,
    vm: Vm,
    caller: Caller,
    found: Sequence[Difference],
    seen: DomainDescription,
    *,
    project: Project,
    accept_as_is: bool,
) -> Operation:
    """Accept that the vm becomes as its domain is, or its domain as the vm shall be.

    What runs is taken over only where it fits the model, one kind of thing at a time, each by the operation that would have made it:
    vcpus and memory, limits of disks, cards, and disks and cards that were taken away. Conflict names what does not fit.
    """
    if not found:
        raise Conflict("nothing-to-reconcile", f"vm {vm.name} is as it shall be", vm=vm.name)
    if not accept_as_is:
        return accept_on_vm(session, vm, caller, "vm.reconcile", {})
    networks = _networks_on(session, AdoptSpec(host="", domain="", networks={}), vm.host_id, project=project)
    return hand_changes.take_over(session, vm, caller, found, seen, project=project, networks=networks)


def _name(spec: AdoptSpec, described: DomainDescription) -> str:
    name = spec.name or described.name
    if not name or len(name) > VOLUME_NAME_MAX or not name.replace("-", "").isalnum() or name.lower() != name or kind_of(name):
        raise InvalidRequest(
            "name-needed", f"name: {name[:80]!r} cannot be the name of a vm; choose one with `--name`", field="name"
        )
    return name


def _refuse_known(session: Session, described: DomainDescription) -> None:
    known = session.execute(sa.select(schema.vm.c.name).where(schema.vm.c.uuid == described.uuid)).first()
    if known is not None:
        raise AlreadyExists("uuid-taken", f"vm {known.name} has the UUID of domain {described.name} already", uuid=described.uuid)


def _host_facts(session: Session, spec: AdoptSpec, host_id: str, *, project: Project) -> HostFacts:
    host = session.execute(sa.select(schema.host).where(schema.host.c.id == host_id)).one()
    inventory = host.inventory or {}
    return HostFacts(
        name=host.name,
        machines=tuple(inventory.get("machines", ())),
        cpu_model=inventory.get("cpu_model", ""),
        usable_cpu_models=frozenset(inventory.get("usable_cpu_models", ())),
        cpu_features=frozenset(inventory.get("cpu_features", ())),
        lists_all_cpu_features=cpu_features.ALL_LISTED in inventory.get("capabilities", ()),
        pools=_pools_on(session, host_id),
        networks=_networks_on(session, spec, host_id, project=project),
    )


def _pools_on(session: Session, host_id: str) -> tuple[PoolPlace, ...]:
    pool, there = schema.pool, schema.pool_host
    query = (
        sa.select(pool.c.id, pool.c.name, pool.c.path)
        .join(there, there.c.pool_id == pool.c.id)
        .where(there.c.host_id == host_id, there.c.state == "ready", pool.c.deleted_at.is_(None))
        .order_by(pool.c.name)
    )
    return tuple(PoolPlace(id=row.id, name=row.name, path=row.path) for row in session.execute(query))


def _networks_on(session: Session, spec: AdoptSpec, host_id: str, *, project: Project) -> dict[str, NetworkChoice]:
    """Return the networks of the project and the shared ones by what cards are on; what was named wins."""
    table, found = schema.network, {}
    query = sa.select(table.c.id).where(table.c.deleted_at.is_(None), table.c.project_id.in_((project.id, "")))
    for network_id in session.scalars(query.order_by(table.c.project_id, table.c.name)).all():
        network = describe.get_network(session, network_id)
        there = describe.network_spec(session, network, host_id)
        source = there.bridge if there.kind is NetworkKind.BRIDGE else f"trimtab-{network.id}"
        if source and not (there.kind is NetworkKind.BRIDGE and there.vlan):
            found[source] = NetworkChoice(network.id, network.name)
    for source, name in spec.networks.items():
        named = network_service.find(session, name, project=project)
        found[source] = NetworkChoice(named.id, named.name)
    return found


def _vm_values(
    described: DomainDescription, planned: AdoptionPlan, *, vm_id: str, name: str, project: Project, host_id: str, now: datetime
) -> dict[str, Any]:
    return {
        "id": vm_id,
        "uuid": described.uuid,
        "project_id": project.id,
        "name": name,
        "labels": {},
        "origin": "adopted",
        "arch": described.arch,
        "machine": planned.machine,
        "cpu_model": planned.cpu_model,
        "cpu_features": list(planned.cpu_features),
        "vcpus": described.vcpus,
        "vcpus_max": max(described.vcpus, described.vcpus_max),
        "memory_mib": described.memory_mib,
        "memory_max_mib": max(described.memory_mib, described.memory_max_mib),
        "firmware": described.firmware.value,
        "has_secure_boot": described.has_secure_boot,
        "has_tpm": described.has_tpm,
        "has_cdrom": any(disk.device == "cdrom" for disk in described.disks),
        "device_addresses": {},
        "seed": {},
        "host_selector": {},
        "wishes": {},
        "desired_power": (DesiredPower.RUNNING if planned.is_running else DesiredPower.STOPPED).value,
        "host_id": host_id,
        "epoch": 1,
        "observed_state": ObservedState(described.state.value).value,
        "observed_host_id": host_id,
        "observed_at": now,
        "observed_addresses": [],
        "created_at": now,
    }


def _insert_volumes(session: Session, vm: Vm, planned: AdoptionPlan, host_id: str, *, now: datetime) -> list[dict[str, str]]:
    disks = []
    for disk in planned.disks:
        volume = volume_store.insert(
            session,
            volume_id=mint("vol"),
            now=now,
            project_id=vm.project_id,
            name=_volume_name(vm, disk.target),
            pool_id=disk.pool.id,
            format=disk.format.value,
            size_bytes=disk.size_bytes,
            bus=disk.bus.value,
            vm_id=vm.id,
            disk_index=disk.index,
            boot_order=disk.boot_order,
            is_read_only=disk.is_read_only,
            is_deleted_with_vm=True,
            observed_state="present",
        )
        if not volume_claims.take_present(session, volume, describe.get_pool(session, disk.pool.id), host_id):
            raise NoCapacity("pool-full", f"disk {disk.target}: pool {disk.pool.name} is promised to others in full")
        disks.append({"target": disk.target, "path": disk.path, "volume_id": volume.id})
    return disks


def _volume_name(vm: Vm, target: str) -> str:
    """Return a name that a released and adopted vm's disks get anew: with a piece of the vm's id."""
    tail = f"-{target}-{vm.id[-6:]}"
    return f"{vm.name[: VOLUME_NAME_MAX - len(tail)]}{tail}"


def _insert_nic(session: Session, vm_id: str, nic: Any, *, now: datetime) -> None:
    row = Nic(
        id=mint("nic"),
        vm_id=vm_id,
        network_id=nic.network.id,
        nic_index=nic.index,
        mac=nic.mac,
        model=nic.model,
        addresses=(),
        # Its addresses are nobody's to know: a filter on them would cut it off at its next stop.
        allows_spoofing=True,
    )
    network = describe.get_network(session, nic.network.id)
    insert_nic(
        session,
        PlannedNic(nic=row, network=network, is_mac_given=True, is_address_given=False),
        now=now,
        field=f"nics[{nic.index}]",
    )


def _claim(session: Session, vm: Vm, host_id: str, operation: Operation, *, now: datetime) -> None:
    """Claim what the guest uses already. No choice is made here, so it is not the leader's: the host is where the guest runs."""
    try:
        claims.take(
            session,
            vm_id=vm.id,
            host_id=host_id,
            role="home",
            epoch=vm.epoch,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            operation_id=operation.id,
            generation=None,
            now=now,
        )
    except claims.ClaimRefused as error:
        host = lookup.names(session, schema.host, [host_id]).get(host_id, host_id)
        raise NoCapacity(
            "host-full",
            f"host {host} is cordoned, not heard, or its class allows no {vm.vcpus} vcpus and {vm.memory_mib} MiB more; "
            f"see `trimtab host get {host}`",
            host_id=host_id,
        ) from error
