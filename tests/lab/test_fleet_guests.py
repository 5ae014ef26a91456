"""What a guest gets and who else may have it: addresses, firmware, its seed, and the guests that are not Trimtab's."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import PATIENCE_S, Fleet, answers_ping, wait_until
from tests.lab.guest_view import guest_says
from tests.lab.os_images import ssh_server
from trimtab_lab.commands import own_programs, run

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

STRANGERS_MAC = "52:54:00:0f:0f:01"
STRANGER = """
<domain type='qemu'><name>stranger</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><interface type='bridge'><mac address='{mac}'/><source bridge='br-guest'/></interface></devices></domain>
"""
OUTSIDE_PORT = 7788
TELLS_WHO_ASKS = """
import socket, sys
listening = socket.create_server(("", int(sys.argv[1])))
while True:
    asked, peer = listening.accept()
    asked.sendall(peer[0].encode())
    asked.close()
"""


def console(fleet: Fleet, name: str) -> str:
    return fleet.ok("vm", "console", name, "--log").out


# --- networks and seeds ----------------------------------------------------------------------------------------------------


def test_a_guest_behind_nat_gets_an_address_that_is_shown(fleet: Fleet) -> None:
    fleet.ok("network", "create", "inner", "--nat", "--subnet", "10.199.7.0/24", "--dhcp", "--wait")
    fleet.ok(
        "vm", "create", "natted", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--network", "inner", "--wait"
    )  # fmt: skip
    shown = wait_until(
        lambda: [one for one in fleet.vm("natted")["observed"]["addresses"] if one.startswith("10.199.7.")],
        "the guest's address to be shown",
    )
    address = shown[0].partition("/")[0]
    vm = fleet.vm("natted")
    assert vm["nics"][0]["addresses"] == [f"{address}/24"], "the one that was given to it"

    def answers() -> bool:
        return "bytes from" in fleet.sh(vm["host"], f"busybox ping -c 1 -W 5 {address}", check=False)

    assert answers(), "the host of a NAT network reaches its guests"
    leaves_as_its_host(fleet, vm)
    said = guest_says(fleet.lab, vm["host"], vm["id"], "nslookup natted 10.199.7.1 2>&1")
    assert address in said, f"it has its name: {said}"
    fleet.ok("secgroup", "create", "closed", "--closed")
    fleet.ok("vm", "update", "natted", "--secgroup", "closed")
    assert not answers(), "a group that lets nothing in"
    fleet.ok("secgroup", "update", "closed", "--allow", "icmp")
    assert answers(), "what it allows now is in force when the command ends"
    refused = fleet.trimtab("secgroup", "delete", "closed", "--yes")
    assert (refused.code, "natted" in refused.err) == (5, True)
    fleet.delete("natted")


def leaves_as_its_host(fleet: Fleet, vm: dict[str, Any]) -> None:
    """Who is outside hears the guest, and sees its host's address."""
    spec = fleet.lab.spec
    (spec.state_directory / "listen.py").write_text(TELLS_WHO_ASKS)
    listener = subprocess.Popen(
        fleet.lab.command("ctl", [sys.executable, str(spec.state_directory / "listen.py"), str(OUTSIDE_PORT)])
    )
    try:
        ask = f"nc -w 3 {spec.ctl_address} {OUTSIDE_PORT} </dev/null"
        seen = wait_until(
            lambda: guest_says(fleet.lab, vm["host"], vm["id"], ask), "the guest to reach who is outside", patience_s=60.0
        )
    finally:
        listener.kill()
        listener.wait(10)
    assert seen == spec.host(vm["host"]).address


def test_a_guest_sees_its_seed_and_both_its_nics(fleet: Fleet, tmp_path: Path) -> None:
    user_data, key = tmp_path / "user-data", tmp_path / "key"
    user_data.write_text("#cloud-config\n#trimtab-load: mem1\n")
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key)])
    prefix = fleet.lab.spec.guest_prefix
    nics = [f"default,mac=52:54:00:0a:0b:0{number},ip={prefix}.{40 + number}/24" for number in (1, 2)]
    fleet.ok(
        "vm", "create", "seeded", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--hostname", "by-seed",
        "--user-data", str(user_data), "--ssh-key", f"{key}.pub", "--network", nics[0], "--network", nics[1], "--wait",
    )  # fmt: skip
    vm = fleet.vm("seeded")
    fleet.wait_for_ticks("seeded", 1)
    said = console(fleet, "seeded")
    assert f"SEED instance-id={vm['id']} hostname=by-seed ssh-keys=1" in said
    assert "LOAD mem1" in said, "its user-data reached it"
    for number in (1, 2):
        assert f"52:54:00:0a:0b:0{number} {prefix}.{40 + number}/24" in said
        wait_until(partial(answers_ping, fleet, f"{prefix}.{40 + number}"), f"nic {number} to answer")
    refuses_a_second(fleet, "mac=52:54:00:0a:0b:01", "mac-taken", "seeded")
    refuses_a_second(fleet, f"ip={prefix}.41/24", "address-taken", "seeded")
    lets_in_by_ssh_who_has_its_seeds_key(fleet, vm, key, tmp_path)
    fleet.delete("seeded")


