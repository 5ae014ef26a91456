"""Snapshots, clones and templates of real guests, through the command line: what a guest finds on its disk, and what it was doing.

The guest counts on its disk once a second and says so with its uptime: going back to disks makes the counter fall and the uptime begin
anew, going back to a memory makes both go on from where they were.
"""

from collections.abc import Iterator

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.ticks import TICK

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def counter(fleet: Fleet) -> Iterator[str]:
    """The guest that all of this is done to, on shared storage."""
    fleet.create("counter", pool="shared", to="node1")
    fleet.wait_for_ticks("counter", 3)
    yield "counter"
    # A linked clone of it holds on to it for 24 h.
    fleet.ok("vm", "stop", "counter", "--force")


def ticks_after(fleet: Fleet, name: str, offset: int) -> list[tuple[int, float]]:
    """Return what the guest said after this many characters of its log."""
    log = fleet.ok("vm", "console", name, "--log").out
    return [(int(tick), float(uptime)) for tick, uptime in TICK.findall(log[offset:])]


def log_length(fleet: Fleet, name: str) -> int:
    return len(fleet.ok("vm", "console", name, "--log").out)


def first_after(fleet: Fleet, name: str, offset: int) -> tuple[int, float]:
    return wait_until(lambda: next(iter(ticks_after(fleet, name, offset)), None), f"{name} to count")


def first_lower(fleet: Fleet, name: str, offset: int, than: int) -> tuple[int, float]:
    """Return the first count that is lower: until its power is cut the guest goes on counting."""
    return wait_until(
        lambda: next((seen for seen in ticks_after(fleet, name, offset) if seen[0] < than), None), f"{name} to count from lower"
    )


def layers(fleet: Fleet, name: str) -> int:
    """Return how many files the vm's disk has, counted on the host."""
    volume = fleet.vm(name)["volumes"][0]["id"]
    host = fleet.vm(name)["host"]
    return len(fleet.sh(host, f"ls /srv/trimtab-shared/volumes | grep '^{volume}'").split())


def test_a_vm_goes_back_to_its_disk_and_to_what_it_was_doing(fleet: Fleet, counter: str) -> None:
    made = fleet.ok("vm", "snapshot", "create", counter, "disk")
    assert "frozen" in made.out or "crash-consistent" in made.out, "how consistent it is, is said"
    kept, _uptime = fleet.ticks(counter)
    fleet.ok("vm", "snapshot", "create", counter, "doing", "--memory")
    doing, uptime = fleet.ticks(counter)
    fleet.wait_for_ticks(counter, doing + 4)

    before = log_length(fleet, counter)
    fleet.ok("vm", "snapshot", "revert", counter, "doing", "--yes")
    number, seen_uptime = first_lower(fleet, counter, before, doing + 4)
    assert kept <= number <= doing + 3, "it counts on from where its memory was kept"
    assert seen_uptime >= uptime - 1, "and never booted"

    _number, ran = fleet.wait_for_ticks(counter, max(number, kept) + 4)
    before = log_length(fleet, counter)
    fleet.ok("vm", "snapshot", "revert", counter, "disk", "--yes")
    number, seen_uptime = first_lower(fleet, counter, before, max(number, kept) + 4)
    assert number <= kept + 2, "it counts on from what its disk kept"
    assert seen_uptime < ran, "it booted"

    shown = fleet.ok("vm", "snapshot", "list", counter).out
    assert "* disk" in shown


def test_it_moves_with_its_snapshots_and_they_merge_while_it_runs(fleet: Fleet, counter: str) -> None:
    there = "node2" if fleet.vm(counter)["host"] != "node2" else "node3"
    fleet.ok("vm", "migrate", counter, "--to", there)
    number, uptime = fleet.ticks(counter)
    assert layers(fleet, counter) > 1
    for name in ("doing", "disk"):
        fleet.ok("vm", "snapshot", "delete", counter, name, "--yes")
    assert layers(fleet, counter) == 1
    later, later_uptime = fleet.wait_for_ticks(counter, number + 3)
    assert later_uptime > uptime, "it ran on through it all"
    # What was merged is what it boots from.
    before = log_length(fleet, counter)
    fleet.ok("vm", "stop", counter)
    fleet.ok("vm", "start", counter)
    assert first_after(fleet, counter, before)[0] >= later


def test_a_running_vm_is_cloned_linked_and_full_under_another_identity(fleet: Fleet, counter: str) -> None:
    number, _uptime = fleet.ticks(counter)
    fleet.ok("vm", "clone", counter, "linked", "--linked")
    fleet.ok("vm", "clone", counter, "full")
    source = fleet.vm(counter)
    for name in ("linked", "full"):
        clone = fleet.vm(name)
        assert clone["id"] != source["id"]
        assert {nic["mac"] for nic in clone["nics"]}.isdisjoint({nic["mac"] for nic in source["nics"]})
        assert first_after(fleet, name, 0)[0] >= number, "it counts on from what its source had counted"
        assert f"host {name}" in fleet.ok("vm", "console", name, "--log").out, "under its own name"
    refused = fleet.trimtab("vm", "delete", counter, "--yes")
    assert refused.code != 0
    assert "linked" in refused.err
    fleet.delete("full", "linked")


def test_a_template_of_it_gives_vms_that_are_spread(fleet: Fleet, counter: str) -> None:
    fleet.ok("template", "create", "web", "--from", counter)
    fleet.ok("vm", "create", "--template", "web", "--count", "3", "--name-pattern", "web-{n}", "--no-start")
    homes = {fleet.vm(f"web-{n}")["host"] for n in (1, 2, 3)}
    assert len(homes) > 1
    refused = fleet.trimtab("template", "delete", "web", "--yes")
    assert refused.code != 0
    assert "web-1" in refused.err
    fleet.delete("web-1", "web-2", "web-3")
