"""Volumes that go to another pool through the whole stack, under real guests; pools whose storage does not answer."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.ticks import breaks
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

OLD = "/srv/trimtab-old"
SHARED, LOCAL = "/srv/trimtab-shared/volumes", "/srv/trimtab-local/volumes"


def root_of(fleet: Fleet, name: str) -> dict[str, str]:
    return dict(fleet.vm(name)["volumes"][0])


@pytest.fixture
def old_pool(fleet: Fleet) -> Iterator[str]:
    """A pool of node1 alone that is to be emptied."""
    fleet.sh("node1", f"mkdir -p {OLD}; mount -t tmpfs -o size=200m,mode=755 old {OLD}")
    fleet.ok("pool", "create", "old", "--path", OLD, "--wait")
    yield "old"
    fleet.trimtab("pool", "delete", "old", "--yes", "--wait")
    fleet.sh("node1", f"umount --lazy {OLD}", check=False)


def test_a_guest_from_a_raw_disk_counts_on_while_its_disk_moves_its_agent_dies_and_a_pool_is_emptied(
    fleet: Fleet, old_pool: str, tmp_path: Path
) -> None:
    vm = import_mover(fleet, tmp_path)
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
    _later, later_uptime = fleet.wait_for_ticks("mover", counted + 5)
    assert later_uptime > uptime, "the guest went on, it was not started anew"
    assert fleet.runs_on(vm["id"]) == ["node1"]

    # What it wrote is on the disk that it starts from: the counter goes on from where it was.
    fleet.ok("vm", "stop", "mover", "--wait")
    stopped_at = fleet.ticks("mover")[0]
    image = f"{LOCAL}/{volume['id']}.qcow2"
    fleet.sh("node1", f"qemu-img check -q -f qcow2 {image}; cp {image} /srv/trimtab-local/before.qcow2")
    assert "backing" not in fleet.sh("node1", f"qemu-img info -f qcow2 {image}"), "a clone that moved stands by itself"

    # Without a guest: the same content, byte for byte.
    fleet.ok("volume", "move", volume["name"], "--to", old_pool, "--wait")
    moved = f"{OLD}/volumes/{volume['id']}.qcow2"
    same = f"qemu-img compare -f qcow2 -F qcow2 {moved} /srv/trimtab-local/before.qcow2"
    assert "identical" in fleet.sh("node1", f"{same}; rm /srv/trimtab-local/before.qcow2")
    fleet.ok("vm", "start", "mover", "--to", "node1", "--wait")
    fleet.wait_for_ticks("mover", stopped_at + 1)
    is_emptied_under_the_guest(fleet, old_pool, moved)
    fleet.delete("mover")


def import_mover(fleet: Fleet, tmp_path: Path) -> dict[str, str]:
    """Return a vm on node1 that was made of nothing but a raw file."""
    raw = shutil.copyfile(build_guest_image().raw, tmp_path / "mover.raw")
    fleet.ok("vm", "import", "mover", str(raw), "--memory", "96MiB", "--pool", "shared", "--no-networks", "--no-start", "--wait")
    fleet.ok("vm", "start", "mover", "--to", "node1", "--wait")
    vm = fleet.vm("mover")
    assert (vm["image"], vm["host"], vm["nics"]) == ("mover-disk0", "node1", [])
    return vm


def is_emptied_under_the_guest(fleet: Fleet, pool: str, path: str) -> None:
    """The plan moves nothing; once it is carried out the disk is elsewhere, the pool is empty, and the guest has missed nothing."""
    before = fleet.ticks("mover")[0]
    shown = fleet.ok("pool", "drain", pool, "--plan", "-o", "json").json()
    (step,) = shown["steps"]
    assert (shown["state"], shown["blockers"], step["volume"]) == ("open", [], root_of(fleet, "mover")["name"]), shown
    assert fleet.sh("node1", f"ls {path}").strip() == path, "a plan moves nothing"
    fleet.ok("plan", "apply", shown["id"], "--wait")
    assert root_of(fleet, "mover")["pool"] == "local", "what was on a host's own storage goes to its other pool"
    assert fleet.sh("node1", f"find {OLD}/volumes {OLD}/images -type f").strip() == ""
    last = fleet.wait_for_ticks("mover", fleet.ticks("mover")[0] + 2)[0]
    assert breaks(fleet.ok("vm", "console", "mover", "--log").out, first=before, last=last) == []
    assert "nothing to move" in fleet.ok("pool", "drain", pool, "--plan").out
    fleet.ok("pool", "delete", pool, "--yes", "--wait")


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
    fleet.create("stuck", pool="fuse", to="node2")
    fleet.create("free", pool="local", to="node2")
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