def lets_in_by_ssh_who_has_its_seeds_key(fleet: Fleet, vm: dict[str, Any], key: Path, tmp_path: Path) -> None:
    """An ssh server comes on a disk of its own, and is given the keys that the seed says, as cloud-init would."""
    fleet.ok("image", "import", "ssh-server", str(ssh_server()), "--format", "raw", "--pool", "shared", "--wait")
    fleet.ok("volume", "create", "ssh-server", "--image", "ssh-server", "--pool", "shared", "--wait")
    fleet.ok("vm", "attach", "seeded", "--volume", "ssh-server", "--wait")
    serial = fleet.ok("volume", "get", "ssh-server", "-o", "json").json()["id"][-20:]
    serve = (
        f"tar -x -C / -f /dev/$(basename $(dirname $(grep -lx {serial} /sys/block/*/serial))) && mkdir -p -m 700 ~root/.ssh\n"
        "cat /seed/*-data | grep -oE 'ssh-ed25519 [A-Za-z0-9+/=]+' >~root/.ssh/authorized_keys\n"
        "mkdir -p /etc/dropbear; pidof dropbear || /usr/sbin/dropbear -R -s; netstat -ltn"
    )
    wait_until(lambda: ":22 " in guest_says(fleet.lab, vm["host"], vm["id"], serve), "the guest to listen for ssh")
    lent = log_in(fleet, tmp_path, key, "hostname; cat /proc/sys/kernel/random/boot_id; exit 7")
    boot_id = guest_says(fleet.lab, vm["host"], vm["id"], "cat /proc/sys/kernel/random/boot_id")
    assert (lent.returncode, lent.stdout.split()) == (7, ["by-seed", boot_id]), lent.stderr
    assert f"is at {fleet.lab.spec.guest_prefix}.4" in lent.stderr
    # By the vm's id, not by an address that another may have tomorrow; Debian's ssh writes names as hashes.
    kept = run(["ssh-keygen", "-F", vm["id"], "-f", str(tmp_path / "trimtab/known_hosts")])
    assert "ssh-ed25519" in kept.stdout
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "wrong")])
    refused = log_in(fleet, tmp_path, tmp_path / "wrong", "hostname")
    assert (refused.returncode, refused.stdout) == (255, "")
    assert "Permission denied" in refused.stderr


