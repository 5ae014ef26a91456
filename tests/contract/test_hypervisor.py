"""What every hypervisor promises, asked of the simulated one always and of libvirt in the lab (marker `lab`).

Each test brings a vm of its own and takes it away again. A guest is booted for real where the question needs no more than its
process: TCG guests take 10 to 20 s to reach their first line, so only one test waits for that.
"""

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
from trimtab_agent.hypervisor.base import DomainChange, Hypervisor, Stamp
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound, TrimtabError
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainObservation,
    DomainSpec,
    DomainState,
    ImageResult,
    ImageSpec,
    JobProgress,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
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

pytestmark = [pytest.mark.timeout(400)]


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


@dataclass(slots=True)
class Control:
    cancelled: threading.Event = field(default_factory=threading.Event)
    reports: list[JobProgress] = field(default_factory=list)

    def report(self, progress: JobProgress) -> None:
        self.reports.append(progress)


@pytest.fixture(
    scope="module",
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

    yield Hosts(side("host-1"), side("host-2"), image, boots=False)
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
            yield Hosts(sides[0], sides[1], image, boots=True)
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


# --- the host ------------------------------------------------------------------------------------------------------------


def test_the_inventory_says_what_guests_need(hosts: Hosts) -> None:
    found = hosts.first.hypervisor.inventory()
    assert found.cpus > 0
    assert found.memory_mib > 0
    assert (found.arch, found.accelerator in {"kvm", "tcg"}) == ("x86_64", True)
    assert "pc-q35-7.2" in found.machines
    assert "qemu64" in found.usable_cpu_models
    assert found.boot_id
    assert found.machine_id
    assert {"pool-dir", "network-bridge", "network-nat", "migrate", "copy-disks"} <= set(found.capabilities)
    assert hosts.first.network.bridge in {bridge.name for bridge in found.bridges}
    assert hosts.first.hypervisor.is_up()
    assert hosts.first.hypervisor.load().memory_available_mib > 0


def test_two_hosts_are_told_apart(hosts: Hosts) -> None:
    first, second = hosts.first.hypervisor.inventory(), hosts.second.hypervisor.inventory()
    assert first.machine_id != second.machine_id
    assert first.smbios_uuid != second.smbios_uuid


# --- pools ---------------------------------------------------------------------------------------------------------------


def test_a_pool_is_ensured_again_and_observed_with_its_space(hosts: Hosts) -> None:
    side = hosts.first
    assert side.hypervisor.ensure_pool(side.local_pool).pool_id == side.local_pool.pool_id
    seen = side.hypervisor.observe_pool(side.local_pool)
    assert seen.is_responsive
    assert 0 < seen.available_bytes <= seen.capacity_bytes
    assert abs(seen.observed_at_ms - time.time() * 1000) < 60_000


@pytest.mark.parametrize("path", ["relative/path", "", "/srv/../etc"])
def test_a_pool_at_no_absolute_path_is_refused(hosts: Hosts, path: str) -> None:
    pool = replace(hosts.first.local_pool, pool_id="pool-wrong", path=path)
    assert refusal(lambda: hosts.first.hypervisor.ensure_pool(pool))[0] is InvalidRequest


def test_a_marker_is_seen_by_every_host_of_a_shared_pool_and_by_no_other(hosts: Hosts) -> None:
    first, second = hosts.first, hosts.second
    for pool, is_seen in ((first.shared_pool, True), (first.local_pool, False)):
        assert first.hypervisor.check_marker(pool, "contract", "word", False) == "word"
        assert first.hypervisor.check_marker(pool, "contract", "", False) == "word"
        assert second.hypervisor.check_marker(pool, "contract", "", False) == ("word" if is_seen else "")
        first.hypervisor.check_marker(pool, "contract", "", True)
        assert first.hypervisor.check_marker(pool, "contract", "", False) == ""
        first.hypervisor.check_marker(pool, "contract", "", True)


def test_a_marker_cannot_leave_the_pool(hosts: Hosts) -> None:
    call = hosts.first.hypervisor.check_marker
    assert refusal(lambda: call(hosts.first.local_pool, "../../escape", "x", False))[0] is InvalidRequest


# --- volumes -------------------------------------------------------------------------------------------------------------


def test_a_volume_is_made_once_and_removed_twice(hosts: Hosts, name: str) -> None:
    side = hosts.first
    volume = VolumeSpec(volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.RAW, size_bytes=8 * MIB)
    assert not side.hypervisor.observe_volume(volume.volume_id, side.local_pool).is_present
    made = side.hypervisor.ensure_volume(volume, side.local_pool)
    assert (made.is_present, made.size_bytes) == (True, 8 * MIB)
    assert made.allocated_bytes < 8 * MIB, "sparse"
    assert side.hypervisor.ensure_volume(volume, side.local_pool).size_bytes == 8 * MIB
    for _repetition in range(2):
        side.hypervisor.delete_volume(volume.volume_id, side.local_pool)
    assert not side.hypervisor.observe_volume(volume.volume_id, side.local_pool).is_present


def test_another_volume_under_the_same_id_is_a_conflict(hosts: Hosts, name: str) -> None:
    side = hosts.first
    volume = VolumeSpec(volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=8 * MIB)
    side.hypervisor.ensure_volume(volume, side.local_pool)
    for other in (replace(volume, size_bytes=16 * MIB), replace(volume, size_bytes=64 * MIB, base_image_id=IMAGE_ID)):
        assert refusal(lambda other=other: side.hypervisor.ensure_volume(other, side.local_pool)) == (  # type: ignore[misc]
            Conflict,
            "volume-differs",
        )
    side.hypervisor.delete_volume(volume.volume_id, side.local_pool)


def test_a_clone_needs_its_image_and_room_for_it(hosts: Hosts, name: str) -> None:
    side = hosts.first
    clone = VolumeSpec(
        volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=64 * MIB, base_image_id="img-none"
    )
    assert refusal(lambda: side.hypervisor.ensure_volume(clone, side.local_pool)) == (NotFound, "image-not-found")
    small = replace(clone, base_image_id=IMAGE_ID, size_bytes=512)
    assert refusal(lambda: side.hypervisor.ensure_volume(small, side.local_pool)) == (
        InvalidRequest,
        "volume-smaller-than-image",
    )
    assert not side.hypervisor.observe_volume(clone.volume_id, side.local_pool).is_present


def test_a_volume_of_no_size_takes_its_images(hosts: Hosts, name: str) -> None:
    side = hosts.first
    virtual_bytes = bring_image(side, side.local_pool, hosts.image).virtual_size_bytes
    for suffix, fields in (("a", {"base_image_id": IMAGE_ID}), ("b", {"copy_image_id": IMAGE_ID})):
        volume = VolumeSpec(
            volume_id=f"vol-{name}{suffix}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=0, **fields
        )
        assert side.hypervisor.ensure_volume(volume, side.local_pool).size_bytes == virtual_bytes
        side.hypervisor.delete_volume(volume.volume_id, side.local_pool)


def test_a_volume_that_a_domain_has_is_not_removed(hosts: Hosts, vm: Vm) -> None:
    call = hosts.first.hypervisor.delete_volume
    assert refusal(lambda: call(vm.volume.volume_id, vm.pool)) == (Conflict, "volume-in-use")


@pytest.mark.parametrize("volume_id", ["../../etc/passwd", "vol-x/../y", "", "-rf", "vol-\0"])
def test_an_id_that_is_no_id_is_refused(hosts: Hosts, volume_id: str) -> None:
    volume = VolumeSpec(volume_id=volume_id, pool_id="pool-local", format=DiskFormat.RAW, size_bytes=MIB)
    assert refusal(lambda: hosts.first.hypervisor.ensure_volume(volume, hosts.first.local_pool))[0] is InvalidRequest


# --- images --------------------------------------------------------------------------------------------------------------


def test_an_import_is_proven_and_found_again(hosts: Hosts) -> None:
    import hashlib

    side = hosts.first
    digest = hashlib.sha256(hosts.image.read_bytes()).hexdigest()
    result = bring_image(side, side.local_pool, hosts.image, source_sha256=digest)
    assert (result.source_sha256, result.format) == (digest, DiskFormat.QCOW2)
    assert result.virtual_size_bytes == hosts.image.stat().st_size
    assert bring_image(side, side.local_pool, hosts.image) == result
    assert side.hypervisor.open_image(IMAGE_ID, side.local_pool).startswith("/")


@pytest.mark.parametrize(
    ("content", "changes", "code"),
    [
        (b"x" * 65536, {"source_sha256": "0" * 64}, "image-checksum-mismatch"),
        (b"x" * 65536, {"format": DiskFormat.QCOW2}, "image-format-mismatch"),
        (b"x" * 65536, {"max_bytes": 4096}, "image-too-large"),
    ],
    ids=["checksum", "format", "size"],
)
def test_a_refused_image_leaves_nothing_behind(
    hosts: Hosts, name: str, tmp_path: Path, content: bytes, changes: dict[str, Any], code: str
) -> None:
    side, image_id = hosts.first, f"img-{name}"
    (tmp_path / "image").write_bytes(content)
    assert refusal(lambda: bring_image(side, side.local_pool, tmp_path / "image", image_id=image_id, **changes)) == (
        InvalidRequest,
        code,
    )
    assert refusal(lambda: side.hypervisor.open_image(image_id, side.local_pool)) == (NotFound, "image-not-found")


def test_an_image_that_refers_to_another_file_is_refused(hosts: Hosts, name: str, tmp_path: Path) -> None:
    import subprocess

    secret, evil = tmp_path / "secret", tmp_path / "evil.qcow2"
    secret.write_bytes(b"secret" * 1000)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(evil)]
    subprocess.run(command, check=True, timeout=30)
    call = lambda: bring_image(  # noqa: E731
        hosts.first, hosts.first.local_pool, evil, image_id=f"img-{name}", format=DiskFormat.QCOW2
    )
    assert refusal(call) == (InvalidRequest, "image-has-backing-file")


