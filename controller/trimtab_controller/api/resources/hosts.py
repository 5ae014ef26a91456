"""Hosts, classes and join tokens as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.render import etag_of
from trimtab_controller.api.resources.failover import FencePathResource, render_path
from trimtab_controller.core.model import HostClass, Maintenance
from trimtab_controller.services.hosts import IssuedHostToken
from trimtab_controller.services.hosts_admin import HostView
from trimtab_controller.store.fence_intents import FenceIntentRow
from trimtab_controller.store.host_guards import HostGuard
from trimtab_controller.store.host_tokens import HostToken
from trimtab_protos.messages import Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class UseResource:
    """`limit` is what the class allows; `unmanaged` what domains that are not ours take of it."""

    limit: int
    claimed: int
    unmanaged: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateResource:
    purpose: str
    serial: str
    issued_at: datetime
    not_after: datetime
    # Half of its life: the agent renews it by itself from then on.
    renews_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPoolResource:
    pool: str
    state: str
    problem: str
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeResource:
    name: str
    mtu: int
    has_carrier: bool
    is_ours: bool
    is_open_vswitch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PciDeviceResource:
    address: str
    vendor_id: str
    product_id: str
    class_id: str
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaCellResource:
    index: int
    memory_mib: int
    cpus: tuple[int, ...]
    # Pages kept on the host, by their size in KiB.
    huge_pages: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryResource:
    hostname: str
    arch: str
    kernel: str
    agent_version: str
    libvirt_version: str
    qemu_version: str
    # What the installed QEMU says of itself, with its package; '' where the agent does not say.
    qemu_build: str
    # What another QEMU says of itself that a guest runs, by vm id: until it moves or stops.
    guest_qemus: dict[str, str]
    # kvm or tcg: what a probe guest really ran on.
    accelerator: str
    cpu_vendor: str
    cpu_model: str
    usable_cpu_models: tuple[str, ...]
    cpus: int
    memory_mib: int
    machines: tuple[str, ...]
    has_uefi: bool
    capabilities: tuple[str, ...]
    numa_cells: tuple[NumaCellResource, ...]
    pci_devices: tuple[PciDeviceResource, ...]
    bridges: tuple[BridgeResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceIntentResource:
    """What was written in a silent host's slot on shared storage: its leases up to this one are forbidden."""

    lease_number: int
    # Of the leader.
    term: int
    # The id of the host whose agent was asked to write it.
    via_host: str
    # When it was durable; None: not yet.
    written_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionResource:
    """What makes certain that this host's guests have ended before they start elsewhere."""

    # Of the session; a renewal of an older one counts for nothing.
    lease_number: int
    # Since the renewal that a gateway handled last; None: none since this controller started.
    lease_age_s: float | None
    # The warden ends the guests named in `would_kill` when the lease ends unrenewed.
    is_warden_armed: bool
    # The longest it takes to, as it measured, or what is assumed.
    kill_s: float
    # How much faster the clock of its leases runs than its bare oscillator, in millionths; None: nobody heard it since we started.
    clock_rate_ppm: int | None
    would_kill: tuple[str, ...]
    # Why the warden is not armed, as it says; empty where it is.
    warden_missing: tuple[str, ...]
    # The shared pool in which it renews besides, so that it outlives the controllers; '' : in none.
    beacon_pool: str
    # Since it renewed there, as it said last, and the time since then; None: not since it booted.
    beacon_age_s: float | None
    # Why its last round did not renew; '' where it did.
    beacon_problem: str
    # The intent that forbids its leases there, written while it is silent; None: there is none.
    fence_intent: FenceIntentResource | None
    fence_paths: tuple[FencePathResource, ...]
    # As `warden`, `power`, `none`: the best proof that could be had of it now. Without one an operator has to confirm.
    best_proof: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TroubleResource:
    """What is wrong with a host that is heard from: `network-degraded`, `storage-lost`."""

    kind: str
    message: str
    # None where it is not on record.
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceResource:
    """The hold on a host that was emptied for its maintenance; `trimtab host maintenance end` ends it."""

    # The tour that holds it; '' where somebody began a maintenance of this host alone.
    plan: str
    by: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResource:
    id: str
    name: str
    host_class: str
    labels: dict[str, str]
    # Keep vms off: {key, value, effect}.
    taints: tuple[dict[str, str], ...]
    # The one project whose vms may be placed there; '' for any.
    exclusive_project: str
    # Kept for vms with dedicated cpus, `4-15,20`.
    dedicated_cpus: str
    is_cordoned: bool
    # None where nobody holds it.
    maintenance: MaintenanceResource | None
    # new, up, suspect, lost or fenced; since `connectivity_at`.
    connectivity: str
    connectivity_at: datetime
    troubles: tuple[TroubleResource, ...]
    # When a gateway last heard of it; None: not since this controller started.
    heard_at: datetime | None
    heard_age_s: float | None
    boot_id: str
    agent_address: str
    migration_address: str
    vcpus: UseResource
    memory_mib: UseResource
    vms: int
    vms_running: int
    certificates: tuple[CertificateResource, ...]
    # Only where one host is asked for.
    protection: ProtectionResource | None
    pools: tuple[HostPoolResource, ...]
    inventory: InventoryResource | None
    inventory_at: datetime | None
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClassResource:
    id: str
    name: str
    cpu_model: str | None
    machine: str | None
    vcpu_ratio_permille: int
    memory_ratio_permille: int
    memory_reserve_mib: int
    policy: str
    # any, or one-host-loss: only what could be restarted after the loss of one host.
    admission: str
    # What classes of cpu time mean on its hosts, by name: {weight, limit_percent}.
    cpu_classes: dict[str, dict[str, int]]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTokenResource:
    id: str
    name: str
    is_rejoin: bool
    created_by: str
    expires_at: datetime
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHostTokenResource:
    id: str
    # Shown once; '' in the answer to a repeat, as is the command.
    token: str
    command: str
    expires_at: datetime


