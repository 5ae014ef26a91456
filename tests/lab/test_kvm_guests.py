"""The libvirt hypervisor on real hosts with real guests: what the contract suite, which also runs on the simulated one, cannot ask.

One lab of two hosts for the file; each test brings its own vm. Guests run under TCG and boot in 10 to 20 s.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.contract.kvm_fixture import KvmHost, kvm_host
from tests.lab.guest_view import guest_says
from tests.lab.kvm_guests import (
    BOOT_TIMEOUT_S,
    IMAGE_ID,
    MIB,
    bring_another,
    bring_image,
    cleaned,
    console,
    last_tick,
    remove,
    spec_of,
    start,
    state_of,
    two_hosts,
    until,
    volume_of,
    wait_for_state,
    wait_for_tick,
)
from trimtab_agent.hypervisor.base import DomainChange, Stamp
from trimtab_lab.domains import GuestSpec, domain_xml
from trimtab_lab.hosts import Lab
from trimtab_protos.errors import AlreadyExists, Conflict, DeadlineExceeded, NoCapacity, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    DomainSpec,
    DomainState,
    NetworkKind,
    NetworkSpec,
    NicSpec,
    PoolSpec,
    PowerAction,
    StateReason,
    VolumeSpec,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, KvmHost, KvmHost]]:
    with two_hosts(tmp_path_factory.mktemp("kvm")) as made:
        yield made


@pytest.fixture(scope="module")
def lab(hosts: tuple[Lab, KvmHost, KvmHost]) -> Lab:
    return hosts[0]


@pytest.fixture(scope="module")
def node1(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[1]


@pytest.fixture(scope="module")
def node2(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[2]


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
        has_what_is_promised(spec, ElementTree.fromstring(lab.run("node1", ["virsh", "dumpxml", "trimtab-vm-life"]).stdout))
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
        until(lambda: {"defined", "started", "paused", "resumed", "stopped"} <= {each.kind for each in changes}, what="events")
    assert state_of(node1, spec.vm_id) == (DomainState.ABSENT, StateReason.NONE)
    left = lab.run("node1", ["find", "/srv/trimtab-local", "/var/log/libvirt/qemu", "-name", "*life*"]).stdout
    assert left.split() == ["/var/log/libvirt/qemu/trimtab-vm-life.log"], "libvirt's own log stays, nothing of ours"


def has_what_is_promised(spec: DomainSpec, domain: ElementTree.Element) -> None:
    """Look at a running guest's definition as libvirt has it."""
    balloon = domain.find("devices/memballoon[@model='virtio']/stats")
    assert balloon is not None
    assert balloon.get("period") == "5"
    assert domain.findtext("devices/rng[@model='virtio']/backend[@model='random']") == "/dev/urandom"
    agent = domain.find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    assert agent is not None
    assert agent.get("state") == "connected"
    ports = {one.get("index") for one in domain.findall("devices/controller[@model='pcie-root-port']")}
    taken = {str(int(one.get("bus", "0"), 16)) for one in domain.findall("devices//address[@type='pci']")}
    assert len(ports - taken) >= spec.spare_pcie_ports, "room for what is plugged in while it runs"
    log = domain.find("devices/serial/log")
    assert log is not None
    assert log.get("append") == "on"


def test_a_guest_that_floods_its_console_fills_no_disk_and_is_still_read(lab: Lab, node1: KvmHost) -> None:
    cap = 64 << 10
    spec = spec_of(node1, "flood", node1.local_pool, serial_log_max_bytes=cap)
    with cleaned(spec, node1):
        start(node1, spec)
        until(lambda: node1.hypervisor.observe_domain(spec.vm_id).has_guest_agent, what="the agent", deadline_s=BOOT_TIMEOUT_S)
        flood = "(while :; do yes flood | head -n 2000; done) >/dev/console 2>&1 & echo $! >/run/flood; echo floods"
        assert guest_says(lab, "node1", spec.vm_id, flood) == "floods"
        until(
            lambda: node1.hypervisor.read_console(spec.vm_id, -1, 1)[1] > 8 * cap, what="much more than its cap", deadline_s=120
        )
        assert guest_says(lab, "node1", spec.vm_id, "kill $(cat /run/flood) && echo quiet") == "quiet"
        until(lambda: log_bytes(lab, spec.vm_id) <= cap, what="the log to be back under its cap")
        assert b"flood" in node1.hypervisor.read_console(spec.vm_id, -100, 100)[0]
        tick = last_tick(node1, spec.vm_id)
        wait_for_tick(node1, spec.vm_id, tick + 2)


