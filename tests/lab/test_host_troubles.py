"""A real host that lives and lost its guests' uplink or its storage: shown within seconds, it is not fenced, nothing new goes there."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until
from tests.lab.host_loss_kit import KILL_S, LEASE_S
from trimtab_lab.commands import run

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SAID = "network-degraded: bridge br-guest has lost its carrier since "
JUDGED = {"failover.suspect", "failover.lost", "failover.fenced"}
HEARTBEAT_S = 3.0
SHOWN_AFTER_S = 2 * HEARTBEAT_S + 4.0
"""Two heartbeats; and what the gateway's write, a command of ours and a busy machine add to them."""
VERB_S = 20.0
"""What a verb that needs nothing of a hung storage takes at most: seconds under emulation beside other tests."""


def shown(fleet: Fleet, host: str) -> str:
    return next(line for line in fleet.ok("host", "list").out.splitlines() if line.startswith(f"{host} "))


def events(fleet: Fleet, kind: str, *, after: int) -> list[dict[str, Any]]:
    found = json.loads(fleet.ok("event", "list", "-A", "--kind", kind, "-o", "json").out)
    return [event for event in (found["items"] if isinstance(found, dict) else found) if event["seq"] > after]


def newest_event(fleet: Fleet) -> int:
    """The fleet is older than this test: hosts of others have died and come back."""
    return max((event["seq"] for event in events(fleet, "", after=0)), default=0)


def vanish(fleet: Fleet, host: str) -> None:
    """As if the network card had died: its device is gone, and out of its bridge with it."""
    spec = fleet.lab.spec
    run(["ip", "-n", spec.namespace(host), "link", "set", "eth1", "netns", spec.fabric_namespace, "name", "gone"])


def reappear(fleet: Fleet, host: str) -> None:
    spec = fleet.lab.spec
    run(["ip", "-n", spec.fabric_namespace, "link", "set", "gone", "netns", spec.namespace(host), "name", "eth1"])
    fleet.lab.run(host, ["ip", "link", "set", "eth1", "master", "br-guest", "up"])


@pytest.mark.soak
@pytest.mark.parametrize("way", ["pulled", "vanished"])
def test_a_pulled_uplink_is_shown_and_ends_nobody(fleet: Fleet, way: str) -> None:
    before = newest_event(fleet)
    there, elsewhere = f"there-{way}", f"elsewhere-{way}"
    vm = fleet.create(there, pool="shared", to="node2")
    counted, uptime = fleet.wait_for_ticks(there, 2)
    assert "network-degraded" not in fleet.ok("host", "list").out
    if way == "pulled":
        fleet.lab.cut("node2", network="guest")
    else:
        vanish(fleet, "node2")
    try:
        wait_until(lambda: SAID in shown(fleet, "node2"), "the lost carrier to be shown", patience_s=20.0)
        assert all("network-degraded" not in shown(fleet, host) for host in HOSTS if host != "node2")
        assert SAID in fleet.ok("host", "get", "node2").out
        assert SAID in fleet.trimtab("doctor").out
        refused = fleet.trimtab(
            "vm", "create", "nowhere", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--network", "default",
            "--to", "node2", "--wait",
        )  # fmt: skip
        assert "network default goes nowhere from it: its bridge br-guest has lost its carrier" in refused.err + refused.out
        assert fleet.create(elsewhere, pool="shared")["host"] != "node2"
        _counted, later = fleet.wait_for_ticks(there, counted + 15)
        after = fleet.vm(there)
        assert (after["host"], after["epoch"], later > uptime) == ("node2", vm["epoch"], True)
        assert fleet.host("node2")["connectivity"] == "up"
    finally:
        if way == "pulled":
            fleet.lab.heal("node2", network="guest")
        else:
            reappear(fleet, "node2")
    wait_until(lambda: "network-degraded" not in shown(fleet, "node2"), "the carrier to be back", patience_s=20.0)
    assert len(events(fleet, "alarm.network-degraded", after=before)) == 1
    assert events(fleet, "failover.", after=before) == []
    wait_until(lambda: events(fleet, "host.network_restored", after=before), "its end to be told")
    fleet.delete(there, elsewhere)