def test_a_cancelled_import_leaves_nothing_behind(hosts: Hosts, name: str) -> None:
    side, control = hosts.first, Control()
    control.cancelled.set()
    image = ImageSpec(image_id=f"img-{name}", pool_id="pool-local", format=DiskFormat.RAW)
    source = UploadSource(upload_id=str(hosts.image), size_bytes=hosts.image.stat().st_size)
    assert refusal(lambda: side.hypervisor.import_image(image, side.local_pool, source, control)) == (
        Conflict,
        "job-cancelled",
    )
    assert refusal(lambda: side.hypervisor.open_image(image.image_id, side.local_pool))[0] is NotFound


def test_an_image_with_clones_stays_and_an_absent_one_is_fine(hosts: Hosts, vm: Vm) -> None:
    assert refusal(lambda: hosts.first.hypervisor.delete_image(IMAGE_ID, vm.pool)) == (Conflict, "image-in-use")
    hosts.first.hypervisor.delete_image("img-none", vm.pool)


# --- networks ------------------------------------------------------------------------------------------------------------


def test_a_network_needs_its_bridge_as_it_must_be(hosts: Hosts) -> None:
    side = hosts.first
    side.hypervisor.ensure_network(side.network)
    missing = replace(side.network, network_id="net-missing", bridge="br-missing")
    assert refusal(lambda: side.hypervisor.ensure_network(missing))[0] is Conflict
    jumbo = replace(side.network, network_id="net-jumbo", mtu=9000)
    assert refusal(lambda: side.hypervisor.ensure_network(jumbo))[0] is Conflict
    side.hypervisor.remove_network("net-missing")


