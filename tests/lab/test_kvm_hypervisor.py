"""The libvirt hypervisor on real hosts with real guests: what the contract suite, which also runs on the simulated one, cannot ask.

One lab of two hosts for the file; each test brings its own vm. Guests run under TCG and boot in 10 to 20 s, so few tests boot one.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.contract.kvm_certificates import give_certificates
from tests.contract.kvm_fixture import KvmHost, kvm_host
from trimtab_agent.hypervisor.base import DomainChange, Stamp
from trimtab_lab.domains import GuestSpec, domain_xml
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab
from trimtab_protos.errors import AlreadyExists, Conflict, DeadlineExceeded, InvalidRequest, NoCapacity, TrimtabError, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainObservation,
    DomainSpec,
    DomainState,
    Firmware,
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

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400), pytest.mark.xdist_group("lab")]

MIB = 1 << 20
BOOT_TIMEOUT_S = 150.0
IMAGE_ID = "img-micro"
T = TypeVar("T")


def until(condition: Callable[[], T], *, what: str, deadline_s: float = 60.0) -> T:
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


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = Lab.named(f"kvm-{os.getpid()}")
    made.up(hosts=2)
    try:
        give_certificates(made)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kvm")


@pytest.fixture(scope="module")
def node1(lab: Lab, scratch: Path) -> Iterator[KvmHost]:
    with kvm_host(lab, "node1", scratch, has_tls=True) as host:
        bring_image(host, host.local_pool)
        bring_image(host, host.shared_pool)
        yield host


@pytest.fixture(scope="module")
def node2(lab: Lab, scratch: Path, node1: KvmHost) -> Iterator[KvmHost]:
    with kvm_host(lab, "node2", scratch, has_tls=True) as host:
        bring_image(host, host.local_pool)
        host.hypervisor.ensure_pool(host.shared_pool)
        yield host


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
    lines = [line for line in console(host, vm_id).splitlines() if line.startswith("tick ")]
    return int(lines[-1].split()[1]) if lines else 0


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
        self._call = lambda: source.hypervisor.migrate(
            spec.vm_id,
            spec,
            Stamp(epoch=epoch, turn=3),
            libvirt_uri=uris[0],
            migration_uri=uris[1],
            copied_volume_ids=[volume.volume_id for volume in copied],
            options=options or MigrationOptions(),
            control=self.control,
        )
        uris = ("", "") if is_prepared else target.hypervisor.prepare_migration(spec, copied, f"host-{source.name}")
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


SLOW = MigrationOptions(bandwidth_mib_s=4)


def test_a_guest_lives_and_dies_as_it_is_told(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "life", node1.local_pool, user_yaml="ssh_authorized_keys:\n - ssh-ed25519 AAAAC3Nz user\n")
    verbs, changes = node1.hypervisor, list[DomainChange]()
    verbs.subscribe(changes.append)
    with cleaned(spec, node1):
        assert start(node1, spec).state is DomainState.RUNNING
        wait_for_tick(node1, spec.vm_id, 2)
        assert "SEED instance-id=i-life hostname=life ssh-keys=1" in console(node1, spec.vm_id)
        until(lambda: verbs.observe_domain(spec.vm_id).has_guest_agent, what="the guest agent")
        seen = verbs.observe_domain(spec.vm_id)
        assert (seen.epoch, seen.turn, seen.starts, seen.is_persistent, seen.macs) == (1, 2, 1, True, (spec.nics[0].mac,))
        assert seen.rss_mib > 50
        again = verbs.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=3))
        assert (again.state, again.starts, again.turn) == (DomainState.RUNNING, 1, 3)
        verbs.change_power(spec.vm_id, PowerAction.PAUSE, Stamp(epoch=1, turn=4))
        assert state_of(node1, spec.vm_id) == (DomainState.PAUSED, StateReason.USER_PAUSED)
        verbs.change_power(spec.vm_id, PowerAction.RESUME, Stamp(epoch=1, turn=4))
        asked_at = time.monotonic()
        verbs.change_power(spec.vm_id, PowerAction.SHUT_DOWN, Stamp(epoch=1, turn=5))
        assert time.monotonic() - asked_at < 5
        wait_for_state(node1, spec.vm_id, DomainState.STOPPED, StateReason.GUEST_SHUTDOWN)
        with pytest.raises(Conflict):
            verbs.change_power(spec.vm_id, PowerAction.RESUME, Stamp(epoch=1, turn=6))
        verbs.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=6))
        lab.run("node1", ["virsh", "destroy", "trimtab-vm-life"])
        assert state_of(node1, spec.vm_id) == (DomainState.STOPPED, StateReason.DESTROYED)
        verbs.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=7))
        lab.run("node1", ["sh", "-c", "kill -9 $(cat /run/libvirt/qemu/trimtab-vm-life.pid)"])
        wait_for_state(node1, spec.vm_id, DomainState.CRASHED, StateReason.CRASHED)
        assert verbs.observe_domain(spec.vm_id).starts == 3
        until(lambda: {"defined", "started", "suspended", "resumed", "stopped"} <= {each.kind for each in changes}, what="events")
    assert state_of(node1, spec.vm_id) == (DomainState.ABSENT, StateReason.NONE)
    left = lab.run("node1", ["find", "/srv/trimtab-local", "/var/log/libvirt/qemu", "-name", "*life*"]).stdout
    assert left.split() == ["/var/log/libvirt/qemu/trimtab-vm-life.log"], "libvirt's own log stays, nothing of ours"


def test_a_move_on_shared_storage_can_be_cancelled_attached_to_and_finished(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "shared", node1.shared_pool)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 2)
        with pytest.raises(Conflict) as refused:
            start(node2, spec)
        assert refused.value.code == "image-locked"

        first = Migration(node1, node2, spec, options=SLOW)
        until(lambda: first.control.reports[-1:] and first.control.reports[-1].rate_bytes_s, what="a rate")
        assert state_of(node2, spec.vm_id)[0] is DomainState.INCOMING
        source = node1.hypervisor.observe_domain(spec.vm_id)
        assert (source.state, source.is_migrating, source.epoch) == (DomainState.RUNNING, True, 1)
        with pytest.raises(Conflict):
            node2.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=2, turn=3))
        with pytest.raises(Conflict):
            node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=3))
        second = Migration(node1, node2, spec, is_prepared=True)
        until(lambda: second.control.reports, what="progress seen by the one that attached")
        second.control.cancelled.set()
        for each in (first, second):
            outcome = each.ended()
            assert isinstance(outcome, Conflict)
            assert outcome.code == "job-cancelled"
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)

        late = Migration(node1, node2, spec, options=replace(SLOW, timeout_s=2)).ended()
        assert isinstance(late, Conflict)
        assert late.code == "migration-timeout"

        done = Migration(node1, node2, spec, options=MigrationOptions(has_auto_converge=True, max_downtime_ms=500)).ended()
        assert isinstance(done, MigrationResult)
        assert done.transferred_bytes > 10 * MIB
        assert state_of(node1, spec.vm_id) == (DomainState.STOPPED, StateReason.MIGRATED)
        arrived = node2.hypervisor.observe_domain(spec.vm_id)
        assert (arrived.state, arrived.epoch, arrived.is_persistent) == (DomainState.RUNNING, 2, True)
        with pytest.raises(Conflict):
            node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (), Stamp(epoch=2, turn=4))
        for _ in range(2):
            node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume_of(spec),), Stamp(epoch=2, turn=4))
            kept = node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
            assert (kept.state, kept.turn) == (DomainState.RUNNING, 4)
        assert wait_for_tick(node2, spec.vm_id, tick + 2) > tick
        assert node2.hypervisor.observe_volume(spec.disks[0].volume_id, node2.shared_pool).is_present


def test_a_move_with_copied_disk_takes_what_the_guest_wrote_and_nothing_stale(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "copied", node1.local_pool)
    volume = volume_of(spec)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 3)
        with pytest.raises(Conflict) as refused:
            node1.hypervisor.migrate(
                spec.vm_id,
                spec,
                Stamp(epoch=2, turn=3),
                libvirt_uri="qemu+tls://192.0.2.1/system",
                migration_uri="tcp://192.0.2.1",
                copied_volume_ids=(),
                options=MigrationOptions(),
                control=Control(),
            )
        assert refused.value.code == "migration-unsafe"
        # What an earlier attempt left: it must be made anew, not filled up.
        node2.hypervisor.ensure_volume(replace(volume, base_image_id="", base_image_format=None), node2.local_pool)
        done = Migration(node1, node2, spec, copied=(volume,)).ended()
        assert isinstance(done, MigrationResult)
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
        node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume,), Stamp(epoch=2, turn=4))
        assert not node1.hypervisor.observe_volume(volume.volume_id, node1.local_pool).is_present
        moved = wait_for_tick(node2, spec.vm_id, tick + 1)
        node2.hypervisor.change_power(spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=2, turn=5))
        assert state_of(node2, spec.vm_id) == (DomainState.STOPPED, StateReason.DESTROYED)
        before = node2.hypervisor.read_console(spec.vm_id, -1, 1)[1]
        node2.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=2, turn=6))
        until(
            lambda: b"tick " in node2.hypervisor.read_console(spec.vm_id, before, 65536)[0].rpartition(b"GUEST UP")[2],
            what="a tick after the restart",
            deadline_s=BOOT_TIMEOUT_S,
        )
        after = node2.hypervisor.read_console(spec.vm_id, before, 65536)[0].decode(errors="replace")
        first = int(after.partition("GUEST UP")[2].partition("tick ")[2].split()[0])
        assert first >= moved, "the counter on the copied disk went back"


def test_a_move_that_loses_its_peer_or_its_libvirtd_leaves_the_guest_where_it_was(
    lab: Lab, node1: KvmHost, node2: KvmHost
) -> None:
    spec = spec_of(node1, "faults", node1.shared_pool)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 2)
        move = Migration(node1, node2, spec, options=SLOW)
        until(lambda: move.control.reports[-1:] and move.control.reports[-1].rate_bytes_s, what="a rate")
        lab.cut("node2", network="control")
        outcome = move.ended()
        lab.heal("node2")
        assert isinstance(outcome, DeadlineExceeded)
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)

        move = Migration(node1, node2, spec, options=SLOW)
        until(lambda: move.control.reports[-1:] and move.control.reports[-1].rate_bytes_s, what="a rate")
        lab.signal_service("node1", "libvirtd", signal.SIGKILL)
        assert isinstance(move.ended(), DeadlineExceeded)
        with contextlib.suppress(Unavailable):
            node1.hypervisor.list_domains()
        until(node1.hypervisor.is_up, what="libvirt again")
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)
        kept = node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=1, turn=9))
        assert (kept.state, kept.epoch, kept.turn) == (DomainState.RUNNING, 1, 9)
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (), Stamp(epoch=1, turn=9))
        wait_for_tick(node1, spec.vm_id, tick + 2)


def test_libvirtd_dies_hangs_and_comes_back_without_the_guest_noticing(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "daemon", node1.local_pool)
    changes: list[DomainChange] = []
    node1.hypervisor.subscribe(changes.append)
    with cleaned(spec, node1):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 1)
        process = lab.signal_service("node1", "libvirtd", signal.SIGSTOP)
        try:
            asked_at = time.monotonic()
            with pytest.raises((Unavailable, DeadlineExceeded)):
                node1.hypervisor.change_power(spec.vm_id, PowerAction.PAUSE, Stamp(epoch=1, turn=3))
            assert time.monotonic() - asked_at < 10
            asked_at = time.monotonic()
            assert not node1.hypervisor.is_up()
            assert node1.hypervisor.load().memory_available_mib > 0
            assert time.monotonic() - asked_at < 1
        finally:
            os.kill(process, signal.SIGCONT)
        until(node1.hypervisor.is_up, what="libvirt after its hang")
        changes.clear()
        lab.signal_service("node1", "libvirtd", signal.SIGKILL)
        until(lambda: any(each.kind == "resync" and each.domain.vm_id == spec.vm_id for each in changes), what="a resync")
        seen = node1.hypervisor.change_power(spec.vm_id, PowerAction.RESUME, Stamp(epoch=1, turn=4))
        assert (seen.state, seen.turn, seen.starts) == (DomainState.RUNNING, 4, 1)
        wait_for_tick(node1, spec.vm_id, tick + 1)


def test_a_full_pool_pauses_the_guest_refuses_imports_and_room_lets_it_go_on(lab: Lab, node1: KvmHost) -> None:
    full = PoolSpec(pool_id="pool-full", path="/srv/full", name="full")
    lab.run("node1", ["mkdir", "-p", full.path])
    lab.run("node1", ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", full.path])
    spec = spec_of(node1, "full", full)
    try:
        with cleaned(spec, node1):
            bring_image(node1, full)
            node1.hypervisor.ensure_volume(volume_of(spec), full)
            node1.hypervisor.define_domain(spec, Stamp(epoch=1, turn=1))
            used = int(lab.run("node1", ["du", "-sk", full.path]).stdout.split()[0])
            lab.run("node1", ["mount", "-o", f"remount,size={used + 128}k", full.path])
            with pytest.raises(NoCapacity) as refused:
                bring_another(node1, full)
            assert refused.value.code == "pool-full"
            node1.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=2))
            until(
                lambda: state_of(node1, spec.vm_id) == (DomainState.PAUSED, StateReason.IO_ERROR),
                what="the pause by an I/O error",
                deadline_s=BOOT_TIMEOUT_S,
            )
            assert sorted(lab.run("node1", ["ls", "-A", f"{full.path}/images"]).stdout.split()) == [
                f"{IMAGE_ID}.json",
                f"{IMAGE_ID}.qcow2",
            ]
            lab.run("node1", ["mount", "-o", "remount,size=96m", full.path])
            node1.hypervisor.change_power(spec.vm_id, PowerAction.RESUME, Stamp(epoch=1, turn=3))
            wait_for_tick(node1, spec.vm_id, 3)
        node1.hypervisor.delete_image(IMAGE_ID, full)
        node1.hypervisor.remove_pool(full.pool_id)
    finally:
        lab.run("node1", ["umount", full.path])


def bring_another(host: KvmHost, pool: PoolSpec) -> None:
    raw = build_guest_image().raw
    spec = ImageSpec(image_id="img-other", pool_id=pool.pool_id, format=DiskFormat.RAW, max_bytes=1 << 30)
    host.hypervisor.import_image(spec, pool, UploadSource(upload_id=str(raw), size_bytes=0), Control())


def test_a_qemu_that_hangs_delays_no_observation(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "stuck", node1.local_pool)
    with cleaned(spec, node1):
        start(node1, spec)
        lab.run("node1", ["sh", "-c", "kill -STOP $(cat /run/libvirt/qemu/trimtab-vm-stuck.pid)"])
        asking = lab.command("node1", ["virsh", "qemu-monitor-command", "trimtab-vm-stuck", "--hmp", "info status"])
        with subprocess.Popen(
            asking, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=lab.environment("node1")
        ) as waiting:
            until(
                lambda: "occupied" in lab.run("node1", ["virsh", "domcontrol", "trimtab-vm-stuck"]).stdout,
                what="the wait for QEMU",
            )
            for verb in (node1.hypervisor.list_domains, node1.hypervisor.inventory, lambda: state_of(node1, spec.vm_id)):
                asked_at = time.monotonic()
                verb()
                assert time.monotonic() - asked_at < 4
            node1.hypervisor.change_power(spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=3))
            waiting.wait(timeout=30)
        assert state_of(node1, spec.vm_id) == (DomainState.STOPPED, StateReason.DESTROYED)


def test_a_hung_pool_is_seen_within_two_seconds_and_stalls_nothing_else(lab: Lab, node1: KvmHost) -> None:
    hung = PoolSpec(pool_id="pool-hung", path="/srv/hung", name="hung")
    lab.run("node1", ["mkdir", "-p", hung.path, "/srv/hung.backing"])
    lab.run("node1", ["sh", "-c", f"bindfs -f /srv/hung.backing {hung.path} >/dev/null 2>&1 & echo $! >/run/hung.pid"])
    until(lambda: hung.path in lab.run("node1", ["cat", "/proc/mounts"]).stdout, what="the mount")
    server = lab.run("node1", ["cat", "/run/hung.pid"]).stdout.strip()
    try:
        assert node1.hypervisor.ensure_pool(hung).is_responsive
        lab.run("node1", ["kill", "-STOP", server])
        for _ in range(3):
            asked_at = time.monotonic()
            seen = node1.hypervisor.observe_pool(hung)
            assert (seen.is_responsive, seen.problem != "") == (False, True)
            assert time.monotonic() - asked_at < 4
        volume = VolumeSpec(volume_id="vol-hung", pool_id=hung.pool_id, format=DiskFormat.RAW, size_bytes=MIB)
        with pytest.raises(Unavailable) as refused:
            node1.hypervisor.ensure_volume(volume, hung)
        assert refused.value.code == "pool-hung"
        assert node1.hypervisor.observe_pool(node1.local_pool).is_responsive
        node1.hypervisor.list_domains()
        lab.run("node1", ["kill", "-CONT", server])
        until(lambda: node1.hypervisor.observe_pool(hung).is_responsive, what="the pool again")
    finally:
        lab.run("node1", ["kill", "-CONT", server], check=False)
        node1.hypervisor.remove_pool(hung.pool_id)
        lab.run("node1", ["umount", hung.path])


def test_domains_of_others_are_shown_counted_and_never_touched(lab: Lab, node1: KvmHost) -> None:
    verbs = node1.hypervisor
    guest = GuestSpec(name="theirs", disk="/srv/trimtab-local/volumes/vol-theirs.qcow2", hardware_address="52:54:00:99:99:01")
    lent = VolumeSpec(volume_id="vol-theirs", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=64 * MIB)
    verbs.ensure_volume(lent, node1.local_pool)
    definition = node1.scratch / "theirs.xml"
    definition.write_text(domain_xml(guest))
    lab.run("node1", ["virsh", "create", str(definition)])
    impostor = spec_of(node1, "impostor", node1.local_pool)
    try:
        before = verbs.inventory()
        assert (before.unmanaged_vcpus, before.unmanaged_memory_mib, before.unmanaged_macs) == (1, 96, ("52:54:00:99:99:01",))
        assert before.unmanaged_disk_bytes > 0
        (seen,) = [each for each in verbs.list_domains() if each.name == "theirs"]
        assert (seen.vm_id, seen.state, seen.epoch, seen.memory_mib) == ("", DomainState.RUNNING, 0, 96)
        with pytest.raises(Conflict) as refused:
            verbs.delete_volume("vol-theirs", node1.local_pool)
        assert refused.value.code == "volume-in-use"
        lab.run("node1", ["virsh", "destroy", "theirs"])
        definition.write_text(domain_xml(replace(guest, name="trimtab-vm-impostor")))
        lab.run("node1", ["virsh", "define", str(definition)])
        for act in (
            lambda: verbs.define_domain(impostor, Stamp(epoch=1, turn=1)),
            lambda: verbs.change_power("vm-impostor", PowerAction.START, Stamp(epoch=1, turn=1)),
            lambda: verbs.undefine_domain("vm-impostor", (), kill_if_running=True, keep_state_files=False),
        ):
            with pytest.raises(AlreadyExists):
                act()
        assert "trimtab-vm-impostor" in lab.run("node1", ["virsh", "list", "--all", "--name"]).stdout
    finally:
        lab.run("node1", ["sh", "-c", "virsh destroy theirs; virsh undefine trimtab-vm-impostor"], check=False)
        verbs.delete_volume("vol-theirs", node1.local_pool)


def test_nat_network_gives_an_address_that_is_observed_and_is_not_removed_under_its_guest(lab: Lab, node1: KvmHost) -> None:
    network = NetworkSpec(network_id="net-nat", kind=NetworkKind.NAT, name="nat", subnet="10.123.7.0/24", has_dhcp=True, mtu=1400)
    nic = NicSpec(nic_id="nic-nat", network_id="net-nat", mac="52:54:00:00:07:01", index=0)
    spec = spec_of(node1, "nat", node1.local_pool, networks=(network,), nics=(nic,))
    verbs = node1.hypervisor
    for _ in range(2):
        verbs.ensure_network(network)
    try:
        with cleaned(spec, node1):
            node1.hypervisor.ensure_volume(volume_of(spec), node1.local_pool)
            verbs.define_domain(spec, Stamp(epoch=1, turn=1))
            # As after a boot of the host: nothing starts by itself, the guest's start brings its network.
            lab.run("node1", ["virsh", "net-destroy", "trimtab-net-nat"])
            verbs.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=2))
            with pytest.raises(Conflict) as refused:
                verbs.remove_network("net-nat")
            assert refused.value.code == "network-in-use"
            with pytest.raises(Conflict):
                verbs.ensure_network(replace(network, subnet="10.123.8.0/24"))
            found = until(lambda: verbs.observe_domain(spec.vm_id).addresses, what="an address", deadline_s=BOOT_TIMEOUT_S)
            assert all(address.startswith("10.123.7.") for address in found)
        verbs.ensure_network(replace(network, subnet="10.123.8.0/24"))
    finally:
        for _ in range(2):
            verbs.remove_network("net-nat")
    assert "trimtab-net-nat" not in lab.run("node1", ["virsh", "net-list", "--all", "--name"]).stdout


def test_a_uefi_guest_moves_with_its_variables(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "uefi", node1.local_pool, firmware=Firmware.UEFI, memory_mib=256, memory_max_mib=512, vcpus_max=2)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        wait_for_tick(node1, spec.vm_id, 2)
        done = Migration(node1, node2, spec, copied=(volume_of(spec),)).ended()
        assert isinstance(done, MigrationResult), done
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
        node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume_of(spec),), Stamp(epoch=2, turn=4))
        wait_for_tick(node2, spec.vm_id, 4)


def test_bad_specs_are_refused_before_anything_is_made(lab: Lab, node1: KvmHost) -> None:
    verbs, spec = node1.hypervisor, spec_of(node1, "bad", node1.local_pool)
    missing = replace(node1.network, bridge="br-none")
    for changes, error, code in (
        ({"machine": "pc-q35-99.9"}, Conflict, "not-supported-here"),
        ({"cpu_model": "Cascadelake-Server"}, Conflict, "cpu-incompatible"),
        ({"networks": (missing,)}, Conflict, "bridge-missing"),
        ({"networks": (replace(node1.network, mtu=9000),)}, Conflict, "bridge-mtu-too-small"),
        ({"name": "<x>"}, InvalidRequest, "field-malformed"),
    ):
        with pytest.raises(error) as refused:
            verbs.define_domain(replace(spec, **changes), Stamp(epoch=1, turn=1))
        assert refused.value.code == code
    assert lab.run("node1", ["find", "/srv/trimtab-local", "-name", "*bad*"]).stdout == ""
    assert "bad" not in lab.run("node1", ["virsh", "list", "--all", "--name"]).stdout


def test_a_guest_that_ran_when_its_host_went_down_says_so(lab: Lab, scratch: Path, node1: KvmHost, node2: KvmHost) -> None:
    # Last in the file: node2's hypervisor dies with its host.
    ran, stopped = spec_of(node2, "ran", node2.local_pool), spec_of(node2, "was-off", node2.local_pool)
    start(node2, ran)
    start(node2, stopped)
    node2.hypervisor.change_power(stopped.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=3))
    lab.crash("node2")
    lab.boot("node2")
    with kvm_host(lab, "node2", scratch, has_tls=True) as booted:
        assert state_of(booted, ran.vm_id) == (DomainState.STOPPED, StateReason.HOST_BOOTED)
        assert state_of(booted, stopped.vm_id) == (DomainState.STOPPED, StateReason.NONE)
        booted.hypervisor.change_power(ran.vm_id, PowerAction.START, Stamp(epoch=1, turn=4))
        assert state_of(booted, ran.vm_id)[0] is DomainState.RUNNING
        for spec in (ran, stopped):
            remove(booted, spec)
