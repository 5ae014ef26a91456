"""Live migration through the whole stack: its limits, what is refused before anything moves, and every fault's end.

A fault is done while a bandwidth limit holds the migration open. Its end is judged on the hosts themselves: one running copy, one
definition, and a counter that never went back.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, fleet_settings, wait_until
from tests.lab.guest_view import guest_says
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.specs import HostSpec

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

LIMIT_BYTES_S = 1 << 20
"""The least limit there is: the 40 MiB or so that a micro guest has touched take more than half a minute."""
LATE_BYTES = 20 << 20
CPU_MODEL = "Penryn"
PLAIN_TEXT = "whoever-reads-this-on-the-wire-reads-a-guest"
LISTENER = """
import pathlib, socket, sys
text, found, arrived, strayed = sys.argv[1].encode(), 0, 0, 0
arrival, elsewhere = map(socket.inet_aton, sys.argv[2:4])
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("eth0", 0))
wire.settimeout(0.2)
pathlib.Path("/run/listens").touch()
while not pathlib.Path("/run/heard-enough").exists():
    try:
        packet = wire.recv(1 << 17)
    except TimeoutError:
        continue
    found += text in packet
    ports = {int.from_bytes(packet[34:36], "big"), int.from_bytes(packet[36:38], "big")}
    if packet[12:14] == bytes((8, 0)):
        arrived += len(packet) * (packet[30:34] == arrival)
        strayed += len(packet) * (packet[30:34] == elsewhere and 8446 not in ports)
print(found, arrived, strayed)
"""
AGAIN = "systemctl restart libvirtd; systemctl restart trimtab-agent"
"""A host that comes with other CPUs: an agent tells its inventory at its start, and looks anew every half minute."""


@pytest.fixture(scope="module")
def mover(fleet: Fleet) -> Iterator[str]:
    """The guest that all of this is done to, on shared storage."""
    fleet.ok(
        "vm", "create", "mover", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--to", "node1",
        "--network", "default", "--cpu-model", CPU_MODEL, "--wait",
    )  # fmt: skip
    fleet.wait_for_ticks("mover", 2)
    yield "mover"
    fleet.delete("mover")


# --- looking ---------------------------------------------------------------------------------------------------------------


def other_hosts(fleet: Fleet, name: str) -> tuple[str, str]:
    """Return (its host, another one)."""
    home = fleet.vm(name)["host"]
    return home, next(host for host in HOSTS if host != home)


def is_moving(fleet: Fleet, operation_id: str) -> bool:
    """Tell whether memory is being copied right now; fails where the migration ended too early to do anything to it."""
    seen = fleet.operation(operation_id)
    assert not seen["done"], f"the migration was over before anything could happen: {seen}"
    progress = seen["progress"] or {}
    assert progress.get("done_bytes", 0) < LATE_BYTES, f"too late for a fault: {progress}"
    return seen["step"] == "move" and bool(progress.get("done_bytes"))


def begin_slow_move(fleet: Fleet, name: str, target: str, *more: str) -> str:
    limit = str(LIMIT_BYTES_S >> 20)
    operation_id = fleet.begin("vm", "migrate", name, "--to", target, "--bandwidth", limit, *more)
    wait_until(lambda: is_moving(fleet, operation_id), "memory to be on its way")
    return operation_id


def ask_qemu(fleet: Fleet, host: str, vm_id: str, command: str) -> Any:
    said = fleet.lab.run(host, ["virsh", "qemu-monitor-command", f"trimtab-{vm_id}", json.dumps({"execute": command})]).stdout
    return json.loads(said)["return"]


def capabilities(fleet: Fleet, host: str, vm_id: str) -> dict[str, bool]:
    """Ask the guest's QEMU which ways of migrating are switched on."""
    return {one["capability"]: one["state"] for one in ask_qemu(fleet, host, vm_id, "query-migrate-capabilities")}


