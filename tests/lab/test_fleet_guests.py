"""What a guest gets and who else may have it: addresses, firmware, its seed, and the guests that are not Trimtab's."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, answers_ping, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0Y7dQfS1p0nGQv6Zb0y1wQyL0c2rJq3m8N1x5k7t2a lab"
STRANGERS_MAC = "52:54:00:0f:0f:01"
STRANGER = """
<domain type='qemu'><name>stranger</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><interface type='bridge'><mac address='{mac}'/><source bridge='br-guest'/></interface></devices></domain>
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
    fleet.ok("secgroup", "create", "closed", "--closed")
    fleet.ok("vm", "update", "natted", "--secgroup", "closed")
    assert not answers(), "a group that lets nothing in"
    fleet.ok("secgroup", "update", "closed", "--allow", "icmp")
    assert answers(), "what it allows now is in force when the command ends"
    refused = fleet.trimtab("secgroup", "delete", "closed", "--yes")
    assert (refused.code, "natted" in refused.err) == (5, True)
    fleet.delete("natted")


def test_a_guest_sees_its_seed_and_both_its_nics(fleet: Fleet, tmp_path: Path) -> None:
    user_data, key = tmp_path / "user-data", tmp_path / "key.pub"
    user_data.write_text("#cloud-config\n#trimtab-load: mem1\n")
    key.write_text(PUBLIC_KEY + "\n")
    prefix = fleet.lab.spec.guest_prefix
    nics = [f"default,mac=52:54:00:0a:0b:0{number},ip={prefix}.{40 + number}/24" for number in (1, 2)]
    fleet.ok(
        "vm", "create", "seeded", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--hostname", "by-seed",
        "--user-data", str(user_data), "--ssh-key", str(key), "--network", nics[0], "--network", nics[1], "--wait",
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
    fleet.delete("seeded")


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


def test_a_uefi_guest_boots_and_takes_its_nvram_along(fleet: Fleet) -> None:
    fleet.ok(
        "vm", "create", "uefi1", "--image", "micro", "--memory", "256MiB", "--pool", "local", "--firmware", "uefi",
        "--network", "default", "--to", "node1", "--wait",
    )  # fmt: skip
    vm = fleet.vm("uefi1")
    counted, uptime = fleet.wait_for_ticks("uefi1", 1)
    assert "OVMF" in fleet.sh("node1", f"virsh dumpxml trimtab-{vm['id']}")
    nvram = f"/srv/trimtab-local/vms/{vm['id']}/nvram.fd"
    before = fleet.sh("node1", f"sha256sum < {nvram}")
    fleet.ok("vm", "migrate", "uefi1", "--to", "node2", "--wait")
    _later, later_uptime = fleet.wait_for_ticks("uefi1", counted + 2)
    assert later_uptime > uptime
    assert fleet.sh("node2", f"sha256sum < {nvram}") == before, "its variables are on the target as they were"
    assert {path.partition(":")[0] for path in fleet.files_of(vm["id"])} == {"node2"}
    fleet.delete("uefi1")


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
