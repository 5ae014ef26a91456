"""A pool of a real Ceph cluster, of one node: its images are made, opened by QEMU, grown, moved under a guest, backed up, kept."""

import json
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import disk_mib, guest_says
from tests.lab.test_fleet_storage import MARKER, hosts_that_show
from trimtab_lab import ceph
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]


def test_a_guest_runs_on_a_ceph_image_that_grows_and_is_backed_up_and_moves_live(fleet: Fleet, tmp_path: Path) -> None:
    cluster = fleet.lab.ceph()
    (key := tmp_path / "key").write_text(f"{cluster.key}\n")
    fleet.ok(
        "pool", "create", "ceph", "--type", "rbd", "--monitor", cluster.monitor, "--ceph-pool", ceph.POOL,
        "--ceph-user", ceph.USER, "--secret-file", str(key), "--wait",
    )  # fmt: skip
    raw = build_guest_image().raw
    size_mib = raw.stat().st_size >> 20
    fleet.ok("volume", "create", "ceph-root", "--pool", "ceph", "--size", f"{size_mib}MiB", "--wait")
    volume = fleet.ok("volume", "get", "ceph-root", "-o", "json").json()
    ceph.fill(fleet.lab.spec, volume["id"], raw)
    fleet.ok("vm", "create", "floater", "--volume", "ceph-root", "--memory", "96MiB", "--to", "node1", "--wait")
    vm = fleet.vm("floater")
    fleet.wait_for_ticks("floater", 1)
    fleet.ok("volume", "resize", "ceph-root", f"{size_mib + 16}MiB", "--wait")
    assert disk_mib(fleet.lab, "node1", vm["id"], volume["id"][-20:]) == size_mib + 16

    fleet.ok(
        "backup", "repo", "create", "ceph", "--url", "file:///srv/trimtab-shared/of-ceph", "--key-file", str(tmp_path / "repo")
    )
    full = fleet.ok("backup", "run", "floater", "--repo", "ceph", "-o", "json").json()
    guest_says(fleet.lab, "node1", vm["id"], f"echo {MARKER} >/data/marker; sync; cat /data/marker")
    increment = fleet.ok("backup", "run", "floater", "--repo", "ceph", "-o", "json").json()
    assert (increment["base_id"], increment["full_reason"]) == (full["id"], ""), increment
    assert 0 < increment["read_bytes"] < full["read_bytes"] // 4, (increment, full)

    counted, uptime = fleet.ticks("floater")
    fleet.ok("vm", "migrate", "floater", "--to", "node2", "--wait")
    _later, later_uptime = fleet.wait_for_ticks("floater", counted + 2)
    assert later_uptime > uptime, "the guest went on, it was not started anew"
    moved = fleet.ok("backup", "run", "floater", "--repo", "ceph", "-o", "json").json()
    assert "QEMU has begun anew" in moved["full_reason"], moved
    assert hosts_that_show(fleet, cluster.key) == []
    pool = fleet.ok("pool", "get", "ceph", "-o", "json").json()
    assert {one["host"]: one["state"] for one in pool["hosts"]} == {"node1": "ready", "node2": "ready", "node3": "ready"}

    fleet.ok("vm", "stop", "floater", "--force", "--wait")
    stopped = fleet.ok("backup", "run", "floater", "--repo", "ceph", "-o", "json").json()
    assert (stopped["consistency"], "does not run" in stopped["full_reason"]) == ("filesystem", True), stopped
    fleet.ok("backup", "restore", stopped["id"], "--as", "floater2", "--to", "node3", "--instant")
    again = fleet.vm("floater2")
    wait_until(
        lambda: guest_says(fleet.lab, "node3", again["id"], "cat /data/marker") == MARKER, "what was backed up to be there"
    )
    fleet.delete("floater2")
    is_written_anew_from_a_backup(fleet, increment["id"])
    goes_back_to_a_snapshot(fleet)
    fleet.delete("floater")


def is_written_anew_from_a_backup(fleet: Fleet, backup_id: str) -> None:
    """In place: another image, full of what the backup holds, takes the place of the old one, which goes."""
    fleet.ok("backup", "restore", backup_id, "--replace", "floater", "--yes")
    fleet.ok("vm", "start", "floater", "--wait")
    wait_until(lambda: says(fleet, "cat /data/marker") == MARKER, "what was backed up to be there")
    (image,) = json.loads(ceph.ask(fleet.lab.spec, ["rbd", "ls", "--format", "json", ceph.POOL]))
    assert image == fleet.ok("volume", "get", "ceph-root", "-o", "json").json()["id"]


def goes_back_to_a_snapshot(fleet: Fleet) -> None:
    image = f"{ceph.POOL}/{fleet.ok('volume', 'get', 'ceph-root', '-o', 'json').json()['id']}"
    fleet.ok("vm", "snapshot", "create", "floater", "before", "--wait")
    kept = fleet.ok("vm", "snapshot", "get", "floater", "before", "-o", "json").json()
    assert (kept["state"], kept["consistency"]) == ("ready", "filesystem"), kept
    assert says(fleet, "echo lost >/data/marker; sync; cat /data/marker") == "lost"
    fleet.ok("vm", "snapshot", "revert", "floater", "before", "--yes", "--wait")
    wait_until(lambda: says(fleet, "cat /data/marker") == MARKER, "what was kept to be there")
    fleet.ok("vm", "snapshot", "delete", "floater", "before", "--yes", "--wait")
    assert json.loads(ceph.ask(fleet.lab.spec, ["rbd", "snap", "ls", "--format", "json", image])) == []
    assert says(fleet, "sync; cat /data/marker") == MARKER, "the guest goes on"


def says(fleet: Fleet, script: str) -> str:
    vm = fleet.vm("floater")
    return guest_says(fleet.lab, vm["host"], vm["id"], script)
