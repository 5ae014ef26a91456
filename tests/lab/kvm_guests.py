"""Real hosts, vms and migrations for the tests of the libvirt hypervisor."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tests.contract.kvm_certificates import give_certificates
from tests.contract.kvm_fixture import KvmHost, kvm_host
from tests.lab.ticks import spoken
from trimtab_agent.hypervisor.base import Stamp
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainObservation,
    DomainSpec,
    DomainState,
    ImageSpec,
    JobProgress,
    MigrationOptions,
    MigrationResult,
    NicSpec,
    PoolSpec,
    PowerAction,
    SeedSpec,
    StateReason,
    UploadSource,
    VolumeSpec,
)

MIB = 1 << 20
BOOT_TIMEOUT_S = 300.0
IMAGE_ID = "img-micro"
T = TypeVar("T")


def until(condition: Callable[[], T | None], *, what: str, deadline_s: float = 180.0) -> T:
    end_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"{what} did not come about within {deadline_s:g} s"
        time.sleep(0.1)
    return found


@dataclass
class Control:
    cancelled: threading.Event = field(default_factory=threading.Event)
    reports: list[JobProgress] = field(default_factory=list)

    def report(self, progress: JobProgress) -> None:
        self.reports.append(progress)


def bring_image(host: KvmHost, pool: PoolSpec) -> None:
    raw = build_guest_image().raw
    host.hypervisor.ensure_pool(pool)
    spec = ImageSpec(image_id=IMAGE_ID, pool_id=pool.pool_id, format=DiskFormat.RAW, max_bytes=1 << 30)
    source = UploadSource(upload_id=str(raw), size_bytes=raw.stat().st_size)
    host.hypervisor.import_image(spec, pool, source, Control())


def volume_of(spec: DomainSpec) -> VolumeSpec:
    return VolumeSpec(
        volume_id=spec.disks[0].volume_id,
        pool_id=spec.disks[0].pool_id,
        format=DiskFormat.QCOW2,
        size_bytes=64 * MIB,
        base_image_id=IMAGE_ID,
        base_image_format=DiskFormat.QCOW2,
    )


def spec_of(host: KvmHost, name: str, pool: PoolSpec, *, user_yaml: str = "", **changes: Any) -> DomainSpec:
    number = sum(name.encode()) % 200
    spec = DomainSpec(
        vm_id=f"vm-{name}",
        uuid=f"6f1b3c1e-7c1f-5d0a-9a53-{int.from_bytes(name.encode()[:6], 'big'):012x}",
        name=name,
        project="default",
        machine="pc-q35-7.2",
        cpu_model="qemu64",
        vcpus=1,
        vcpus_max=1,
        memory_mib=96,
        memory_max_mib=96,
        disks=(DiskSpec(volume_id=f"vol-{name}", pool_id=pool.pool_id, format=DiskFormat.QCOW2, index=0),),
        nics=(NicSpec(nic_id=f"nic-{name}", network_id=host.network.network_id, mac=f"52:54:00:00:01:{number:02x}", index=0),),
        seed=SeedSpec(meta_yaml=f"instance-id: i-{name}\nlocal-hostname: {name}\n", user_yaml=user_yaml),
        networks=(host.network,),
        pools=(pool,),
    )
    return replace(spec, **changes)


def start(host: KvmHost, spec: DomainSpec, *, epoch: int = 1) -> DomainObservation:
    pool = next(each for each in spec.pools if each.pool_id == spec.disks[0].pool_id)
    host.hypervisor.ensure_volume(volume_of(spec), pool)
    host.hypervisor.define_domain(spec, Stamp(epoch=epoch, turn=1))
    return host.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=epoch, turn=2))


def console(host: KvmHost, vm_id: str) -> str:
    return host.hypervisor.read_console(vm_id, -65536, 65536)[0].decode(errors="replace")


def last_tick(host: KvmHost, vm_id: str) -> int:
    """Return what the guest said last, 0 before it said anything; of a line that is on its way nobody knows what it will say."""
    said = spoken(console(host, vm_id))
    return said[-1][0] if said else 0


def wait_for_tick(host: KvmHost, vm_id: str, number: int) -> int:
    return until(
        lambda: tick if (tick := last_tick(host, vm_id)) >= number else 0, what=f"tick {number}", deadline_s=BOOT_TIMEOUT_S
    )


def state_of(host: KvmHost, vm_id: str) -> tuple[DomainState, StateReason]:
    seen = host.hypervisor.observe_domain(vm_id)
    return seen.state, seen.reason


def wait_for_state(host: KvmHost, vm_id: str, state: DomainState, reason: StateReason = StateReason.NONE) -> None:
    until(lambda: state_of(host, vm_id) == (state, reason), what=f"{vm_id} {state.value}/{reason.value} on {host.name}")


def remove(host: KvmHost, spec: DomainSpec) -> None:
    host.hypervisor.undefine_domain(spec.vm_id, spec.pools, kill_if_running=True, keep_state_files=False)
    for pool in spec.pools:
        host.hypervisor.delete_volume(spec.disks[0].volume_id, pool)


@contextlib.contextmanager
def cleaned(spec: DomainSpec, *hosts: KvmHost) -> Iterator[None]:
    """Remove the vm from the hosts afterwards, so that the next test finds room."""
    try:
        yield
    finally:
        for host in hosts:
            with contextlib.suppress(TrimtabError):
                remove(host, spec)


class Migration(threading.Thread):
    """A migration on its own thread, as the agent runs it."""

    def __init__(
        self,
        source: KvmHost,
        target: KvmHost,
        spec: DomainSpec,
        *,
        copied: tuple[VolumeSpec, ...] = (),
        options: MigrationOptions | None = None,
        epoch: int = 2,
        is_prepared: bool = False,
    ) -> None:
        super().__init__(daemon=True)
        self.control = Control()
        self.outcome: MigrationResult | Exception | None = None
        uris = ("", "") if is_prepared else target.hypervisor.prepare_migration(spec, copied, f"host-{source.name}")

        def call() -> MigrationResult:
            return source.hypervisor.migrate(
                spec.vm_id,
                spec,
                Stamp(epoch=epoch, turn=3),
                libvirt_uri=uris[0],
                migration_uri=uris[1],
                copied_volume_ids=[volume.volume_id for volume in copied],
                options=options or MigrationOptions(),
                control=self.control,
            )

        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._call()
        except Exception as error:
            self.outcome = error

    def ended(self, timeout_s: float = 120.0) -> MigrationResult | Exception:
        self.join(timeout_s)
        assert self.outcome is not None, "the migration did not end"
        return self.outcome


@contextlib.contextmanager
def two_hosts(directory: Path, *, is_second_short: bool = False) -> Iterator[tuple[Lab, KvmHost, KvmHost]]:
    """A lab of two hosts whose pools hold the guest's image, with a hypervisor inside each."""
    lab = Lab.named(f"kvm-{os.getpid()}")
    lab.up(hosts=2)
    try:
        give_certificates(lab)
        with (
            kvm_host(lab, "node1", directory, has_tls=True) as node1,
            kvm_host(lab, "node2", directory, has_tls=True, is_short=is_second_short) as node2,
        ):
            for host in (node1, node2):
                bring_image(host, host.local_pool)
                host.hypervisor.ensure_pool(host.shared_pool)
            bring_image(node1, node1.shared_pool)
            yield lab, node1, node2
    finally:
        lab.down()


def bring_another(host: KvmHost, pool: PoolSpec) -> None:
    raw = build_guest_image().raw
    spec = ImageSpec(image_id="img-other", pool_id=pool.pool_id, format=DiskFormat.RAW, max_bytes=1 << 30)
    host.hypervisor.import_image(spec, pool, UploadSource(upload_id=str(raw), size_bytes=0), Control())
