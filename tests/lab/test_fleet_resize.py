"""A real fleet: vms and volumes are resized by the command line, and the guests say what they see."""

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import disk_mib, memory_mib, online_cpus

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def growing(fleet: Fleet) -> dict[str, str]:
    """A vm with room to grow, whose guest answers."""
    fleet.ok(
        "vm", "create", "grow1", "--image", "micro", "--memory", "96MiB", "--memory-max", "224MiB", "--vcpus", "1",
        "--vcpus-max", "3", "--pool", "shared", "--network", "default", "--wait",
    )  # fmt: skip
    vm = fleet.vm("grow1")
    fleet.wait_for_ticks("grow1", 1)
    wait_until(lambda: online_cpus(fleet.lab, vm["host"], vm["id"]) == 1, "the guest's agent")
    return {"id": vm["id"], "host": vm["host"]}


def test_a_running_guest_sees_what_it_was_given_and_goes_on(fleet: Fleet, growing: dict[str, str]) -> None:
    vm_id, host = growing["id"], growing["host"]
    before_mib, (counted, uptime) = memory_mib(fleet.lab, host, vm_id), fleet.ticks("grow1")
    said = fleet.ok("vm", "resize", "grow1", "--vcpus", "3", "--memory", "160MiB", "--wait").out
    assert "grow1 has 3 vcpus, 160 MiB" in said
    assert online_cpus(fleet.lab, host, vm_id) == 3
    assert memory_mib(fleet.lab, host, vm_id) - before_mib == 64
    later_count, later_uptime = fleet.wait_for_ticks("grow1", counted + 2)
    assert (later_count > counted, later_uptime > uptime) == (True, True), "it was never restarted"


def test_what_was_given_moves_with_the_guest(fleet: Fleet, growing: dict[str, str]) -> None:
    fleet.ok("vm", "migrate", "grow1", "--wait")
    growing["host"] = fleet.vm("grow1")["host"]
    assert online_cpus(fleet.lab, growing["host"], growing["id"]) == 3
    host = fleet.ok("host", "get", growing["host"], "-o", "json").json()
    assert host["memory_mib"]["claimed"] >= 160, "its claim moved with it"


def test_more_than_it_can_take_is_refused_with_the_command_that_works(fleet: Fleet, growing: dict[str, str]) -> None:
    refused = fleet.trimtab("vm", "resize", "grow1", "--vcpus", "4")
    assert refused.code == 2
    assert "3 at most while it runs" in refused.err
    assert "--at next-stop" in refused.err
    waits = fleet.ok("vm", "resize", "grow1", "--vcpus", "4", "--at", "next-stop", "--wait").out
    assert "at its next stop: 4 vcpus" in waits


def test_what_a_guest_keeps_waits_for_its_stop_and_is_so_afterwards(fleet: Fleet, growing: dict[str, str]) -> None:
    said = fleet.ok("vm", "resize", "grow1", "--vcpus", "1", "--memory", "96MiB", "--wait").out
    shape = fleet.vm("grow1")["shape"]
    seen = online_cpus(fleet.lab, growing["host"], growing["id"])
    assert shape["vcpus"] == seen, "what is shown is what the guest has"
    assert (shape["next_vcpus"] == 1) == (seen != 1)
    assert ("at its next stop" in said) == bool(shape["next_vcpus"] or shape["next_memory_mib"])
    fleet.ok("vm", "stop", "grow1", "--wait")
    fleet.ok("vm", "start", "grow1", "--wait")
    shape = fleet.vm("grow1")["shape"]
    assert (shape["vcpus"], shape["memory_mib"], shape["next_vcpus"], shape["next_memory_mib"]) == (1, 96, 0, 0)


def test_a_volume_grows_under_its_guest_and_never_shrinks(fleet: Fleet, growing: dict[str, str]) -> None:
    vm = fleet.vm("grow1")
    root = vm["volumes"][0]
    fleet.ok("volume", "resize", root["name"], "80MiB", "--wait")
    wait_until(lambda: disk_mib(fleet.lab, vm["host"], growing["id"], root["id"][-20:]) == 80, "the guest to see the grown disk")
    refused = fleet.trimtab("volume", "resize", root["name"], "64MiB")
    assert refused.code == 2
    assert "not shrink" in refused.err