def assert_one_whole_copy(fleet: Fleet, name: str, *, on: str, counted: int) -> None:
    """One running QEMU, one definition, on that host, with a counter that goes on."""
    vm = fleet.vm(name)
    assert vm["host"] == on
    assert fleet.runs_on(vm["id"]) == [on]
    wait_until(lambda: fleet.hosts_that_define(vm["id"]) == [on], f"one definition, on {on}", patience_s=60)
    fleet.wait_for_ticks(name, counted + 1)


# --- limits and ways -------------------------------------------------------------------------------------------------------


def test_a_bandwidth_limit_holds_and_a_cancel_leaves_the_guest_where_it_was(fleet: Fleet, mover: str) -> None:
    counted, uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    started = time.monotonic()
    operation_id = begin_slow_move(fleet, mover, target)
    assert not {"auto-converge", "postcopy-ram"} & {name for name, is_on in capabilities(fleet, home, vm["id"]).items() if is_on}
    assert ask_qemu(fleet, home, vm["id"], "query-migrate-parameters")["tls-creds"], "nobody on the way reads the guest's memory"
    # Its rate, and by it the time that is left, are known a little later than its first bytes.
    progress = wait_until(
        lambda: seen if (seen := fleet.operation(operation_id)["progress"])["remaining_s"] else None, "a time that is left"
    )
    assert progress["remaining_s"] <= progress["total_bytes"] / progress["rate_bytes_s"]
    # QEMU's bucket fills ten times a second: a little more than the limit may pass between two looks.
    assert progress["done_bytes"] <= (time.monotonic() - started) * LIMIT_BYTES_S * 1.3
    assert progress["total_bytes"] > progress["done_bytes"]
    fleet.ok("op", "cancel", operation_id)
    assert fleet.end_of(operation_id)["state"] == "cancelled"
    assert_one_whole_copy(fleet, mover, on=home, counted=counted)
    assert fleet.vm(mover)["epoch"] == vm["epoch"]
    assert fleet.ticks(mover)[1] > uptime


@pytest.mark.soak
def test_auto_converge_and_postcopy_are_used_where_asked(fleet: Fleet, mover: str) -> None:
    counted, uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target, "--auto-converge", "--allow-postcopy")
    switched_on = capabilities(fleet, home, vm["id"])
    assert switched_on["auto-converge"]
    assert switched_on["postcopy-ram"]
    fleet.lab.run(home, ["virsh", "migrate-setspeed", f"trimtab-{vm['id']}", "500"])  # it was slow only to be looked at
    assert fleet.end_of(operation_id)["state"] == "done"
    assert_one_whole_copy(fleet, mover, on=target, counted=counted)
    assert fleet.ticks(mover)[1] > uptime


# --- refused before anything moves -----------------------------------------------------------------------------------------


@contextmanager
def without_cpu_model(fleet: Fleet, host: str) -> Iterator[None]:
    """Take a CPU model away from a host's libvirt, as a host with older CPUs has it."""
    models = "/usr/share/libvirt/cpu_map"
    hide = (
        f"sed '/x86_{CPU_MODEL}/d' {models}/index.xml > /run/index.xml; mount --bind /run/index.xml {models}/index.xml; {AGAIN}"
    )
    fleet.sh(host, hide)
    try:
        wait_until(lambda: CPU_MODEL not in usable_models(fleet, host), f"{host} to lack the model")
        yield
    finally:
        fleet.sh(host, f"umount {models}/index.xml; {AGAIN}")
        wait_until(lambda: CPU_MODEL in usable_models(fleet, host), f"{host} to have the model again")


def usable_models(fleet: Fleet, host: str) -> list[str]:
    return list((fleet.host(host)["inventory"] or {}).get("usable_cpu_models", []))


@contextmanager
def without_room(fleet: Fleet, host: str) -> Iterator[None]:
    """Keep all but nothing of a host's memory for the host itself."""
    fleet.ok("host-class", "create", "roomless", "--memory-reserve", "1TiB")
    fleet.ok("host", "update", host, "--host-class", "roomless")
    try:
        yield
    finally:
        fleet.ok("host", "update", host, "--host-class", "default")
        fleet.ok("host-class", "delete", "roomless", "--yes")


