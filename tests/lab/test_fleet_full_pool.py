"""A pool filled to the last byte with guests on it: they are paused, shown, and go on by themselves when there is room; nothing is lost,
also where the agent and the control plane die meanwhile."""

import re
from collections.abc import Iterator

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import begins, guest_says
from tests.lab.ticks import breaks, spoken

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

HOST, POOL = "node2", "/srv/tiny"
GUESTS = ("thirsty1", "thirsty2")


@pytest.fixture
def tiny_pool(fleet: Fleet) -> Iterator[None]:
    """A pool of 200 MiB on one host alone."""
    fleet.sh(HOST, f"mkdir -p {POOL}; mount -t tmpfs -o size=200m,mode=755 tiny {POOL}")
    try:
        fleet.ok("pool", "create", "tiny", "--path", POOL, "--wait")
        yield
    finally:
        fleet.ok("pool", "delete", "tiny", "--yes", "--wait")
        fleet.sh(HOST, f"umount {POOL}", check=False)


@pytest.fixture
def thirsty(fleet: Fleet, tiny_pool: None) -> Iterator[dict[str, str]]:
    """Two guests on the pool, by name their ids; both answer and count."""
    for name in GUESTS:
        fleet.ok("vm", "create", name, "--image", "micro", "--memory", "96MiB", "--pool", "tiny", "--to", HOST, "--wait")
    found = {name: str(fleet.vm(name)["id"]) for name in GUESTS}
    for name, vm_id in found.items():
        fleet.wait_for_ticks(name, 1)
        wait_until(lambda one=vm_id: guest_says(fleet.lab, HOST, one, "echo up") == "up", f"the agent inside {name}")
    yield found
    fleet.sh(HOST, f"rm -f {POOL}/filler")
    fleet.purge(*GUESTS)


def fill(fleet: Fleet) -> None:
    filled = f"head -c 400M /dev/zero > {POOL}/filler 2>/dev/null || true; df --output=avail {POOL} | tail -n 1"
    assert fleet.sh(HOST, filled).strip() == "0"


def prepare(fleet: Fleet, vm_id: str, name: str, blocks: int) -> str:
    """Have a guest make new content and wait for `go` to write it through to its disk; return the content's sum."""
    made = f"dd if=/dev/urandom of=/run/{name} bs=64k count={blocks} 2>/dev/null; sha256sum </run/{name}"
    through = f"dd if=/run/{name} of=/data/{name} bs=64k conv=fsync && touch /run/{name}.through; rm /run/{name}"
    waits = f"while [ ! -e /run/go-{name} ]; do sleep 0.1; done"
    return guest_says(fleet.lab, HOST, vm_id, f"{made}; ({waits}; {through}) >/dev/null 2>&1 &")


def go(fleet: Fleet, vm_id: str, name: str) -> None:
    """Let it write. One that its counter's own writes have paused already does not hear it: it is told once more when it runs."""
    begins(fleet.lab, HOST, vm_id, f"touch /run/go-{name}")


def read(fleet: Fleet, vm_id: str, name: str) -> str:
    """Return the sum of a file as its disk has it, once the guest was told that all of it is there; '' before."""
    script = f"[ -e /run/{name}.through ] && echo 3 >/proc/sys/vm/drop_caches && sha256sum </data/{name}"
    return guest_says(fleet.lab, HOST, vm_id, script)


def wait_for_pause(fleet: Fleet, name: str) -> None:
    seen = wait_until(lambda: vm if (vm := fleet.vm(name))["problem"] else None, f"{name} to be shown as paused")
    assert (seen["observed"]["state"], "pool is full" in seen["problem"]) == ("paused", True), seen


def wait_for_end(fleet: Fleet, name: str) -> None:
    wait_until(
        lambda: (vm := fleet.vm(name))["observed"]["state"] == "running" and vm["problem"] == "", f"{name} to go on by itself"
    )