# --- storage ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["hangs", pytest.param("fails", marks=pytest.mark.soak)])
def how(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[str]:
    """A shared pool `own-HOW`, which each host reaches by a file server of its own, and how node2's is to end.

    The servers stay: deleted vms' disks lie in the pool until they are purged, and a pool that is gone is a finding to later tests.
    """
    name = f"own-{request.param}"
    fleet.sh("node1", f"mkdir -p /srv/trimtab-shared/{name}")
    for host in HOSTS:
        serve(fleet, host, name)
    try:
        yield request.param
    finally:
        fleet.sh("node2", f"kill -CONT $(cat /run/{name}.pid)", check=False)


def serve(fleet: Fleet, host: str, name: str) -> None:
    mount = f"bindfs -f -o subtype=glusterfs,allow_other /srv/trimtab-shared/{name} /srv/{name}"
    fleet.lab.run(host, ["sh", "-c", f"mkdir -p /srv/{name}; {mount} >/dev/null 2>&1 & echo $! >/run/{name}.pid"])
    wait_until(lambda: f"/srv/{name} " in fleet.sh(host, "cat /proc/mounts"), f"the mount of {host}")


def signal_server(fleet: Fleet, host: str, name: str, number: str) -> None:
    fleet.sh(host, f"kill -{number} $(cat /run/{name}.pid)")


def test_storage_that_one_host_alone_lost_is_shown_within_two_heartbeats_and_nobody_is_fenced(fleet: Fleet, how: str) -> None:
    own, there, elsewhere = f"own-{how}", f"there-{how}", f"elsewhere-{how}"
    said = f"storage lost: pool {own} "
    fleet.ok("pool", "create", own, "--path", f"/srv/{own}", "--shared", "--wait")
    made = ("--image", "micro", "--memory", "96MiB", "--pool", own, "--ha", "restart")
    fleet.ok("vm", "create", there, *made, "--to", "node2", "--wait")
    fleet.wait_for_ticks(there, 2)
    vm, before = fleet.vm(there), newest_event(fleet)
    signal_server(fleet, "node2", own, "STOP" if how == "hangs" else "KILL")
    struck_s = time.monotonic()
    wait_until(lambda: said in shown(fleet, "node2"), "the lost storage to be shown", patience_s=60.0)
    took_s = time.monotonic() - struck_s
    sys.stdout.write(f"storage that {how} is shown after {took_s:.1f} s\n")
    assert took_s < SHOWN_AFTER_S
    assert all(said not in shown(fleet, host) for host in HOSTS if host != "node2")
    assert said in fleet.ok("host", "get", "node2").out
    assert f"pool {own}" in fleet.trimtab("doctor").out
    refused = fleet.trimtab("vm", "create", "nowhere", *made, "--to", "node2", "--wait")
    assert refused.code == 7, refused.err
    assert f"pool {own}" in refused.err + refused.out
    fleet.ok("vm", "create", elsewhere, *made, "--wait")
    assert fleet.vm(elsewhere)["host"] != "node2"
    # For longer than a lease its management speaks, and it is called neither silent nor dead.
    wait_until(lambda: time.monotonic() > struck_s + LEASE_S + KILL_S, "a lease to pass")
    assert fleet.host("node2")["connectivity"] == "up"
    assert [event["kind"] for event in events(fleet, "failover.", after=before) if event["kind"] in JUDGED] == []
    assert len(fleet.runs_on(vm["id"])) == 1
    if how == "hangs":
        assert (fleet.vm(there)["host"], fleet.vm(there)["epoch"]) == ("node2", vm["epoch"]), "it waits for its disk"
        signal_server(fleet, "node2", own, "CONT")
    else:
        # Its QEMU is paused on a disk that fails, so after its grace it is ended there and goes on where the disk is.
        wait_until(lambda: runs_elsewhere(fleet.vm(there)), "the guest to be started elsewhere", patience_s=120.0)
        moved, counted = fleet.vm(there), fleet.wait_for_ticks(there, 1)[0]
        fleet.sh("node2", f"umount --lazy /srv/{own}")
        serve(fleet, "node2", own)
    wait_until(lambda: said not in shown(fleet, "node2"), "the storage to be back", patience_s=30.0)
    if how == "fails":
        fleet.wait_for_ticks(there, counted + 5)
        after = fleet.vm(there)
        assert (after["host"], after["epoch"]) == (moved["host"], moved["epoch"]), "storage that returns late changes nothing"
        assert after["epoch"] > vm["epoch"], "and what was there is of another epoch"
        assert fleet.runs_on(vm["id"]) == [moved["host"]]
    assert len(events(fleet, "alarm.storage-lost", after=before)) == 1
    wait_until(lambda: events(fleet, "host.storage_restored", after=before), "its end to be told")
    fleet.ok("vm", "stop", there, "--force", "--wait")
    fleet.delete(there, elsewhere)


def runs_elsewhere(vm: dict[str, Any]) -> bool:
    return vm["host"] not in {"", "node2"} and vm["observed"]["state"] == "running"


@pytest.fixture
def hung(fleet: Fleet) -> Iterator[Callable[[str], None]]:
    """A pool's directory of node2, by a file server that is sent the signals it is called with; it stays, as those above."""
    fleet.sh("node2", "mkdir -p /srv/trimtab-local/stuck /srv/stuck")
    mount = "bindfs -f -o allow_other /srv/trimtab-local/stuck /srv/stuck >/dev/null 2>&1 & echo $! >/run/stuck.pid"
    fleet.lab.run("node2", ["sh", "-c", mount])
    wait_until(lambda: "/srv/stuck " in fleet.sh("node2", "cat /proc/mounts"), "the mount")
    try:
        yield lambda number: signal_server(fleet, "node2", "stuck", number)
    finally:
        fleet.sh("node2", "kill -CONT $(cat /run/stuck.pid)", check=False)


@pytest.mark.soak
def test_a_file_system_that_hangs_holds_up_what_needs_it_and_nothing_else(fleet: Fleet, hung: Callable[[str], None]) -> None:
    """Each verb of the host's other vm is done within its bound, what needs the pool is refused within one, and all ends with it; so
    it is too for an agent and a control plane that start meanwhile."""
    fleet.ok("pool", "create", "stuck", "--path", "/srv/stuck", "--wait")
    made = ("--image", "micro", "--memory", "96MiB", "--to", "node2", "--wait")
    fleet.ok("vm", "create", "stuck1", *made, "--pool", "stuck")
    fleet.ok("vm", "create", "free1", *made, "--pool", "local")
    for name in ("stuck1", "free1"):
        fleet.wait_for_ticks(name, 2)
    counted, uptime = fleet.ticks("stuck1")
    took_s: dict[str, float] = {}

    def timed(what: str, *arguments: str, code: int = 0) -> str:
        began_s = time.monotonic()
        ran = fleet.trimtab(*arguments)
        took_s[what] = time.monotonic() - began_s
        assert ran.code == code, f"{what}: {ran.code} {ran.err}{ran.out}"
        return ran.out + ran.err

    hung("STOP")
    struck_s = time.monotonic()
    wait_until(lambda: pool_of(fleet)["state"] == "unresponsive", "the pool to be shown", patience_s=60.0)
    took_s["shown"] = time.monotonic() - struck_s
    for verb in ("pause", "resume"):
        timed(f"{verb} of the other", "vm", verb, "free1", "--wait")
    timed("a disk for the other", "volume", "create", "more1", "--pool", "shared", "--size", "8MiB", "--wait")
    timed("plugging it in", "vm", "attach", "free1", "--volume", "more1", "--wait")
    fleet.kill_management("node2")
    wait_until(lambda: pool_of(fleet)["state"] == "unresponsive", "the new agent to say the same", patience_s=60.0)
    timed("a card for the other", "vm", "attach", "free1", "--network", "default", "--wait")
    timed("stop of the other by force", "vm", "stop", "free1", "--force", "--wait")
    timed("its start", "vm", "start", "free1", "--wait")
    assert "pool stuck" in timed("another vm in the pool", "vm", "create", "no1", *made, "--pool", "stuck", code=7)
    assert "stuck1" in fleet.trimtab("doctor").out, "who waits for it is named"
    host = fleet.host("node2")
    assert (host["connectivity"], fleet.vm("stuck1")["observed"]["state"]) == ("up", "running")

    hung("CONT")
    back_s = time.monotonic()
    wait_until(lambda: pool_of(fleet)["state"] == "ready", "the pool to be ready again", patience_s=60.0)
    took_s["ready again"] = time.monotonic() - back_s
    sys.stdout.write(f"seconds: { {what: round(seconds, 1) for what, seconds in took_s.items()} }\n")
    assert took_s.pop("shown") < SHOWN_AFTER_S
    assert took_s.pop("ready again") < SHOWN_AFTER_S
    assert max(took_s.values()) < VERB_S, took_s
    _later, later_uptime = fleet.wait_for_ticks("stuck1", counted + 3)
    assert later_uptime > uptime, "it waited for its disk, and nobody ended it"
    fleet.purge("stuck1", "free1")
    fleet.ok("volume", "delete", "more1", "--yes", "--wait")


def pool_of(fleet: Fleet) -> dict[str, str]:
    hosts = fleet.ok("pool", "get", "stuck", "-o", "json").json()["hosts"]
    return next(dict(one) for one in hosts if one["host"] == "node2")