def test_what_would_fail_is_refused_before_anything_moves(fleet: Fleet, mover: str) -> None:
    home = fleet.vm(mover)["host"]
    without: tuple[tuple[str, Callable[[Fleet, str], Any]], ...] = (
        (CPU_MODEL, without_cpu_model),
        ("needs 96 MiB", without_room),
    )
    target = "node3" if home != "node3" else "node2"
    before = fleet.vm(mover)
    for word, lacking in without:
        with lacking(fleet, target):
            refused = fleet.trimtab("vm", "migrate", mover, "--to", target, "--wait")
        assert refused.code == 7, refused.err
        assert word in refused.err
        assert fleet.hosts_that_define(before["id"]) == [home]
    after = fleet.vm(mover)
    assert (after["host"], after["epoch"]) == (home, before["epoch"])


def test_a_host_without_the_network_is_refused_before_anything_moves(fleet: Fleet) -> None:
    fleet.ok(
        "network", "create", "partial", "--bridge-on", "node1=br-guest", "--bridge-on", "node2=br-guest", "--wait"
    )  # fmt: skip
    fleet.ok(
        "vm", "create", "netted", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--network", "partial",
        "--to", "node1", "--wait",
    )  # fmt: skip
    refused = fleet.trimtab("vm", "migrate", "netted", "--to", "node3", "--wait")
    assert refused.code == 7, refused.err
    assert "partial" in refused.err
    vm = fleet.vm("netted")
    assert vm["host"] == "node1"
    assert fleet.hosts_that_define(vm["id"]) == ["node1"]
    fleet.delete("netted")


# --- faults ----------------------------------------------------------------------------------------------------------------


def test_a_target_that_dies_leaves_the_guest_on_its_source(fleet: Fleet, mover: str) -> None:
    counted, _uptime = fleet.ticks(mover)
    home, target = other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target)
    fleet.lab.crash(target)
    # Not released on silence: the target stays a holder until it is seen to hold nothing.
    assert not fleet.operation(operation_id)["done"]
    fleet.lab.boot(target)
    assert fleet.end_of(operation_id)["state"] == "failed"
    fleet.wait_for_host(target)
    assert_one_whole_copy(fleet, mover, on=home, counted=counted)


def test_a_cut_link_ends_the_migration_in_seconds_and_the_guest_stays(fleet: Fleet, mover: str) -> None:
    counted, _uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target)
    fleet.lab.cut(target)
    try:
        cut_at = time.monotonic()
        wait_until(lambda: "failed" in job_state(fleet, home, vm["id"]), "the source to give up", patience_s=60)
        assert time.monotonic() - cut_at < 30, "libvirt's keepalive notices within seconds"
    finally:
        fleet.lab.heal(target)
    assert fleet.end_of(operation_id)["state"] == "failed"
    fleet.wait_for_host(target)
    assert_one_whole_copy(fleet, mover, on=home, counted=counted)


def job_state(fleet: Fleet, host: str, vm_id: str) -> str:
    """Return `failed` once no migration of the domain runs on its source any more."""
    told = fleet.lab.run(host, ["virsh", "domjobinfo", f"trimtab-{vm_id}"], check=False).stdout
    return "failed" if "None" in told else told


# --- faults while a disk is copied -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk_mover(fleet: Fleet) -> Iterator[str]:
    """A guest on its host's own storage that has written enough for its disk to be on its way for seconds."""
    vm = fleet.create("diskmover", pool="local", to="node1")
    fleet.wait_for_ticks("diskmover", 1)
    fill = f"yes {PLAIN_TEXT} | dd of=/data/fill bs=1M count=7 iflag=fullblock 2>/dev/null; sync; echo filled"
    wait_until(lambda: guest_says(fleet.lab, "node1", vm["id"], fill) == "filled", "the guest to write")
    yield "diskmover"
    fleet.delete("diskmover")