# --- domains -------------------------------------------------------------------------------------------------------------


def test_a_defined_domain_is_stopped_and_carries_its_stamp(hosts: Hosts, vm: Vm) -> None:
    seen = define(hosts.first, vm, epoch=3, turn=9)
    assert (seen.state, seen.epoch, seen.turn, seen.is_persistent) == (DomainState.STOPPED, 3, 9, True)
    assert (seen.vm_id, seen.uuid, seen.vcpus, seen.memory_mib) == (vm.id, vm.spec.uuid, 1, 96)
    assert seen.macs == (vm.spec.nics[0].mac,)
    listed = {domain.vm_id: domain for domain in hosts.first.hypervisor.list_domains()}
    assert (listed[vm.id].epoch, listed[vm.id].turn) == (3, 9)


def test_a_domain_starts_once_pauses_resumes_and_is_forced_off(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    started = power(side, vm, PowerAction.START, epoch=2, turn=5)
    assert (started.state, started.epoch, started.turn) == (DomainState.RUNNING, 2, 5)
    again = power(side, vm, PowerAction.START, turn=6)
    assert (again.state, again.starts) == (DomainState.RUNNING, started.starts)
    paused = power(side, vm, PowerAction.PAUSE)
    assert (paused.state, paused.reason) == (DomainState.PAUSED, StateReason.USER_PAUSED)
    assert power(side, vm, PowerAction.PAUSE).state is DomainState.PAUSED
    assert power(side, vm, PowerAction.RESUME).state is DomainState.RUNNING
    assert power(side, vm, PowerAction.RESUME).state is DomainState.RUNNING
    off = power(side, vm, PowerAction.FORCE_OFF)
    assert (off.state, off.reason) == (DomainState.STOPPED, StateReason.DESTROYED)
    assert power(side, vm, PowerAction.FORCE_OFF).state is DomainState.STOPPED
    assert power(side, vm, PowerAction.SHUT_DOWN).state is DomainState.STOPPED


@pytest.mark.parametrize("action", [PowerAction.PAUSE, PowerAction.RESUME, PowerAction.REBOOT, PowerAction.RESET])
def test_a_stopped_domain_is_only_started(hosts: Hosts, vm: Vm, action: PowerAction) -> None:
    assert refusal(lambda: power(hosts.first, vm, action)) == (Conflict, "wrong-domain-state")


def test_a_paused_guest_cannot_be_asked_to_shut_down(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    power(hosts.first, vm, PowerAction.PAUSE)
    assert refusal(lambda: power(hosts.first, vm, PowerAction.SHUT_DOWN)) == (Conflict, "wrong-domain-state")


def test_an_absent_domain_is_an_answer_and_no_place_for_power(hosts: Hosts, name: str) -> None:
    nobody = vm_of(hosts.first, name, hosts.first.shared_pool)
    seen = hosts.first.hypervisor.observe_domain(nobody.id)
    assert (seen.vm_id, seen.state) == (nobody.id, DomainState.ABSENT)
    assert refusal(lambda: power(hosts.first, nobody, PowerAction.START))[0] is NotFound
    hosts.first.hypervisor.undefine_domain(nobody.id, (), kill_if_running=False, keep_state_files=False)


def test_a_start_without_the_disk_is_refused(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.shared_pool)
    hosts.first.hypervisor.define_domain(made.spec, Stamp(1, 1))
    assert refusal(lambda: power(hosts.first, made, PowerAction.START)) == (NotFound, "volume-not-found")
    remove(hosts, made)


def test_a_running_domain_goes_only_where_it_may_be_killed(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    undefine = hosts.first.hypervisor.undefine_domain
    error = refusal(lambda: undefine(vm.id, (vm.pool,), kill_if_running=False, keep_state_files=False))
    assert error == (Conflict, "domain-running")
    undefine(vm.id, (vm.pool,), kill_if_running=True, keep_state_files=False)
    assert absent(hosts.first, vm)
    undefine(vm.id, (vm.pool,), kill_if_running=True, keep_state_files=False)


def test_defining_a_running_domain_leaves_it_running_and_raises_its_stamp(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    seen = define(hosts.first, vm, epoch=4, turn=12)
    assert (seen.state, seen.epoch, seen.turn) == (DomainState.RUNNING, 4, 12)


@pytest.mark.parametrize(
    "changes", [{"cpu_model": "EPYC-Nonesuch"}, {"machine": "pc-q35-99.1"}, {"machine": "q35"}, {"vm_id": "../x"}], ids=str
)
def test_a_spec_that_this_host_cannot_run_is_refused(hosts: Hosts, vm: Vm, changes: dict[str, Any]) -> None:
    spec = replace(vm.spec, **changes)
    assert refusal(lambda: hosts.first.hypervisor.define_domain(spec, Stamp(1, 1)))[0] in {Conflict, InvalidRequest}


def test_changes_are_told_in_order(hosts: Hosts, vm: Vm) -> None:
    heard: list[DomainChange] = []
    hosts.first.hypervisor.subscribe(heard.append)
    for action in (PowerAction.START, PowerAction.PAUSE, PowerAction.RESUME, PowerAction.FORCE_OFF):
        power(hosts.first, vm, action)
    wanted = ["started", "paused", "resumed", "stopped"]

    def has_heard_all() -> bool:
        """In this order, whatever else came between: libvirt tells a start as a resume too."""
        kinds = iter([change.kind for change in list(heard) if change.domain.vm_id == vm.id])
        return all(kind in kinds for kind in wanted)

    until(has_heard_all, what="four events in order", deadline_s=hosts.first.patience_s)
    last = [change for change in heard if change.domain.vm_id == vm.id][-1].domain
    assert last.state is DomainState.STOPPED


def test_the_console_is_read_from_an_offset_on(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    content = until(
        lambda: side.hypervisor.read_console(vm.id, 0, 65536)[0], what="a first line", deadline_s=max(150, side.patience_s)
    )
    head, offset = side.hypervisor.read_console(vm.id, 0, 5)
    assert (head, offset) == (content[:5], 5)
    rest, _end = side.hypervisor.read_console(vm.id, offset, 65536)
    assert content[5:] == rest[: len(content) - 5]
    tail, end = side.hypervisor.read_console(vm.id, -3, 65536)
    assert len(tail) >= 3
    assert side.hypervisor.read_console(vm.id, end + 1_000_000, 10)[0] == b""
    assert refusal(lambda: side.hypervisor.read_console("vm-none", 0, 10))[0] is NotFound


def test_a_guest_shuts_down_when_it_is_asked(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    if hosts.boots:
        until(lambda: b"GUEST UP" in side.hypervisor.read_console(vm.id, -65536, 65536)[0], what="the guest", deadline_s=180)
    power(side, vm, PowerAction.SHUT_DOWN)
    until(lambda: side.hypervisor.observe_domain(vm.id).state is DomainState.STOPPED, what="the end", deadline_s=side.patience_s)
    assert side.hypervisor.observe_domain(vm.id).reason is StateReason.GUEST_SHUTDOWN


def test_a_disk_that_is_open_elsewhere_locks_the_start(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    define(hosts.second, vm)
    assert refusal(lambda: power(hosts.second, vm, PowerAction.START)) == (Conflict, "image-locked")
    power(hosts.first, vm, PowerAction.FORCE_OFF)
    assert power(hosts.second, vm, PowerAction.START).state is DomainState.RUNNING


# --- migration -----------------------------------------------------------------------------------------------------------


def move(hosts: Hosts, vm: Vm, *, control: Control | None = None, **fields: Any) -> MigrationResult:
    copied = fields.pop("copied", ())
    libvirt_uri, migration_uri = hosts.second.hypervisor.prepare_migration(vm.spec, copied, hosts.first.name)
    return hosts.first.hypervisor.migrate(
        vm.id,
        vm.spec,
        Stamp(epoch=2, turn=7),
        libvirt_uri=libvirt_uri,
        migration_uri=migration_uri,
        copied_volume_ids=tuple(volume.volume_id for volume in copied),
        options=MigrationOptions(**fields),
        control=control or Control(),
    )


def settle(side: Side, vm: Vm, which: MigrationSide, *, removed: tuple[VolumeSpec, ...] = ()) -> DomainObservation:
    return side.hypervisor.settle_migration(vm.id, which, vm.spec, removed, Stamp(epoch=2, turn=8))


def test_a_guest_moves_on_shared_storage_and_both_sides_settle(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    result = move(hosts, vm)
    assert result.total_ms > 0
    assert has_left(hosts.first, vm)
    arrived = hosts.second.hypervisor.observe_domain(vm.id)
    assert (arrived.state, arrived.is_persistent) == (DomainState.RUNNING, True)
    for _repetition in range(2):
        kept = settle(hosts.second, vm, MigrationSide.KEEP)
        assert (kept.state, kept.epoch, kept.turn) == (DomainState.RUNNING, 2, 8)
        assert settle(hosts.first, vm, MigrationSide.REMOVE).state is DomainState.ABSENT


def test_a_guest_moves_with_its_disk(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.local_pool)
    define(hosts.first, made)
    try:
        power(hosts.first, made, PowerAction.START)
        move(hosts, made, copied=(made.volume,))
        assert has_left(hosts.first, made)
        assert hosts.second.hypervisor.observe_domain(made.id).state is DomainState.RUNNING
        settle(hosts.second, made, MigrationSide.KEEP)
        settle(hosts.first, made, MigrationSide.REMOVE, removed=(made.volume,))
        assert not hosts.first.hypervisor.observe_volume(made.volume.volume_id, made.pool).is_present
        assert hosts.second.hypervisor.observe_volume(made.volume.volume_id, made.pool).is_present
    finally:
        remove(hosts, made)


def test_a_cancelled_migration_leaves_the_guest_where_it_was(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    control = Control()
    errors: list[TrimtabError] = []

    def run() -> None:
        try:
            move(hosts, vm, control=control, bandwidth_mib_s=1)
        except TrimtabError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: hosts.first.hypervisor.observe_domain(vm.id).is_migrating, what="the move", deadline_s=hosts.first.patience_s)
    control.cancelled.set()
    thread.join(hosts.first.patience_s)
    assert [(type(error), error.code) for error in errors] == [(Conflict, "job-cancelled")]
    assert hosts.first.hypervisor.observe_domain(vm.id).state is DomainState.RUNNING
    until(lambda: absent(hosts.second, vm), what="the target's end", deadline_s=hosts.second.patience_s)
    kept = settle(hosts.first, vm, MigrationSide.KEEP)
    assert (kept.state, kept.is_migrating) == (DomainState.RUNNING, False)
    settle(hosts.second, vm, MigrationSide.REMOVE)


def test_a_disk_that_is_neither_shared_nor_copied_keeps_the_guest(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.local_pool)
    define(hosts.first, made)
    try:
        power(hosts.first, made, PowerAction.START)
        # The target may miss the disk before the source sees that it would be left behind.
        assert refusal(lambda: move(hosts, made)) in {(Conflict, "migration-unsafe"), (NotFound, "volume-not-found")}
        assert hosts.first.hypervisor.observe_domain(made.id).state is DomainState.RUNNING
    finally:
        remove(hosts, made)


def test_a_stopped_domain_does_not_migrate(hosts: Hosts, vm: Vm) -> None:
    assert refusal(lambda: move(hosts, vm)) == (Conflict, "wrong-domain-state")


def test_a_target_that_cannot_run_the_guest_says_so_before_anything_moves(hosts: Hosts, vm: Vm) -> None:
    prepare = hosts.second.hypervisor.prepare_migration
    for changes in ({"cpu_model": "EPYC-Nonesuch"}, {"machine": "pc-q35-99.1"}):
        spec = replace(vm.spec, **changes)  # type: ignore[arg-type]
        assert refusal(lambda spec=spec: prepare(spec, (), hosts.first.name))[0] is Conflict  # type: ignore[misc]
    missing = replace(hosts.second.network, network_id="net-missing", bridge="br-missing")
    spec = replace(vm.spec, networks=(missing,), nics=(replace(vm.spec.nics[0], network_id="net-missing"),))
    assert refusal(lambda: prepare(spec, (), hosts.first.name))[0] is Conflict


def test_settling_against_what_is_there_is_refused(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    assert refusal(lambda: settle(hosts.first, vm, MigrationSide.REMOVE)) == (Conflict, "domain-runs-here")
    assert refusal(lambda: settle(hosts.second, vm, MigrationSide.KEEP)) == (Conflict, "domain-absent")
    assert settle(hosts.second, vm, MigrationSide.REMOVE).state is DomainState.ABSENT


def test_a_shared_disk_is_never_removed_by_settling(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    settle(hosts.second, vm, MigrationSide.REMOVE, removed=(vm.volume,))
    assert hosts.first.hypervisor.observe_volume(vm.volume.volume_id, vm.pool).is_present
