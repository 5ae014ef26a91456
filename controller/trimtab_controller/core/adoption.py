"""What becomes of somebody's libvirt domain when it is adopted: typed fields, what its definition keeps until its next stop, what
changes then, and what refuses. Pure.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from trimtab_controller.core import cpu_features
from trimtab_controller.core.baseline import PREFERRED_MODELS
from trimtab_protos.adoption_messages import DescribedDisk, DescribedNic, DomainDescription
from trimtab_protos.messages import DiskBus, DiskFormat, DomainState

NIC_MODELS = ("virtio", "e1000e")
DEFAULT_CPU_MODEL = "qemu64"
# Modes of a definition that names a CPU model, or leaves it to QEMU.
_NAMED_CPU = ("custom", "")
_MODELS_NAMED = 3
_SATA_DISKS_MAX = 5
_VOLUME_FILE = re.compile(r"/volumes/(vol-[0-9a-z_-]+)(?:\.[0-9a-z_-]+)?\.(?:qcow2|raw)$")
_IMAGE_FILE = re.compile(r"(img-[0-9a-z_-]+)\.(?:qcow2|raw|iso)")
_RUNS = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlace:
    """A pool that the domain's host reaches."""

    id: str
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What of the host decides about its domains."""

    name: str
    machines: Sequence[str]
    cpu_model: str
    usable_cpu_models: Collection[str]
    cpu_features: Collection[str]
    lists_all_cpu_features: bool
    pools: Sequence[PoolPlace]
    networks: Mapping[str, NetworkChoice]
    """By the bridge or libvirt network that a card is on."""


@dataclass(frozen=True, slots=True)
class Refusal:
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedDiskPlan:
    target: str
    path: str
    pool: PoolPlace
    format: DiskFormat
    bus: DiskBus
    size_bytes: int
    index: int
    boot_order: int
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedNicPlan:
    mac: str
    model: str
    network: NetworkChoice
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionPlan:
    machine: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    is_running: bool
    disks: tuple[AdoptedDiskPlan, ...]
    nics: tuple[AdoptedNicPlan, ...]
    kept: tuple[str, ...]
    """Parts of the definition that no field says; they stay until the next stop and are gone after it."""
    changes: tuple[str, ...]
    """What is otherwise after the next stop, in sentences."""
    refusals: tuple[Refusal, ...]


@dataclass(slots=True)
class _Draft:
    changes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def refuse(self, code: str, message: str) -> None:
        self.refusals.append(Refusal(code, message))


def plan(described: DomainDescription, host: HostFacts) -> AdoptionPlan:
    """Return what adopting the domain would make of it; nothing may be adopted while `refusals` has entries."""
    draft = _Draft()
    if described.vm_id:
        draft.refuse("domain-is-ours", f"domain {described.name} is vm {described.vm_id} already")
    if described.arch != "x86_64":
        draft.refuse("arch-unknown", f"domain {described.name} is {described.arch}; only x86_64 can be adopted")
    for obstacle in described.obstacles:
        draft.refuse("domain-not-adoptable", f"domain {described.name}: {obstacle}")
    machine = _machine(described, host, draft)
    cpu_model = _cpu_model(described, host, draft)
    features = _cpu_features(described, host, draft)
    disks = _disks(described, host, draft)
    nics = tuple(_nic(card, index, host, draft) for index, card in enumerate(described.nics))
    if any(disk.device == "cdrom" and disk.path for disk in described.disks):
        draft.changes.append("the CD-ROM drive is empty; `trimtab vm cdrom` puts an imported ISO in")
    return AdoptionPlan(
        machine=machine,
        cpu_model=cpu_model,
        cpu_features=features,
        is_running=described.state in _RUNS,
        disks=disks,
        nics=tuple(nic for nic in nics if nic is not None),
        kept=described.kept,
        changes=("devices are at Trimtab's PCI addresses, under the name trimtab-<vm id>", *draft.changes),
        refusals=tuple(draft.refusals),
    )


def _machine(described: DomainDescription, host: HostFacts, draft: _Draft) -> str:
    if described.machine in host.machines:
        return described.machine
    version = described.machine.rpartition("-")[2]
    same = f"pc-q35-{version}"
    chosen = same if same in host.machines else max(host.machines, key=_version_of, default="")
    if not chosen:
        draft.refuse("machine-unknown", f"host {host.name} reports no machine type of pc-q35")
    draft.changes.append(f"machine type {described.machine} becomes {chosen}")
    return chosen


def _version_of(machine: str) -> tuple[int, ...]:
    return tuple(int(part) for part in machine.rpartition("-")[2].split(".") if part.isdigit())


def _cpu_model(described: DomainDescription, host: HostFacts, draft: _Draft) -> str:
    chosen = _chosen_cpu_model(described, host)
    if not chosen:
        draft.refuse("cpu-unknown", f"domain {described.name} has CPU {described.cpu_mode}, and host {host.name} names no model")
        return ""
    if described.cpu_mode not in _NAMED_CPU:
        draft.changes.append(f"CPU {described.cpu_mode} becomes model {chosen}")
    if chosen not in host.usable_cpu_models:
        best = [model for model in PREFERRED_MODELS if model in host.usable_cpu_models]
        some = ", ".join((best or sorted(host.usable_cpu_models))[:_MODELS_NAMED]) or "one that it can"
        cure = f"name another in its definition (`virsh edit {described.name}`: {some}) and stop and start it"
        draft.refuse(
            "cpu-model-unusable",
            f"cpu_model: domain {described.name} would get {chosen}, which host {host.name} cannot run; {cure}",
        )
    return chosen


def _chosen_cpu_model(described: DomainDescription, host: HostFacts) -> str:
    if described.cpu_mode not in _NAMED_CPU:
        return host.cpu_model
    return described.cpu_model or DEFAULT_CPU_MODEL


def _cpu_features(described: DomainDescription, host: HostFacts, draft: _Draft) -> tuple[str, ...]:
    features, changes = cpu_features.of_adopted(described.cpu_features)
    draft.changes.extend(changes)
    missing = cpu_features.missing(features, host.cpu_features)
    if missing:
        cure = f"take them out of its definition (`virsh edit {described.name}`) and stop and start it"
        if not host.lists_all_cpu_features:
            cure = "its agent tells only some, update it; or " + cure
        draft.refuse(
            "cpu-features-missing",
            f"cpu_features: domain {described.name} requires {', '.join(missing)}, which host {host.name} does not list; {cure}",
        )
    return features


def _disks(described: DomainDescription, host: HostFacts, draft: _Draft) -> tuple[AdoptedDiskPlan, ...]:
    disks = [disk for disk in described.disks if disk.device == "disk"]
    if not disks:
        draft.refuse("no-disks", f"domain {described.name} has no disk that could be a volume")
    has_order = any(disk.boot_order for disk in disks)
    planned = []
    for index, disk in enumerate(disks):
        order = disk.boot_order if has_order else int(index == 0)
        one = _disk(disk, index, order, host, draft)
        if one is not None:
            planned.append(one)
    sata = sum(disk.bus is DiskBus.SATA for disk in planned)
    if sata and len(planned) > _SATA_DISKS_MAX:
        draft.refuse(
            "too-many-disks", f"domain {described.name} has {len(planned)} disks, some SATA; {_SATA_DISKS_MAX} at most then"
        )
    return tuple(planned)


def _disk(disk: DescribedDisk, index: int, order: int, host: HostFacts, draft: _Draft) -> AdoptedDiskPlan | None:
    if disk.problem:
        draft.refuse("disk-not-adoptable", f"disk {disk.target}: {disk.problem}")
        return None
    if disk.volume_id:
        draft.refuse("disk-is-a-volume", f"disk {disk.target} is volume {disk.volume_id} already")
        return None
    pool = _pool_of(disk.path, host)
    if pool is None:
        directory = PurePosixPath(disk.path).parent
        draft.refuse(
            "disk-outside-pools",
            f"disk {disk.target}: {disk.path} lies in no pool that host {host.name} reaches; "
            f"`trimtab pool create {directory.name or 'disks'} --path {directory}` makes one of its directory",
        )
        return None
    bus = DiskBus(disk.bus) if disk.bus in set(DiskBus) else DiskBus.SATA
    if bus.value != disk.bus:
        draft.changes.append(f"disk {disk.target} is on {bus.value} instead of {disk.bus}")
    return AdoptedDiskPlan(
        target=disk.target,
        path=disk.path,
        pool=pool,
        format=DiskFormat(disk.format),
        bus=bus,
        size_bytes=disk.size_bytes,
        index=index,
        boot_order=order,
        is_read_only=disk.is_read_only,
    )


def volume_id_of(path: str) -> str:
    """Return whose file it would be by its name, as agents name volumes' files; '' for any other."""
    found = _VOLUME_FILE.search(path)
    return found[1] if found is not None else ""