def log_in(fleet: Fleet, directory: Path, key: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run `vm ssh` where guests are reached, by an agent that knows this key alone."""
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(directory), "XDG_CONFIG_HOME": str(directory), **fleet.plane.cli_environment(),
    }  # fmt: skip
    with_key = ["ssh-agent", "sh", "-c", 'ssh-add -q "$1"; shift; exec "$@"', "sh", str(key)]
    line = [str(own_programs() / "trimtab"), "vm", "ssh", "seeded", "-l", "root", "--", command]
    return run(fleet.lab.command("ctl", [*with_key, *line]), check=False, timeout_s=PATIENCE_S, environment=environment)


def refuses_a_second(fleet: Fleet, detail: str, code: str, holder: str) -> None:
    refused = fleet.trimtab(
        "vm", "create", "second", "--image", "micro", "--memory", "96MiB", "--pool", "shared",
        "--network", f"default,{detail}", "--wait",
    )  # fmt: skip
    assert refused.code == 5, refused.err
    assert code in refused.err
    assert holder in refused.err
    assert fleet.trimtab("vm", "get", "second").code == 4


# --- firmware --------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_guest_sees_secure_boot_and_its_tpm_and_takes_both_and_its_nvram_along_and_no_bridge_is_changed_by_any_of_it(
    fleet: Fleet,
) -> None:
    wires = {host: links(fleet, host) for host in ("node1", "node2")}
    fleet.ok(
        "vm", "create", "uefi1", "--image", "micro", "--memory", "256MiB", "--pool", "local", "--secure-boot", "--tpm",
        "--network", "default", "--to", "node1", "--wait",
    )  # fmt: skip
    vm = fleet.vm("uefi1")
    counted, uptime = fleet.wait_for_ticks("uefi1", 1)
    assert "OVMF" in fleet.sh("node1", f"virsh dumpxml trimtab-{vm['id']}")
    wait_until(lambda: is_secured(fleet, "node1", vm["id"]), "the guest to see Secure Boot and its TPM")
    nvram = f"/srv/trimtab-local/vms/{vm['id']}/nvram.fd"
    before = fleet.sh("node1", f"sha256sum < {nvram}")
    fleet.ok("vm", "migrate", "uefi1", "--to", "node2", "--wait")
    _later, later_uptime = fleet.wait_for_ticks("uefi1", counted + 2)
    assert later_uptime > uptime
    assert is_secured(fleet, "node2", vm["id"]), "both have come along"
    assert fleet.sh("node2", f"sha256sum < {nvram}") == before, "its variables are on the target as they were"
    assert {path.partition(":")[0] for path in fleet.files_of(vm["id"])} == {"node2"}
    with_guest = links(fleet, "node2")
    assert set(with_guest) - set(wires["node2"]), "its own port"
    assert {name: with_guest[name] for name in wires["node2"]} == wires["node2"]
    assert links(fleet, "node1") == wires["node1"]
    fleet.delete("uefi1")
    assert {host: links(fleet, host) for host in wires} == wires


def is_secured(fleet: Fleet, host: str, vm_id: str) -> bool:
    """Tell whether the guest itself says that its firmware lets signed systems in only, and draws numbers from its TPM 2.0."""
    look = (
        "E=/sys/firmware/efi/efivars; mountpoint -q $E || mount -t efivarfs none $E; od -An -tu1 $E/SecureBoot-*\n"
        "cat /sys/class/tpm/tpm0/tpm_version_major\n"
        # TPM2_GetRandom of 8 bytes: its answer has a header of 10 bytes, a length of 2 and the 8.
        r"exec 3<>/dev/tpm0; printf '\200\001\000\000\000\014\000\000\001\173\000\010' >&3; head -c 20 <&3 | wc -c"
    )
    said = guest_says(fleet.lab, host, vm_id, look)
    lines = said.split("\n")
    return lines[0].split() == ["6", "0", "0", "0", "1"] and lines[-2:] == ["2", "20"]


def links(fleet: Fleet, host: str) -> dict[str, object]:
    """Return the bridge that was there before Trimtab and its ports: all that the kernel says and somebody may set."""
    shown = fleet.sh(host, "ip -d -j addr show br-guest; ip -d -j addr show master br-guest")
    return {link["ifname"]: settings_of(link) for line in shown.splitlines() for link in json.loads(line) if link}


def settings_of(value: Any) -> Any:
    """Leave out clocks, and what the kernel works out from the ports that a bridge has just now."""
    if not isinstance(value, dict):
        return value
    return {key: settings_of(each) for key, each in value.items() if not key.endswith("_timer") and not key.startswith("tso_max")}


# --- guests that are not Trimtab's -----------------------------------------------------------------------------------------


@pytest.fixture
def stranger(fleet: Fleet) -> Iterator[str]:
    """A running domain on node3 that somebody made with virsh; returns its definition."""
    definition = fleet.lab.spec.host("node3").path_on_machine("/var/lib/trimtab") / "stranger.xml"
    definition.write_text(STRANGER.format(mac=STRANGERS_MAC))
    fleet.sh("node3", "virsh define /var/lib/trimtab/stranger.xml; virsh start stranger; rm /var/lib/trimtab/stranger.xml")
    yield fleet.sh("node3", "virsh dumpxml --inactive stranger")
    fleet.sh("node3", "virsh destroy stranger; virsh undefine stranger")


def test_an_unmanaged_guest_is_counted_as_used_and_never_touched(fleet: Fleet, stranger: str) -> None:
    wait_until(lambda: fleet.host("node3")["memory_mib"]["unmanaged"] >= 64, "the stranger to be counted")
    seen = fleet.host("node3")
    assert (seen["memory_mib"]["unmanaged"], seen["vcpus"]["unmanaged"]) == (64, 1)
    assert seen["memory_mib"]["free"] == seen["memory_mib"]["limit"] - seen["memory_mib"]["claimed"] - 64
    assert "64 MiB unmanaged" in fleet.ok("host", "get", "node3").out
    refuses_a_second(fleet, f"mac={STRANGERS_MAC}", "mac-taken", "a domain on host node3")
    process = fleet.sh("node3", "cat /run/libvirt/qemu/stranger.pid")
    # Everything that the agent does by itself happens when it starts: it must leave the stranger alone.
    fleet.sh("node3", "systemctl restart trimtab-agent")
    fleet.wait_for_host("node3")
    assert fleet.sh("node3", "cat /run/libvirt/qemu/stranger.pid") == process
    assert fleet.sh("node3", "virsh dumpxml --inactive stranger") == stranger