def log_bytes(lab: Lab, vm_id: str) -> int:
    sizes = lab.run("node1", ["sh", "-c", f"stat -c %s /var/log/libvirt/qemu/trimtab-{vm_id}.serial.log*"]).stdout
    return sum(map(int, sizes.split()))


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
            # The watching connection has a keepalive of its own and notices within its own five seconds.
            until(lambda: not node1.hypervisor.is_up(), what="libvirt to be shown as down")
            asked_at = time.monotonic()
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
    # Room for an image, what it is made from, and what an import leaves free.
    lab.run("node1", ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", full.path])
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


def test_a_disk_that_is_marked_corrupt_is_not_started_and_says_so(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "corrupt", node1.local_pool)
    with cleaned(spec, node1):
        node1.hypervisor.ensure_volume(volume_of(spec), node1.local_pool)
        node1.hypervisor.define_domain(spec, Stamp(epoch=1, turn=1))
        path = f"{node1.local_pool.path}/volumes/{spec.disks[0].volume_id}.qcow2"
        # The last byte of `incompatible_features` in qcow2's header; its second bit is what QEMU sets when it finds damage.
        mark = "printf '\\{bits}' | dd of={path} bs=1 seek=79 conv=notrunc status=none"
        lab.run("node1", ["sh", "-c", mark.format(bits="002", path=path)])
        assert '"corrupt": true' in lab.run("node1", ["qemu-img", "info", "--output=json", path]).stdout
        with pytest.raises(Conflict) as refused:
            node1.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=2))
        assert refused.value.code == "image-corrupt"
        assert state_of(node1, spec.vm_id)[0] is DomainState.STOPPED
        lab.run("node1", ["sh", "-c", mark.format(bits="000", path=path)])
        again = node1.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=3))
        assert again.state is DomainState.RUNNING


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
            took_s = []
            for verb in (node1.hypervisor.list_domains, node1.hypervisor.inventory, lambda: state_of(node1, spec.vm_id)):
                asked_at = time.monotonic()
                verb()
                took_s.append(time.monotonic() - asked_at)
            off = node1.hypervisor.change_power(spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=3))
            assert (off.state, off.reason, off.turn) == (DomainState.STOPPED, StateReason.DESTROYED, 3)
            waiting.wait(timeout=60)
        assert max(took_s) < 5, took_s


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


def test_a_guest_that_ran_when_its_host_went_down_says_so(lab: Lab, node2: KvmHost) -> None:
    # Last in the file: node2's hypervisor dies with its host.
    ran, stopped = spec_of(node2, "ran", node2.local_pool), spec_of(node2, "was-off", node2.local_pool)
    start(node2, ran)
    start(node2, stopped)
    node2.hypervisor.change_power(stopped.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=3))
    lab.crash("node2")
    lab.boot("node2")
    with kvm_host(lab, "node2", node2.scratch, has_tls=True) as booted:
        assert state_of(booted, ran.vm_id) == (DomainState.STOPPED, StateReason.HOST_BOOTED)
        assert state_of(booted, stopped.vm_id) == (DomainState.STOPPED, StateReason.NONE)
        booted.hypervisor.change_power(ran.vm_id, PowerAction.START, Stamp(epoch=1, turn=4))
        assert state_of(booted, ran.vm_id)[0] is DomainState.RUNNING
        for spec in (ran, stopped):
            remove(booted, spec)
