"""A tour of upgrades over real hosts: each is emptied under its guests and held, and none while the fleet has just lost another."""

import pytest

from tests.lab.fleet_kit import Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_a_tour_empties_host_after_host_under_its_guests_and_waits_while_another_is_lost(fleet: Fleet) -> None:
    guests = {"tourist": "node1", "resident": "node2", "neighbour": "node2"}  # the emptier host goes first
    ids = {name: fleet.create(name, pool="shared", to=home)["id"] for name, home in guests.items()}
    begun = {name: fleet.wait_for_ticks(name, 2) for name in guests}
    start_what_others_lost(fleet)
    shown = fleet.ok("plan", "create", "upgrade", "node1", "node2", "-o", "json").json()
    assert (shown["state"], shown["blockers"]) == ("open", []), shown
    tour = fleet.begin("plan", "apply", shown["id"])
    wait_until(lambda: is_held(fleet, "node1"), "node1 to be held")
    assert fleet.domains_of("node1").split() == [], "it is emptied before it is held"
    assert fleet.runs_on(ids["resident"]) == ["node2"]

    fleet.lab.cut("node3")
    fleet.wait_for_host("node3", "suspect")
    fleet.ok("host", "maintenance", "end", "node1")
    wait_until(lambda: "node3 is" in why_it_waits(fleet, shown["id"]), "the tour to say what it waits for")
    assert not fleet.host("node1")["is_cordoned"], "the host before serves again"
    assert not fleet.host("node2")["is_cordoned"]
    fleet.lab.heal("node3")
    wait_until(lambda: is_held(fleet, "node2"), "node2 to be held once node3 is back")
    assert fleet.domains_of("node2").split() == []
    fleet.ok("host", "maintenance", "end", "node2")
    ended = fleet.end_of(tour)
    assert (ended["state"], ended["result"]["failed"]) == ("done", []), ended
    for name, vm_id in ids.items():
        assert len(fleet.runs_on(vm_id)) == 1
        counter, uptime_s = fleet.wait_for_ticks(name, fleet.ticks(name)[0] + 1)
        # Its counter is on its disk, its uptime is not: one that was started anew has counted for longer than it is up.
        assert uptime_s - begun[name][1] >= counter - begun[name][0] - 1, name
    fleet.delete(*guests)


def start_what_others_lost(fleet: Fleet) -> None:
    """Guests of other tests whose host died under them: a tour does not go past one that is wanted running and is not."""
    for vm in fleet.ok("vm", "list", "-o", "json").json():
        if vm["desired"]["power"] == "running" and vm["observed"]["state"] in {"stopped", "crashed"}:
            fleet.ok("vm", "start", vm["name"], "--wait")


def is_held(fleet: Fleet, host: str) -> bool:
    return fleet.host(host)["maintenance"] is not None


def why_it_waits(fleet: Fleet, plan: str) -> str:
    return " ".join(step["message"] for step in fleet.ok("plan", "get", plan, "-o", "json").json()["steps"])
