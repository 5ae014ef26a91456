"""The two hosts that the contract is asked of, simulated ones always and libvirt's in the lab, and one vm for each test."""

import base64
import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.contract.kvm_fixture import FileReader
from tests.unit.agent.kvm.factories import qcow2_header
from trimtab_agent.hypervisor.base import Hypervisor, Stamp
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainObservation,
    DomainSpec,
    DomainState,
    ImageResult,
    ImageSpec,
    JobProgress,
    NetworkKind,
    NetworkSpec,
    NicSpec,
    PoolSpec,
    PowerAction,
    SeedSpec,
    StateReason,
    UploadSource,
    VolumeSpec,
)

MIB = 1 << 20
IMAGE_ID = "img-contract"
T = TypeVar("T")


# --- the two hosts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """One host under test."""

    name: str
    hypervisor: Hypervisor
    local_pool: PoolSpec
    shared_pool: PoolSpec
    network: NetworkSpec
    patience_s: float
    """How long an effect that is not immediate may take here."""


@dataclass(frozen=True, slots=True)
class Hosts:
    first: Side
    second: Side
    image: Path
    """A raw image that boots, as far as this hypervisor boots anything."""
    boots: bool
    """Guests really run code."""
    write: Callable[[Side, VolumeSpec, PoolSpec, bytes], None]
    """Begin a raw volume with these bytes, as its guest could."""
    read: Callable[[Side, VolumeSpec, PoolSpec, int], bytes]
    """Return its first bytes."""


@dataclass(slots=True)
class Control:
    cancelled: threading.Event = field(default_factory=threading.Event)
    reports: list[JobProgress] = field(default_factory=list)

    def report(self, progress: JobProgress) -> None:
        self.reports.append(progress)


@pytest.fixture(
    scope="package",
    params=["simulated", pytest.param("kvm", marks=pytest.mark.lab)],
)
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    directory = tmp_path_factory.mktemp("contract")
    opened = simulated_hosts(directory) if request.param == "simulated" else kvm_hosts(directory)
    with opened as hosts:
        for side in (hosts.first, hosts.second):
            for pool in (side.local_pool, side.shared_pool):
                side.hypervisor.ensure_pool(pool)
            side.hypervisor.ensure_network(side.network)
            bring_image(side, side.local_pool, hosts.image)
        bring_image(hosts.first, hosts.first.shared_pool, hosts.image)
        yield hosts


@contextlib.contextmanager
def simulated_hosts(directory: Path) -> Iterator[Hosts]:
    from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
    from trimtab_agent.hypervisor.simulation import SimulatedFleet

    image = directory / "image.raw"
    image.write_bytes(os.urandom(MIB))
    fleet = SimulatedFleet()

    def side(name: str) -> Side:
        return Side(
            name=name,
            hypervisor=SimulatedHypervisor(fleet, SimulatedHost(host_id=name), reader=FileReader()),
            local_pool=PoolSpec(pool_id="pool-local", path="/srv/local"),
            shared_pool=PoolSpec(pool_id="pool-shared", path="/srv/shared", is_shared=True),
            network=NetworkSpec(network_id="net-guests", kind=NetworkKind.BRIDGE, name="guests", bridge="br0"),
            patience_s=5.0,
        )

    def write(_side: Side, volume: VolumeSpec, _pool: PoolSpec, content: bytes) -> None:
        fleet.disk_contents[volume.volume_id] = bytearray(content)

    def read(_side: Side, volume: VolumeSpec, _pool: PoolSpec, count: int) -> bytes:
        return bytes(fleet.disk_contents[volume.volume_id][:count])

    yield Hosts(side("host-1"), side("host-2"), image, boots=False, write=write, read=read)
    assert fleet.double_runs == []
    fleet.close()


@contextlib.contextmanager
def kvm_hosts(directory: Path) -> Iterator[Hosts]:
    from tests.contract.kvm_certificates import give_certificates
    from tests.contract.kvm_fixture import kvm_host
    from trimtab_lab.guest import build_guest_image
    from trimtab_lab.hosts import Lab

    lab = Lab.named(f"con-{os.getpid()}")
    lab.up(hosts=2)

    def in_host(side: Side, volume: VolumeSpec, pool: PoolSpec, script: str) -> str:
        path = f"{pool.path}/volumes/{volume.volume_id}.raw"
        return lab.run(side.name, ["sh", "-ec", f"path={path}; {script}"]).stdout

    def write(side: Side, volume: VolumeSpec, pool: PoolSpec, content: bytes) -> None:
        text = base64.b64encode(content).decode()
        in_host(side, volume, pool, f"echo {text} | base64 -d | dd of=$path conv=notrunc status=none")

    def read(side: Side, volume: VolumeSpec, pool: PoolSpec, count: int) -> bytes:
        return base64.b64decode(in_host(side, volume, pool, f"head -c {count} $path | base64"))

    try:
        give_certificates(lab)
        with (
            kvm_host(lab, "node1", directory, has_tls=True) as first,
            kvm_host(lab, "node2", directory, has_tls=True) as second,
        ):
            sides = [
                Side(each.name, each.hypervisor, each.local_pool, each.shared_pool, each.network, patience_s=60.0)
                for each in (first, second)
            ]
            # The lab's cache is the machine's own; what lies below /tmp every host sees.
            image = Path(shutil.copy(build_guest_image().raw, directory))
            yield Hosts(sides[0], sides[1], image, boots=True, write=write, read=read)
    finally:
        lab.down()