def resumes(fleet: Fleet, vm_id: str) -> int:
    listed = fleet.ok("op", "list", "--filter", f"subject={vm_id}", "-o", "json").json()
    return sum(one["kind"] == "vm.resume" for one in listed)


def test_guests_of_a_pool_full_to_the_last_byte_are_paused_shown_and_resumed_and_lose_nothing(
    fleet: Fleet, thirsty: dict[str, str]
) -> None:
    first, second = GUESTS
    begun = {name: fleet.ticks(name)[0] for name in GUESTS}
    sums = {
        name: {file: prepare(fleet, vm_id, file, 16) for file in ("kept", "more", "again")} for name, vm_id in thirsty.items()
    }
    for name, vm_id in thirsty.items():
        go(fleet, vm_id, "kept")
        was_written(fleet, name, vm_id, "kept", sums[name])
    fill(fleet)
    for name, vm_id in thirsty.items():
        go(fleet, vm_id, "more")
        wait_for_pause(fleet, name)
        told = fleet.ok("event", "list", "--subject", vm_id, "--kind", "vm.drift", "-o", "json").out
        assert ("pool is full" in told, name in fleet.trimtab("doctor", "-o", "json").out) == (True, True)
    fleet.kill_management(HOST)
    for name in GUESTS:
        wait_for_pause(fleet, name)
        assert name in fleet.trimtab("doctor", "-o", "json").out
    fleet.sh(HOST, f"rm {POOL}/filler")
    for name, vm_id in thirsty.items():
        wait_for_end(fleet, name)
        for file in ("more", "kept"):
            go(fleet, vm_id, file)
            was_written(fleet, name, vm_id, file, sums[name])

    # Once more, and now an operator wants one of them paused: that holds when there is room, for an agent too that was not asked.
    fill(fleet)
    for name, vm_id in thirsty.items():
        go(fleet, vm_id, "again")
        wait_for_pause(fleet, name)
    by_then = resumes(fleet, thirsty[second])
    fleet.ok("vm", "pause", second, "--wait")
    fleet.kill_management(HOST)
    fleet.sh(HOST, f"rm {POOL}/filler")
    wait_for_end(fleet, first)
    fleet.wait_for_ticks(first, fleet.ticks(first)[0] + 2)
    assert (fleet.vm(second)["observed"]["state"], resumes(fleet, thirsty[second])) == ("paused", by_then)
    fleet.ok("vm", "resume", second, "--wait")
    for name, vm_id in thirsty.items():
        go(fleet, vm_id, "again")
        for file in ("again", "more", "kept"):
            was_written(fleet, name, vm_id, file, sums[name])
        ends_whole(fleet, name, vm_id, begun=begun[name])


def was_written(fleet: Fleet, name: str, vm_id: str, file: str, sums: dict[str, str]) -> None:
    """The guest was told that all of it is on its disk, and there it is."""
    assert sums[file]
    whole = wait_until(lambda: read(fleet, vm_id, file), f"{name} to be through with {file}")
    assert whole == sums[file], f"{name} has lost some of {file}"


def ends_whole(fleet: Fleet, name: str, vm_id: str, *, begun: int) -> None:
    """It was resumed, never started anew, and its image is sound when it is off."""
    log = re.search(r"<log file='([^']+)'", fleet.sh(HOST, f"virsh dumpxml trimtab-{vm_id}"))
    assert log is not None
    last = fleet.wait_for_ticks(name, fleet.ticks(name)[0] + 2)[0]
    said = fleet.sh(HOST, f"cat {log[1]}")
    assert last in [number for number, _uptime in spoken(said)]
    assert breaks(said, first=begun, last=last) == []
    fleet.ok("vm", "stop", name, "--wait")
    (volume,) = fleet.vm(name)["volumes"]
    checked = fleet.sh(HOST, f"qemu-img check -f qcow2 {POOL}/volumes/{volume['id']}.qcow2")
    assert "No errors were found" in checked