def test_nobody_on_the_way_reads_what_a_guest_has_on_its_disk_and_in_memory(fleet: Fleet, disk_mover: str) -> None:
    """And all of it goes to the address that the target keeps for guests that arrive, another than its agent's."""
    home, target = other_hosts(fleet, disk_mover)
    with listening(fleet, home, at=fleet.lab.spec.host(target)) as listener:
        fleet.ok("vm", "migrate", disk_mover, "--to", target, "--wait")
        fleet.sh(home, "touch /run/heard-enough")
        in_plain_text, arrived_bytes, strayed_bytes = map(int, listener.communicate(timeout=60)[0].split())
    assert arrived_bytes > 7 << 20, "the disk at least went by"
    assert strayed_bytes < 1 << 16, "nothing of it went to where its agent is, but what agents send each other"
    assert in_plain_text == 0


@contextmanager
def listening(fleet: Fleet, host: str, *, at: HostSpec) -> "Iterator[subprocess.Popen[str]]":
    """Look at everything that passes a host's cable, until told; the program then prints the packets with the text, and the bytes that
    were sent to where guests arrive `at` a host, and to its other address past its agent."""
    python = str(Path(fleet.lab.agent_command[0]).with_name("python"))
    command = fleet.lab.command(host, [python, "-c", LISTENER, PLAIN_TEXT, at.migration_address, at.address])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=fleet.lab.environment(host)) as listener:
        wait_until(lambda: fleet.sh(host, "ls /run/listens 2>/dev/null || true"), "the listener")
        try:
            yield listener
        finally:
            fleet.sh(host, "touch /run/heard-enough")
            listener.wait(timeout=60)
            fleet.sh(host, "rm -f /run/listens /run/heard-enough")


@pytest.mark.parametrize("fault", ["cancel", "cut link", "cut link under its memory", "killed agent"])
def test_a_fault_while_the_disk_is_copied_leaves_one_whole_copy_and_no_part_of_another(
    fleet: Fleet, disk_mover: str, fault: str
) -> None:
    counted, uptime = fleet.wait_for_ticks(disk_mover, fleet.ticks(disk_mover)[0] + 1)
    vm, (home, target) = fleet.vm(disk_mover), other_hosts(fleet, disk_mover)
    volume_id = vm["volumes"][0]["id"]
    operation_id = fleet.begin("vm", "migrate", disk_mover, "--to", target, "--bandwidth", str(LIMIT_BYTES_S >> 20))
    wait_until(lambda: is_copying_disk(fleet, operation_id), "the disk to be on its way")
    assert any(path.startswith(f"{target}:") for path in fleet.files_of(volume_id)), "the copy that is being filled"
    match fault:
        case "cancel":
            fleet.ok("op", "cancel", operation_id)
        case "cut link" | "cut link under its memory":
            if "memory" in fault:
                wait_until(lambda: "memory" in str(fleet.operation(operation_id)["progress"]), "the disk to be there")
            with without_link(fleet, target):
                # Longer than with memory alone: see `kvm/copy_connections.py`.
                wait_until(lambda: "failed" in job_state(fleet, home, vm["id"]), "the source to give up", patience_s=60)
        case _:
            fleet.lab.signal_service(home, "trimtab-agent", signal.SIGKILL)
            fleet.sh(home, f"virsh migrate-setspeed trimtab-{vm['id']} 500")
    end, on = {"cancel": ("cancelled", home), "killed agent": ("done", target)}.get(fault, ("failed", home))
    assert fleet.end_of(operation_id)["state"] == end
    for host in (home, target):
        fleet.wait_for_host(host)
    assert_one_whole_copy(fleet, disk_mover, on=on, counted=counted)
    assert fleet.ticks(disk_mover)[1] > uptime
    for made in (vm["id"], volume_id):
        assert {path.partition(":")[0] for path in fleet.files_of(made)} == {on}


def is_copying_disk(fleet: Fleet, operation_id: str) -> bool:
    seen = fleet.operation(operation_id)
    assert not seen["done"], f"the migration was over before anything could happen: {seen}"
    return bool((seen["progress"] or {}).get("phase") == "disks")