def bring_image(side: Side, pool: PoolSpec, path: Path, *, image_id: str = IMAGE_ID, **changes: Any) -> ImageResult:
    image = ImageSpec(image_id=image_id, pool_id=pool.pool_id, format=DiskFormat.RAW, max_bytes=1 << 30)
    source = UploadSource(upload_id=str(path), size_bytes=path.stat().st_size)
    return side.hypervisor.import_image(replace(image, **changes), pool, source, Control())


# --- vms -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vm:
    """A vm with one disk, a linked clone in one pool."""

    spec: DomainSpec
    volume: VolumeSpec
    pool: PoolSpec

    @property
    def id(self) -> str:
        return self.spec.vm_id


def vm_of(side: Side, name: str, pool: PoolSpec) -> Vm:
    number = sum(name.encode()) % 250
    volume = VolumeSpec(
        volume_id=f"vol-{name}",
        pool_id=pool.pool_id,
        format=DiskFormat.QCOW2,
        size_bytes=64 * MIB,
        base_image_id=IMAGE_ID,
        base_image_format=DiskFormat.QCOW2,
    )
    spec = DomainSpec(
        vm_id=f"vm-{name}",
        uuid=f"5d0a9a53-7c1f-4d0a-9a53-{int.from_bytes(name.encode()[-6:], 'big'):012x}",
        name=name,
        project="default",
        machine="pc-q35-7.2",
        cpu_model="qemu64",
        vcpus=1,
        vcpus_max=1,
        memory_mib=96,
        memory_max_mib=96,
        disks=(DiskSpec(volume_id=volume.volume_id, pool_id=pool.pool_id, format=DiskFormat.QCOW2, index=0, boot_order=1),),
        nics=(NicSpec(nic_id=f"nic-{name}", network_id=side.network.network_id, mac=f"52:54:00:00:02:{number:02x}", index=0),),
        seed=SeedSpec(meta_yaml=f"instance-id: i-{name}\nlocal-hostname: {name}\n"),
        networks=(side.network,),
        pools=(pool,),
    )
    return Vm(spec, volume, pool)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A short name that no other test of this module uses."""
    tests = [item.name for item in request.session.items if item.fspath == request.node.fspath]
    return f"c{tests.index(request.node.name)}"


@pytest.fixture
def vm(hosts: Hosts, name: str) -> Iterator[Vm]:
    """A vm that is defined and stopped on the first host, in the shared pool."""
    made = vm_of(hosts.first, name, hosts.first.shared_pool)
    define(hosts.first, made)
    yield made
    remove(hosts, made)


def with_evil_disk(hosts: Hosts, side: Side, name: str) -> tuple[Vm, bytes]:
    """Define a vm whose guest has begun its raw disk in the local pool like an image over a file of its host; return that beginning."""
    made = vm_of(side, name, side.local_pool)
    (disk,) = made.spec.disks
    raw = replace(made.volume, format=DiskFormat.RAW, base_image_id="", base_image_format=None)
    evil = Vm(replace(made.spec, disks=(replace(disk, format=DiskFormat.RAW),)), raw, made.pool)
    define(side, evil)
    header = qcow2_header(backing=b"/etc/shadow", virtual_size_bytes=raw.size_bytes)[:4096]
    hosts.write(side, raw, evil.pool, header)
    return evil, header


def define(side: Side, vm: Vm, *, epoch: int = 1, turn: int = 1) -> DomainObservation:
    side.hypervisor.ensure_volume(vm.volume, vm.pool)
    return side.hypervisor.define_domain(vm.spec, Stamp(epoch=epoch, turn=turn))


def power(side: Side, vm: Vm, action: PowerAction, *, epoch: int = 1, turn: int = 2) -> DomainObservation:
    return side.hypervisor.change_power(vm.id, action, Stamp(epoch=epoch, turn=turn))


def remove(hosts: Hosts, vm: Vm) -> None:
    # The state files last: on a shared pool they are open as long as the guest runs on either host.
    for keep in (True, False):
        for side in (hosts.first, hosts.second):
            side.hypervisor.undefine_domain(vm.id, (vm.pool,), kill_if_running=True, keep_state_files=keep)
    for side in (hosts.first, hosts.second):
        side.hypervisor.delete_volume(vm.volume.volume_id, vm.pool)


def until(condition: Callable[[], T], *, what: str, deadline_s: float) -> T:
    end_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"{what} did not come about within {deadline_s:g} s"
        time.sleep(0.05)
    return found


def refusal(call: Callable[[], object]) -> tuple[type[TrimtabError], str]:
    with pytest.raises(TrimtabError) as caught:
        call()
    return type(caught.value), caught.value.code


def absent(side: Side, vm: Vm) -> bool:
    return side.hypervisor.observe_domain(vm.id).state is DomainState.ABSENT


def has_left(side: Side, vm: Vm) -> bool:
    """The guest's process is gone by migration; the definition may stay until the side is settled."""
    seen = side.hypervisor.observe_domain(vm.id)
    return seen.state is DomainState.ABSENT or (seen.state, seen.reason) == (DomainState.STOPPED, StateReason.MIGRATED)
