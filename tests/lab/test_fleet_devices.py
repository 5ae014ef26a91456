"""A real fleet: disks and cards are attached and detached by the command line under guests that run, and the guests say so."""

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import disk_mib, guest_says, has_card
from tests.lab.test_fleet import answers_ping

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plugged(fleet: Fleet) -> dict[str, str]:
    vm = fleet.create("plug1", pool="shared", index=31)
    fleet.wait_for_ticks("plug1", 1)
    wait_until(lambda: guest_says(fleet.lab, vm["host"], vm["id"], "echo up") == "up", "the guest's agent")
    return {"id": vm["id"], "host": vm["host"]}


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
    fleet.create("plug2", pool="shared", index=32)
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