def image_id_of(disk: AdoptedDiskPlan) -> str | None:
    """Return whose file it would be, as agents name images' files; '' for another file in its pool's folder of images, None elsewhere."""
    path = PurePosixPath(disk.path)
    if not path.is_relative_to(PurePosixPath(disk.pool.path) / "images"):
        return None
    found = _IMAGE_FILE.fullmatch(path.name)
    return found[1] if found is not None else ""


def _pool_of(path: str, host: HostFacts) -> PoolPlace | None:
    """Return the pool that holds the file: of nested ones the innermost. Its `volumes` folder is not for strangers' files."""
    holding = [pool for pool in host.pools if PurePosixPath(path).is_relative_to(pool.path)]
    return max(holding, key=lambda pool: len(pool.path), default=None)


def _nic(card: DescribedNic, index: int, host: HostFacts, draft: _Draft) -> AdoptedNicPlan | None:
    source = card.bridge or card.network
    network = host.networks.get(source)
    if network is None:
        draft.refuse(
            "network-unknown",
            f"card {card.mac} is on {card.kind} {source or '(none)'}, which is no network of Trimtab on host {host.name}; "
            f"name one with `--network {source or 'SOURCE'}=NETWORK`, or make it with `trimtab network create`",
        )
        return None
    model = card.model if card.model in NIC_MODELS else "e1000e"
    if model != card.model:
        draft.changes.append(f"card {card.mac} is {model} instead of {card.model or 'the default'}")
    return AdoptedNicPlan(mac=card.mac, model=model, network=network, index=index)