# --- faults of a post-copy, and of who drives it ---------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("what", ["cable", "connection"])
def test_a_postcopy_whose_link_breaks_goes_on_with_all_of_its_memory(fleet: Fleet, mover: str, what: str) -> None:
    """A cable that was out leaves QEMU's own connection to go on; a connection that was reset is begun anew."""
    counted, uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    domain = f"trimtab-{vm['id']}"
    operation_id = begin_postcopy(fleet, mover, home, target)
    # Before its QEMU has what it needs itself it answers nobody, libvirt included; see the unit test of what is given up.
    wait_until(lambda: len(ticks_on(fleet, target, domain)) > 2, "the guest to count on, on the target")
    with without_link(fleet, target) if what == "cable" else without_memory_connections(fleet, target):
        wait_until(
            lambda: "post-copy failed" in domain_state(fleet, home, domain), "the source to miss the target", patience_s=60
        )
        assert not fleet.operation(operation_id)["done"]
    # What is left is told to go fast; it may be over already.
    fleet.lab.run(home, ["virsh", "migrate-setspeed", domain, "500", "--postcopy"], check=False)
    ended = fleet.end_of(operation_id)
    assert (ended["state"], ended["result"].get("memory")) == ("done", None), ended
    fleet.wait_for_host(target)
    assert_one_whole_copy(fleet, mover, on=target, counted=counted)
    assert fleet.ticks(mover)[1] > uptime, "the same guest, with what it had in memory"
    assert fleet.vm(mover)["epoch"] == vm["epoch"] + 1


@pytest.mark.soak
def test_a_postcopy_that_never_goes_on_is_ended_on_both_hosts_and_the_guest_starts_anew_from_its_disk(
    fleet: Fleet, mover: str
) -> None:
    counted, uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    operation_id = begin_postcopy(fleet, mover, home, target)
    with without_memory_connections(fleet, target):
        ended = fleet.end_of(operation_id)
    assert (ended["state"], (ended["result"] or {}).get("memory")) == ("done", "lost"), ended["error"]
    assert_one_whole_copy(fleet, mover, on=target, counted=counted)
    assert fleet.ticks(mover)[1] < uptime, "it booted anew, nothing of it went on without its memory"
    assert fleet.vm(mover)["epoch"] == vm["epoch"] + 1


def begin_postcopy(fleet: Fleet, name: str, home: str, target: str) -> str:
    """Let the guest run on the target while most of its memory is at home and comes slowly; return the operation."""
    domain = f"trimtab-{fleet.vm(name)['id']}"
    operation_id = begin_slow_move(fleet, name, target, "--allow-postcopy")
    fleet.sh(home, f"virsh migrate-setspeed {domain} {LIMIT_BYTES_S >> 20} --postcopy && virsh migrate-postcopy {domain}")
    wait_until(lambda: "post-copy" in domain_state(fleet, home, domain), "the guest to leave for the target")
    return operation_id


def ticks_on(fleet: Fleet, host: str, domain: str) -> list[str]:
    """Return what the guest counted on this host, which the controller does not read before the guest is at home there."""
    log = f"$(virsh dumpxml {domain} | sed -n \"s/.*<log file='\\([^']*\\)'.*/\\1/p\" | head -n 1)"
    return re.findall(r"tick \d+", fleet.sh(host, f"cat {log}", check=False))


@contextmanager
def without_link(fleet: Fleet, target: str) -> Iterator[None]:
    fleet.lab.cut(target)
    try:
        yield
    finally:
        fleet.lab.heal(target)


@contextmanager
def without_memory_connections(fleet: Fleet, target: str) -> Iterator[None]:
    """Reset what libvirt's migration ports of the target are sent, and nothing else: hosts and agents keep talking."""
    rule = "tcp dport 49152-49215 tcp flags & rst == 0 reject with tcp reset"
    fleet.sh(
        target,
        "nft add table inet nomemory; nft 'add chain inet nomemory input { type filter hook input priority 0; }';"
        f"nft 'add rule inet nomemory input {rule}'",
    )
    try:
        yield
    finally:
        fleet.sh(target, "nft delete table inet nomemory")


def domain_state(fleet: Fleet, host: str, domain: str) -> str:
    return fleet.lab.run(host, ["virsh", "domstate", "--reason", domain], check=False).stdout