def render_host(
    view: HostView,
    *,
    now: datetime,
    heard: Mapping[str, datetime],
    is_full: bool,
    state: Mapping[str, Any] | None = None,
) -> HostResource:
    """`state`: what a gateway last wrote of it, for the one host that is shown in full."""
    host = view.host
    heard_at = heard.get(host.id)
    return HostResource(
        id=host.id,
        name=host.name,
        host_class=view.host_class_name,
        labels=dict(host.labels),
        taints=tuple(dict(taint) for taint in host.taints),
        exclusive_project=view.exclusive_project_name,
        dedicated_cpus=host.dedicated_cpus,
        is_cordoned=host.is_cordoned,
        maintenance=_maintenance(view.maintenance),
        connectivity=host.connectivity.value,
        connectivity_at=host.connectivity_at,
        troubles=tuple(TroubleResource(kind=one.kind.value, message=one.message, since=one.since) for one in view.troubles),
        heard_at=heard_at,
        heard_age_s=round(max(0.0, (now - heard_at).total_seconds()), 1) if heard_at else None,
        boot_id=host.boot_id,
        agent_address=host.agent_address,
        migration_address=host.migration_address,
        vcpus=_use(host.vcpus_limit, host.vcpus_claimed, host.unmanaged_vcpus),
        memory_mib=_use(host.memory_limit_mib, host.memory_claimed_mib, host.unmanaged_memory_mib),
        vms=view.counts.vms,
        vms_running=view.counts.vms_running,
        certificates=tuple(
            CertificateResource(
                purpose=one.purpose,
                serial=one.serial,
                issued_at=one.created_at,
                not_after=one.not_after,
                renews_at=one.created_at + (one.not_after - one.created_at) / 2,
            )
            for _purpose, one in sorted(view.certificates.items())
        ),
        protection=_protection(view, now=now, state=state or {}) if is_full else None,
        pools=tuple(
            HostPoolResource(pool=name, state=one.state, problem=one.problem, observed_at=one.observed_at)
            for name, one in view.pools.items()
        ),
        inventory=_inventory(host.inventory, is_full=is_full) if host.inventory else None,
        inventory_at=host.inventory_at,
        version=host.version,
        etag=etag_of(host.version),
        created_at=host.created_at,
    )


def _maintenance(held: Maintenance | None) -> MaintenanceResource | None:
    return None if held is None else MaintenanceResource(plan=held.plan_id, by=held.created_by, since=held.created_at)


def _protection(view: HostView, *, now: datetime, state: Mapping[str, Any]) -> ProtectionResource:
    host, guard, paths = view.host, view.guard or HostGuard(), tuple(render_path(one) for one in view.fence_paths)
    at_ms = state.get("at_ms")
    best = "power" if any(path.is_ready for path in paths) else "warden" if guard.is_armed else "none"
    return ProtectionResource(
        lease_number=host.lease_number,
        lease_age_s=round(max(0.0, now.timestamp() - at_ms / 1000), 1) if at_ms else None,
        is_warden_armed=guard.is_armed,
        kill_s=guard.kill_ms / 1000,
        clock_rate_ppm=state.get("clock_rate_ppm"),
        would_kill=view.would_kill,
        warden_missing=tuple(state.get("warden_missing") or ()),
        beacon_pool=next((name for name, one in view.pools.items() if one.pool_id == guard.beacon_pool_id), guard.beacon_pool_id),
        beacon_age_s=_beacon_age_s(state, now),
        beacon_problem=str(state.get("beacon_problem") or ""),
        fence_intent=_fence_intent(view.fence_intent),
        fence_paths=paths,
        best_proof=best,
    )


