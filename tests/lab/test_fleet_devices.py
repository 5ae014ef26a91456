"""A real fleet: disks and cards are attached and detached by the command line under guests that run, and the guests say so."""

import re
from collections.abc import Iterator

import pytest

from tests.lab.fleet_kit import Fleet, answers_ping, wait_until
from tests.lab.guest_view import disk_mib, guest_says, has_card
from tests.lab.ticks import breaks

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plugged(fleet: Fleet) -> Iterator[dict[str, str]]:
    vm = fleet.create("plug1", pool="shared")
    fleet.wait_for_ticks("plug1", 1)
    wait_until(lambda: guest_says(fleet.lab, vm["host"], vm["id"], "echo up") == "up", "the guest's agent")
    yield {"id": vm["id"], "host": vm["host"]}
    fleet.delete("plug1")


def test_a_disk_comes_is_written_moves_with_its_vm_and_goes(fleet: Fleet, plugged: dict[str, str]) -> None:
    fleet.ok("volume", "create", "data1", "--size", "16MiB", "--pool", "shared", "--wait")
    fleet.ok("vm", "attach", "plug1", "--volume", "data1", "--wait")
    serial = fleet.ok("volume", "get", "data1", "-o", "json").json()["id"][-20:]
    wait_until(lambda: disk_mib(fleet.lab, plugged["host"], plugged["id"], serial) == 16, "the guest to see the disk")
    guest_says(fleet.lab, plugged["host"], plugged["id"], "echo trimtab-was-here | dd of=/dev/vdb bs=512 conv=sync,fsync")
    fleet.ok("vm", "migrate", "plug1", "--wait")
    plugged["host"] = fleet.vm("plug1")["host"]
    assert "trimtab-was-here" in guest_says(fleet.lab, plugged["host"], plugged["id"], "dd if=/dev/vdb bs=512 count=1")
    counted, _uptime = fleet.ticks("plug1")
    fleet.ok("vm", "detach", "plug1", "--volume", "data1", "--wait")
    assert disk_mib(fleet.lab, plugged["host"], plugged["id"], serial) == 0
    assert [one["name"] for one in fleet.vm("plug1")["volumes"]] == ["plug1-root"]
    fleet.wait_for_ticks("plug1", counted + 1)


def test_what_one_vm_has_no_other_gets(fleet: Fleet, plugged: dict[str, str]) -> None:
    fleet.create("plug2", pool="shared")
    refused = fleet.trimtab("vm", "attach", "plug2", "--volume", "plug1-root")
    assert refused.code == 5
    assert "belongs to vm plug1" in refused.err
    fleet.ok("vm", "delete", "plug2", "--yes", "--wait")


def test_a_card_comes_carries_traffic_and_goes(fleet: Fleet, plugged: dict[str, str]) -> None:
    address = f"{fleet.lab.spec.guest_prefix}.33"
    fleet.ok("vm", "attach", "plug1", "--network", f"default,ip={address}", "--wait")
    card = fleet.vm("plug1")["nics"][1]
    wait_until(lambda: has_card(fleet.lab, plugged["host"], plugged["id"], card["mac"]), "the guest to see the card")
    name = f"n=$(basename $(dirname $(grep -l {card['mac']} /sys/class/net/*/address)))"
    guest_says(fleet.lab, plugged["host"], plugged["id"], f"{name}; ip link set $n up; ip addr add {address}/24 dev $n")
    wait_until(lambda: answers_ping(fleet, address), "the new card to answer")
    fleet.ok("vm", "detach", "plug1", "--nic", card["id"], "--wait")
    assert not has_card(fleet.lab, plugged["host"], plugged["id"], card["mac"])
    assert len(fleet.vm("plug1")["nics"]) == 1


def test_a_disk_that_came_is_taken_off_again_where_the_card_beside_it_finds_no_slot(
    fleet: Fleet, plugged: dict[str, str]
) -> None:
    """The running guest has the disk when its card is refused: somebody's device by hand is in the port that is the card's."""
    host, vm_id = plugged["host"], plugged["id"]
    domain, mac = f"trimtab-{vm_id}", "52:54:00:0f:0d:01"
    counted = fleet.ticks("plug1")[0]
    both = ("vm", "attach", "plug1", "--volume", "data1", "--network", f"default,mac={mac}", "--wait")
    disks_seen = "dmesg | grep -c 'vd[b-z].*logical blocks'"
    fleet.ok(*both)
    card = fleet.sh(host, f"virsh dumpxml {domain} | sed -n '/{mac}/,/<.interface/p'")
    port = re.search(r"<address type='pci' domain='0x0000' bus='(0x..)'", card)
    assert port is not None, card
    fleet.ok("vm", "detach", "plug1", "--volume", "data1", "--wait")
    fleet.ok("vm", "detach", "plug1", "--nic", mac, "--wait")
    fleet.sh(
        host,
        "truncate -s 1M /srv/trimtab-local/hand.raw; cat >/run/hand.xml <<END\n"
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/trimtab-local/hand.raw'/>\n"
        "<target dev='vdx' bus='virtio'/><serial>byhand</serial>\n"
        f"<address type='pci' domain='0' bus='{port[1]}' slot='0' function='0'/></disk>\nEND\n"
        f"virsh attach-device {domain} /run/hand.xml --live",
    )
    wait_until(lambda: disk_mib(fleet.lab, host, vm_id, "byhand") == 1, "the guest to see what somebody plugged in")
    before, claimed = guest_says(fleet.lab, host, vm_id, disks_seen), fleet.host(host)["memory_mib"]["claimed"]

    refused = fleet.trimtab(*both)
    assert (refused.code, "no-free-slot" in refused.err) == (5, True), refused.err
    assert int(guest_says(fleet.lab, host, vm_id, disks_seen)) == int(before) + 1, "the disk was there"
    serial = fleet.ok("volume", "get", "data1", "-o", "json").json()["id"][-20:]
    assert disk_mib(fleet.lab, host, vm_id, serial) == 0, "and is gone"
    for stored in ("", "--inactive"):
        definition = fleet.sh(host, f"virsh dumpxml {stored} {domain}")
        assert (serial in definition, mac in definition) == (False, False)
    vm = fleet.vm("plug1")
    assert ([one["name"] for one in vm["volumes"]], len(vm["nics"])) == (["plug1-root"], 1)
    assert fleet.ok("volume", "get", "data1", "-o", "json").json()["vm"] in (None, "")
    assert fleet.host(host)["memory_mib"]["claimed"] == claimed

    fleet.sh(host, f"virsh detach-disk {domain} vdx --live")
    wait_until(lambda: disk_mib(fleet.lab, host, vm_id, "byhand") == 0, "the guest to let go of it")
    fleet.ok(*both)
    assert fleet.vm("plug1")["nics"][1]["mac"] == mac, "nobody had kept it"
    assert disk_mib(fleet.lab, host, vm_id, serial) == 16
    last = fleet.wait_for_ticks("plug1", fleet.ticks("plug1")[0] + 1)[0]
    assert breaks(fleet.ok("vm", "console", "plug1", "--log").out, first=counted, last=last) == []
    fleet.ok("vm", "detach", "plug1", "--nic", mac, "--wait")
    fleet.ok("vm", "detach", "plug1", "--volume", "data1", "--wait")
    fleet.ok("volume", "delete", "data1", "--yes", "--wait")
