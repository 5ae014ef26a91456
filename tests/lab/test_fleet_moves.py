"""Volumes that go to another pool through the whole stack, under real guests; pools whose storage does not answer."""

import signal
from collections.abc import Iterator

import pytest

from tests.lab.fleet_kit import Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SHARED, LOCAL = "/srv/trimtab-shared/volumes", "/srv/trimtab-local/volumes"


def root_of(fleet: Fleet, name: str) -> dict[str, str]:
    return dict(fleet.vm(name)["volumes"][0])


def test_a_guest_counts_on_while_its_disk_goes_to_another_pool_and_its_agent_dies_on_the_way(fleet: Fleet) -> None:
    vm = fleet.create("mover", pool="shared", index=86, to="node1")
    counted, uptime = fleet.wait_for_ticks("mover", 3)
    volume = root_of(fleet, "mover")
    operation = fleet.begin("volume", "move", volume["name"], "--to", "local", "--bandwidth", "8")
    domain, files = f"trimtab-{vm['id']}", f"{SHARED}/{volume['id']}.qcow2 {LOCAL}/{volume['id']}.qcow2"
    wait_until(lambda: "<mirror" in fleet.sh("node1", f"virsh dumpxml {domain}"), "QEMU to copy")
    fleet.lab.signal_service("node1", "trimtab-agent", signal.SIGKILL)
    ended = fleet.end_of(operation)
    assert ended["state"] == "done", ended
    assert fleet.sh("node1", f"ls {files} 2>/dev/null || true").split() == [f"{LOCAL}/{volume['id']}.qcow2"]
    assert root_of(fleet, "mover")["pool"] == "local"
    later, later_uptime = fleet.wait_for_ticks("mover", counted + 5)
    assert later_uptime > uptime, "the guest went on, it was not started anew"
    assert fleet.runs_on(vm["id"]) == ["node1"]

    # What it wrote is on the disk that it starts from: the counter goes on from where it was.
    fleet.ok("vm", "stop", "mover", "--wait")
    image = f"{LOCAL}/{volume['id']}.qcow2"
    fleet.sh("node1", f"qemu-img check -q -f qcow2 {image}; cp {image} /srv/trimtab-local/before.qcow2")
    assert "backing" not in fleet.sh("node1", f"qemu-img info -f qcow2 {image}"), "a clone that moved stands by itself"

    # Without a guest: the same content, byte for byte.
    fleet.ok("volume", "move", volume["name"], "--to", "shared", "--wait")
    same = f"qemu-img compare -f qcow2 -F qcow2 {SHARED}/{volume['id']}.qcow2 /srv/trimtab-local/before.qcow2"
    assert "identical" in fleet.sh("node1", f"{same}; rm /srv/trimtab-local/before.qcow2")
    fleet.ok("vm", "start", "mover", "--wait")
    fleet.wait_for_ticks("mover", later + 1)
    fleet.delete("mover")


# --- storage that does not answer ------------------------------------------------------------------------------------------


@pytest.fixture
def fuse_pool(fleet: Fleet) -> Iterator[str]:
    """A pool of node2 alone that a user-space file server serves; the fixture lends the server's process id."""
    fleet.sh("node2", "mkdir -p /srv/fuse /srv/trimtab-local/behind-fuse")
    serve = "bindfs -f -o allow_other /srv/trimtab-local/behind-fuse /srv/fuse >/dev/null 2>&1 & echo $! >/run/fuse.pid"
    fleet.lab.run("node2", ["sh", "-c", serve])
    wait_until(lambda: "/srv/fuse " in fleet.sh("node2", "cat /proc/mounts"), "the mount")
    process_id = fleet.sh("node2", "cat /run/fuse.pid").strip()
    try:
        fleet.ok("pool", "create", "fuse", "--path", "/srv/fuse", "--wait")
        yield process_id
    finally:
        fleet.sh("node2", f"kill -CONT {process_id} 2>/dev/null || true", check=False)
        fleet.trimtab("pool", "delete", "fuse", "--yes", "--wait")
        fleet.sh("node2", "umount --lazy /srv/fuse", check=False)


def state_on(fleet: Fleet, pool: str, host: str) -> str:
    hosts = fleet.ok("pool", "get", pool, "-o", "json").json()["hosts"]
    return str(next(one["state"] for one in hosts if one["host"] == host))


def test_a_hung_file_system_is_shown_and_stalls_nothing_else(fleet: Fleet, fuse_pool: str) -> None:
    fleet.create("stuck", pool="fuse", index=87, to="node2")
    fleet.create("free", pool="local", index=63, to="node2")
    fleet.wait_for_ticks("stuck", 1)
    fleet.sh("node2", f"kill -STOP {fuse_pool}")
    wait_until(lambda: state_on(fleet, "fuse", "node2") == "unresponsive", "the pool to be shown as unresponsive")
    assert fleet.host("node2")["connectivity"] == "up", "heartbeats wait for no storage"
    shown = fleet.ok("pool", "get", "fuse", "-o", "json").json()
    assert [one["name"] for one in shown["vms"]] == ["stuck"]
    assert "stuck" in fleet.trimtab("doctor", "-o", "json").out
    # Verbs of others on the same host go on, and nothing new is placed there.
    fleet.ok("vm", "reboot", "free", "--force", "--wait")
    fleet.ok("vm", "stop", "free", "--force", "--wait")
    refused = fleet.trimtab("volume", "create", "nowhere", "--size", "1MiB", "--pool", "fuse", "--wait")
    assert refused.code == 7, refused.err
    fleet.sh("node2", f"kill -CONT {fuse_pool}")
    wait_until(lambda: state_on(fleet, "fuse", "node2") == "ready", "the pool to be active again")
    counted, _uptime = fleet.ticks("stuck")
    fleet.wait_for_ticks("stuck", counted + 2)
    fleet.delete("stuck", "free")