def _beacon_age_s(state: Mapping[str, Any], now: datetime) -> float | None:
    at_ms, age_ms = state.get("at_ms"), state.get("beacon_age_ms")
    if not at_ms or not age_ms:
        return None
    return round(float(age_ms) / 1000 + max(0.0, now.timestamp() - float(at_ms) / 1000), 1)


def _fence_intent(row: FenceIntentRow | None) -> FenceIntentResource | None:
    if row is None:
        return None
    return FenceIntentResource(lease_number=row.lease_number, term=row.term, via_host=row.via_host_id, written_at=row.written_at)


def render_class(host_class: HostClass) -> HostClassResource:
    return HostClassResource(
        id=host_class.id,
        name=host_class.name,
        cpu_model=host_class.cpu_model,
        machine=host_class.machine,
        vcpu_ratio_permille=host_class.vcpu_ratio_permille,
        memory_ratio_permille=host_class.memory_ratio_permille,
        memory_reserve_mib=host_class.memory_reserve_mib,
        policy=host_class.policy,
        admission=host_class.admission,
        cpu_classes={name: dict(one) for name, one in host_class.cpu_classes.items()},
        version=host_class.version,
        etag=etag_of(host_class.version),
        created_at=host_class.created_at,
    )


def render_host_token(token: HostToken) -> HostTokenResource:
    return HostTokenResource(
        id=token.id,
        name=token.name,
        is_rejoin=token.host_id is not None,
        created_by=token.created_by,
        expires_at=token.expires_at,
        created_at=token.created_at,
    )


def render_new_host_token(issued: IssuedHostToken, *, with_secret: bool) -> NewHostTokenResource:
    return NewHostTokenResource(
        id=issued.id,
        token=issued.secret if with_secret else "",
        command=issued.command if with_secret else "",
        expires_at=issued.expires_at,
    )


def _use(limit: int, claimed: int, unmanaged: int) -> UseResource:
    return UseResource(limit=limit, claimed=claimed, unmanaged=unmanaged, free=max(0, limit - claimed - unmanaged))


def _inventory(inventory: Inventory, *, is_full: bool) -> InventoryResource:
    """Lists of hosts leave the long lists out; one host has them."""
    return InventoryResource(
        hostname=inventory.hostname,
        arch=inventory.arch,
        kernel=inventory.kernel,
        agent_version=inventory.agent_version,
        libvirt_version=inventory.libvirt_version,
        qemu_version=inventory.qemu_version,
        qemu_build=inventory.qemu_build,
        guest_qemus={one.vm_id: one.build for one in inventory.guest_qemus} if is_full else {},
        accelerator=inventory.accelerator,
        cpu_vendor=inventory.cpu_vendor,
        cpu_model=inventory.cpu_model,
        usable_cpu_models=inventory.usable_cpu_models if is_full else (),
        cpus=inventory.cpus,
        memory_mib=inventory.memory_mib,
        machines=inventory.machines if is_full else (),
        has_uefi=inventory.has_uefi,
        capabilities=inventory.capabilities if is_full else (),
        numa_cells=tuple(
            NumaCellResource(
                index=cell.index,
                memory_mib=cell.memory_mib,
                cpus=cell.cpus,
                huge_pages={str(size_kib): count for size_kib, count in cell.huge_pages.items()},
            )
            for cell in inventory.numa_cells
        )
        if is_full
        else (),
        pci_devices=tuple(
            PciDeviceResource(
                address=one.address,
                vendor_id=one.vendor_id,
                product_id=one.product_id,
                class_id=one.class_id,
                driver=one.driver,
            )
            for one in inventory.pci_devices
        )
        if is_full
        else (),
        bridges=tuple(
            BridgeResource(
                name=one.name,
                mtu=one.mtu,
                has_carrier=one.has_carrier,
                is_ours=one.is_ours,
                is_open_vswitch=one.is_open_vswitch,
            )
            for one in inventory.bridges
        )
        if is_full
        else (),
    )
