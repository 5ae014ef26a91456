"""Hosts come and go: what a join would change and what stands against it, removal that leaves guests alone, lost memories.

`node4` is a host of this file's own; what the other tests stand on is not touched by its comings and goings.
"""

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.ticks import TICK
from trimtab_lab.controlplane import join_line

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SPARE = "node4"
CHECK_REFUSED = 3
# The agent's own command line on a host whose clock runs ahead: only what it reads the time from is other.
AHEAD = """
import sys, time
real, real_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: real() + 60, lambda: real_ns() + 60_000_000_000
from trimtab_agent.main import main
main()
"""


@dataclass(frozen=True, slots=True)
class Checked:
    code: int
    out: str


@pytest.fixture(scope="module")
def spare(fleet: Fleet) -> Iterator[str]:
    """A fourth host that has not joined, as Debian's packages left it."""
    fleet.lab.up(hosts=4)
    yield SPARE
    fleet.trimtab("host", "remove", SPARE, "--keep-guests", "--force", "--yes", "--wait")
    fleet.lab.crash(SPARE)


def join_arguments(fleet: Fleet, name: str, *more: str) -> list[str]:
    line = join_line(fleet.ok("host", "token", "create", name, *more, "-o", "json").out)
    assert line is not None
    return shlex.split(line)[2:]


def check(fleet: Fleet, host: str, arguments: list[str], *, clock: list[str] | None = None) -> Checked:
    program = clock or fleet.lab.agent_command
    ran = fleet.lab.run(host, [*program, "check", *arguments], check=False)
    return Checked(ran.returncode, ran.stdout + ran.stderr)


def picture(fleet: Fleet, host: str) -> str:
    """Return all of /etc that a join may touch, with content and mode, and what it may have left elsewhere.

    libvirt's own files for domains, pools and filters come and go by themselves.
    """
    script = (
        "cd /etc; own='-path ./libvirt/qemu -o -path ./libvirt/storage -o -path ./libvirt/nwfilter'; "
        "find . \\( $own \\) -prune -o -type f -printf '%m %p\\n'; "
        "find . \\( $own \\) -prune -o -type f -exec sha256sum {} +; "
        "find . \\( $own \\) -prune -o -type l -printf '%p -> %l\\n'; find ./pki ./trimtab -type d 2>/dev/null || true; "
        "ls -A /var/lib/trimtab 2>/dev/null || true; "
        "for unit in libvirt-guests libvirtd-tls.socket trimtab-agent; do systemctl is-enabled $unit || true; done"
    )
    return "\n".join(sorted(fleet.sh(host, script).splitlines()))


# --- the ways between hosts ------------------------------------------------------------------------------------------------


def ways(fleet: Fleet) -> tuple[int, set[tuple[str, str, str]]]:
    """Return the exit code of `host check --all` and what it met: (seen by, peer, kind)."""
    ran = fleet.trimtab("host", "check", "--all", "-o", "json")
    return ran.code, {(one["seen_by"], one["peer"], one["kind"]) for one in json.loads(ran.out)["problems"]}


def test_each_way_between_hosts_is_looked_at_and_what_is_wrong_is_named(fleet: Fleet) -> None:
    def listening() -> str:
        return fleet.sh("node2", "ss -Hltn | sort")

    before = listening()
    # On a busy machine a host may be missed for a moment, which is said too.
    wait_until(lambda: ways(fleet) == (0, set()), "nothing to be wrong")
    fleet.sh("node2", "ip link set eth0 mtu 1400; nft add table inet broken; "
                      "nft add chain inet broken in '{ type filter hook input priority 0; }'; "
                      "nft add rule inet broken in tcp dport 49152-49215 tcp flags syn / syn,ack drop")  # fmt: skip
    code, met = ways(fleet)
    assert code == CHECK_REFUSED
    assert met == {(host, "node2", kind) for host in ("node1", "node3") for kind in ("migration-ports", "mtu")}
    said = fleet.trimtab("host", "check", "node2")
    assert said.code == CHECK_REFUSED
    assert "cure: on node2: let node1 reach tcp ports 49152 to 49215" in said.out
    assert "packets of 1500 bytes do not pass uncut, 1400 bytes do" in said.out
    fleet.sh("node2", "ip link set eth0 mtu 1500; nft delete table inet broken")
    wait_until(lambda: ways(fleet) == (0, set()), "nothing to be wrong any more")
    assert listening() == before, "nothing was left listening"


# --- the check -------------------------------------------------------------------------------------------------------------