def test_a_source_whose_libvirtd_dies_keeps_its_guest(fleet: Fleet, mover: str) -> None:
    counted, uptime = fleet.ticks(mover)
    home, target = other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target)
    fleet.lab.signal_service(home, "libvirtd", signal.SIGKILL)
    assert fleet.end_of(operation_id)["state"] == "failed"
    assert_one_whole_copy(fleet, mover, on=home, counted=counted)
    assert fleet.ticks(mover)[1] > uptime


def test_a_source_that_dies_takes_the_guest_with_it_and_its_disk_goes_on(fleet: Fleet, mover: str) -> None:
    counted, _uptime = fleet.ticks(mover)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target)
    fleet.lab.crash(home)
    fleet.lab.boot(home)
    assert fleet.end_of(operation_id)["state"] == "failed"
    fleet.wait_for_host(home)
    assert fleet.runs_on(vm["id"]) == [], "a half-moved guest must not live on"
    wait_until(lambda: fleet.vm(mover)["observed"]["state"] == "stopped", "the loss to be shown")
    fleet.ok("vm", "start", mover, "--wait")
    after = fleet.vm(mover)
    assert_one_whole_copy(fleet, mover, on=after["host"], counted=counted)


@pytest.mark.soak
def test_a_source_whose_agent_misses_the_end_of_the_migration_and_dies_loses_nothing(fleet: Fleet, mover: str) -> None:
    """It stands still while libvirt brings the migration to its end, and is killed before it could write that down."""
    counted, uptime = fleet.wait_for_ticks(mover, fleet.ticks(mover)[0] + 1)
    vm, (home, target) = fleet.vm(mover), other_hosts(fleet, mover)
    operation_id = begin_slow_move(fleet, mover, target)
    stopped = fleet.lab.signal_service(home, "trimtab-agent", signal.SIGSTOP)
    fleet.sh(home, f"virsh migrate-setspeed trimtab-{vm['id']} 500")
    wait_until(lambda: fleet.runs_on(vm["id"]) == [target], "libvirt to have moved the guest")
    wait_until(lambda: "running" in domain_state(fleet, target, f"trimtab-{vm['id']}"), "it to run there")
    os.kill(stopped, signal.SIGKILL)
    ended = fleet.end_of(operation_id)
    assert ended["state"] == "done", ended
    fleet.wait_for_host(home)
    assert fleet.lab.service_process_id(home, "trimtab-agent") != stopped
    assert_one_whole_copy(fleet, mover, on=target, counted=counted)
    assert fleet.ticks(mover)[1] > uptime
    assert fleet.vm(mover)["epoch"] == vm["epoch"] + 1


def test_a_controller_that_dies_between_the_end_and_its_record_loses_nothing(fleet: Fleet, mover: str) -> None:
    """Its processes end right after libvirt moved the guest, then again right after that was recorded."""
    # A tick of its present life: what the log has may be of before its host died.
    counted, uptime = fleet.wait_for_ticks(mover, fleet.ticks(mover)[0] + 1)
    _home, target = other_hosts(fleet, mover)
    moving = ""
    try:
        for point in ("after:move", "recorded:move"):
            restart(fleet, {"TRIMTAB_CRASH_AT": point, "TRIMTAB_DRIVER_LEASE_S": "5"})
            moving = moving or fleet.begin("vm", "migrate", mover, "--to", target)
            wait_until(lambda: '"status": 9' in newest_log(fleet), f"a process to die at {point}")
    finally:
        restart(fleet, {})
    assert fleet.end_of(moving)["state"] == "done"
    assert_one_whole_copy(fleet, mover, on=target, counted=counted)
    assert fleet.ticks(mover)[1] > uptime


def restart(fleet: Fleet, settings: dict[str, str]) -> None:
    fleet.plane.stop()
    log_path(fleet).write_text("")
    fleet.plane = ControlPlane(fleet.lab, settings={**fleet_settings(fleet.lab), **settings})
    fleet.plane.start()
    for host in HOSTS:
        fleet.wait_for_host(host)


def log_path(fleet: Fleet) -> Path:
    return fleet.lab.spec.log_directory / "controller.log"


def newest_log(fleet: Fleet) -> str:
    return log_path(fleet).read_text(errors="replace")