def test_check_lists_every_change_and_makes_none(fleet: Fleet, spare: str) -> None:
    before = picture(fleet, spare)
    checked = check(fleet, spare, join_arguments(fleet, spare))
    assert checked.code == 0, checked.out
    for part in ("libvirtd.conf", "qemu.conf", "16514", "libvirt-guests", "trimtab-agent", "/etc/trimtab", "restart libvirtd"):
        assert part in checked.out, part
    assert "Nothing stands against the join" in checked.out
    assert picture(fleet, spare) == before


def test_check_refuses_a_clock_that_is_off(fleet: Fleet, spare: str) -> None:
    python = str(Path(fleet.lab.agent_command[0]).with_name("python"))
    checked = check(fleet, spare, join_arguments(fleet, spare), clock=[python, "-c", AHEAD])
    assert checked.code == CHECK_REFUSED
    assert re.search(r"clock is (5\d|60)\.\d s ahead of the controller's; at most 2 s", checked.out), checked.out


def test_check_refuses_a_clone_of_a_member(fleet: Fleet, spare: str) -> None:
    """A copied disk brings machine-id and host UUID along, and perhaps the identity too."""
    # On a machine without firmware tables the host's UUID follows from its machine-id.
    copied = fleet.sh("node1", "ls /etc/machine-id /sys/class/dmi/id/product_uuid 2>/dev/null || true").split()
    for number, path in enumerate(copied):
        twin = fleet.sh("node1", f"cat {path}").strip()
        fleet.sh(spare, f"echo {twin} > /run/twin{number}; mount --bind /run/twin{number} {path}")
    try:
        checked = check(fleet, spare, join_arguments(fleet, spare))
    finally:
        fleet.sh(spare, f"umount {' '.join(copied)}")
    assert checked.code == CHECK_REFUSED, checked.out
    for label in ("machine-id", "SMBIOS UUID"):
        assert f"host node1 has this {label} already" in checked.out
    stolen = fleet.lab.spec.host("node1").path_on_machine("/etc/trimtab")
    place = fleet.lab.spec.host(spare).path_on_machine("/etc")
    subprocess.run(["cp", "-r", str(stolen), str(place)], check=True)
    try:
        checked = check(fleet, spare, join_arguments(fleet, spare))
        assert checked.code == CHECK_REFUSED
        assert "this machine was node1" in checked.out
        assert "which the token for node4 does not re-admit" in checked.out
    finally:
        fleet.sh(spare, "rm -r /etc/trimtab")


# --- leaving ---------------------------------------------------------------------------------------------------------------


def test_a_removed_host_is_as_it_was_and_its_guest_goes_on_as_a_plain_domain(fleet: Fleet, spare: str) -> None:
    before = picture(fleet, spare)
    fleet.plane.join(spare)
    host_id = fleet.wait_for_host(spare)["id"]
    kept = {"shared", "local"}  # pools of other tests may be on hosts of theirs alone
    wait_until(
        lambda: kept == {pool["pool"] for pool in fleet.host(spare)["pools"] if pool["state"] == "ready"} & kept,
        "its pools to be ready",
    )
    vm = fleet.create("left1", pool="shared", to=spare)
    fleet.wait_for_ticks("left1", 1)
    full = fleet.trimtab("host", "remove", spare, "--yes", "--wait")
    assert full.code == 5
    assert "left1" in full.err
    fleet.ok("host", "remove", spare, "--keep-guests", "--yes", "--wait")
    assert fleet.trimtab("host", "get", spare).code == 4
    assert fleet.trimtab("vm", "get", "left1").code == 4

    wait_until(lambda: not has_agent(fleet, spare), "the agent to end")
    assert picture(fleet, spare) == before
    assert "trimtab" not in fleet.sh(spare, "virsh pool-list --all --name; cat /etc/libvirt/libvirtd.conf /etc/libvirt/qemu.conf")
    definition = fleet.sh(spare, f"virsh dumpxml trimtab-{vm['id']}")
    assert "<trimtab:" not in definition, "nothing says that it is ours"
    counted = ticks_on(fleet, spare)
    wait_until(lambda: ticks_on(fleet, spare) > counted, "the guest to count on without Trimtab")

    # Back again: another host to the fleet, and the guest is somebody's, shown and counted as used.
    fleet.plane.join(spare)
    again = fleet.wait_for_host(spare)
    assert again["id"] != host_id
    wait_until(lambda: fleet.host(spare)["memory_mib"]["unmanaged"] == 96, "the guest to be counted as used")
    fleet.sh(spare, f"virsh destroy trimtab-{vm['id']}; virsh undefine --nvram trimtab-{vm['id']}")


def has_agent(fleet: Fleet, host: str) -> bool:
    return fleet.lab.service_process_id(host, "trimtab-agent") is not None


def ticks_on(fleet: Fleet, host: str) -> int:
    """Return the newest counter in the serial logs on the host itself."""
    found = TICK.findall(fleet.sh(host, "cat /var/log/libvirt/qemu/*serial* /var/log/libvirt/qemu/*.log 2>/dev/null || true"))
    return max((int(number) for number, _uptime in found), default=0)


def test_a_host_removed_by_force_is_refused_when_it_comes_back(fleet: Fleet, spare: str) -> None:
    if fleet.trimtab("host", "get", spare).code == 4:
        fleet.plane.join(spare)
    fleet.wait_for_host(spare)
    fleet.lab.cut(spare)
    try:
        silent = fleet.trimtab("host", "remove", spare, "--force", "--yes", "--wait")
        assert silent.code == 0, silent.err
    finally:
        fleet.lab.heal(spare)
    log = fleet.lab.spec.host(spare).path_on_machine("/var/log/trimtab/trimtab-agent.log")
    wait_until(lambda: "was removed" in log.read_text() or "was revoked" in log.read_text(), "its certificate to be refused")
    assert fleet.trimtab("host", "get", spare).code == 4
    fleet.lab.run(spare, [*fleet.lab.agent_command, "leave", "--yes"])
    assert not has_agent(fleet, spare)


# --- lost memories and daemons ---------------------------------------------------------------------------------------------


HOME = "node3"


@pytest.fixture(scope="module")
def steady(fleet: Fleet) -> Iterator[str]:
    """A guest that lives through everything below."""
    fleet.create("steady", pool="shared", to=HOME)
    fleet.wait_for_ticks("steady", 1)
    yield "steady"
    fleet.delete("steady")


def agents_log(fleet: Fleet) -> str:
    return fleet.lab.spec.host(HOME).path_on_machine("/var/log/trimtab/trimtab-agent.log").read_text()


def incarnation(fleet: Fleet) -> str:
    """Return what the agent said of itself when it last started to serve."""
    served = [line for line in agents_log(fleet).splitlines() if '"agent serves"' in line]
    return str(json.loads(served[-1])["incarnation"])


def test_an_agent_that_lost_its_state_directory_knows_its_guests_from_their_metadata(fleet: Fleet, steady: str) -> None:
    """All but what says who it is (`agent.toml`, and its key elsewhere): without that it is no host of this fleet."""
    vm = fleet.vm(steady)
    counted, uptime = fleet.ticks(steady)
    before = incarnation(fleet)
    lose = "find /var/lib/trimtab -mindepth 1 ! -name agent.toml -delete"
    fleet.sh(HOME, f"systemctl stop trimtab-agent; {lose}; ls -A /var/lib/trimtab; systemctl start trimtab-agent")
    wait_until(lambda: incarnation(fleet) != before, "a new incarnation")
    fleet.wait_for_host(HOME)
    assert '"journal rebuilt"' in agents_log(fleet)
    fleet.ok("vm", "pause", steady, "--wait")
    fleet.ok("vm", "resume", steady, "--wait")
    assert fleet.vm(steady)["epoch"] == vm["epoch"]
    assert fleet.wait_for_ticks(steady, counted + 1)[1] > uptime


def test_libvirtd_may_die_under_its_guests(fleet: Fleet, steady: str) -> None:
    counted, uptime = fleet.ticks(steady)
    fleet.lab.signal_service(HOME, "libvirtd", signal.SIGKILL)
    assert fleet.wait_for_ticks(steady, counted + 2)[1] > uptime
    # The agent finds libvirt again by itself, and commands go through as before.
    fleet.ok("vm", "pause", steady, "--wait")
    assert fleet.vm(steady)["observed"]["state"] == "paused"
    fleet.ok("vm", "resume", steady, "--wait")


def test_a_cut_host_is_missed_and_its_commands_fail_in_seconds(fleet: Fleet, steady: str) -> None:
    fleet.lab.cut(HOME)
    try:
        cut_at = time.monotonic()
        fleet.wait_for_host(HOME, "suspect")
        # Three beats of three seconds, and what the gateway needs to judge.
        assert time.monotonic() - cut_at < 25
        asked_at = time.monotonic()
        console = fleet.trimtab("vm", "console", steady, "--log")
        assert console.code in {6, 10}, console.err
        assert time.monotonic() - asked_at < 15
        events = json.loads(fleet.ok("event", "list", "-A", "--kind", "host.suspect", "-o", "json").out)
        assert events, "operators are told"
    finally:
        fleet.lab.heal(HOME)
    fleet.wait_for_host(HOME)
