"""What brings guests back, through the whole stack: a linked clone that leaves its host's disk, keys that change, a host that is lost with
its disks, and a plan that restores groups in their order from repository and key alone. One guest counts on through all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

URL = "file:///srv/trimtab-shared/backup-site"
LOCAL = "/srv/trimtab-local/volumes"


@dataclass(slots=True)
class Site:
    """A repository, and the file with the key that opens it now."""

    fleet: Fleet
    folder: Path
    key_file: Path

    def back_up(self, name: str) -> dict[str, Any]:
        return dict(self.fleet.ok("backup", "run", name, "--repo", "site", "-o", "json").json())

    def open_again(self, key_file: Path) -> None:
        """Take the repository in from where it lies, as a fleet that never saw it."""
        self.fleet.ok("backup", "repo", "create", "site", "--url", URL, "--existing", "--key-file", str(key_file))
        self.fleet.ok("backup", "repo", "rebuild", "site")


@pytest.fixture(scope="module")
def site(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The repository, and two guests on node1's own disk: `origin`, and its linked clone `twin`."""
    made = Site(fleet, folder := tmp_path_factory.mktemp("site"), folder / "first.key")
    fleet.ok("backup", "repo", "create", "site", "--url", URL, "--key-file", str(made.key_file))
    kept = ("--ha", "restart", "--pool", "local", "--to", "node1")
    fleet.ok("vm", "create", "origin", "--image", "micro", "--memory", "96MiB", "--network", "default", *kept, "--wait")
    fleet.wait_for_ticks("origin", 2)
    fleet.ok("vm", "clone", "origin", "twin", "--linked")
    yield made
    fleet.delete("twin", "origin")
    fleet.ok("backup", "repo", "delete", "site", "--yes")


def test_a_linked_clone_leaves_its_hosts_disk_while_it_counts_and_its_increments_go_on(site: Site) -> None:
    fleet = site.fleet
    fleet.wait_for_ticks("twin", 2)
    full = site.back_up("twin")
    assert full["full_reason"] == "vda: first backup"
    refused = fleet.trimtab("vm", "migrate", "origin", "--to", "node2")
    assert (refused.code, "trimtab vm migrate twin" in refused.err) == (5, True), refused
    counted, uptime = fleet.ticks("twin")
    fleet.ok("vm", "migrate", "twin", "--to", "node2", "--wait")
    twin = fleet.vm("twin")
    volume = twin["volumes"][0]["id"]
    assert fleet.runs_on(twin["id"]) == ["node2"]
    assert fleet.files_of(volume) == [f"node2:{LOCAL}/{volume}.qcow2"], "nothing of it stayed behind"
    assert "backing" not in fleet.sh("node2", f"qemu-img info -U -f qcow2 {LOCAL}/{volume}.qcow2"), "it stands by itself"
    later, later_uptime = fleet.wait_for_ticks("twin", counted + 3)
    assert later_uptime > uptime, "it went on, it was not started anew"

    # What changed is known across the move, off and running: read are the changes alone, and what is restored is the disk, byte for byte.
    fleet.ok("vm", "stop", "twin", "--wait")
    at_rest = site.back_up("twin")
    assert (at_rest["base_id"], at_rest["full_reason"]) == (full["id"], ""), at_rest
    assert at_rest["read_bytes"] < full["read_bytes"] // 2, (at_rest, full)
    fleet.ok("backup", "restore-volume", at_rest["id"], "vda", "--as", "same", "--pool", "shared")
    same = fleet.ok("volume", "get", "same", "-o", "json").json()["id"]
    compared = f"qemu-img compare -f qcow2 -F qcow2 {LOCAL}/{volume}.qcow2 /srv/trimtab-shared/volumes/{same}.qcow2"
    assert "identical" in fleet.sh("node2", compared)
    fleet.ok("volume", "delete", "same", "--yes")
    fleet.ok("vm", "start", "twin", "--wait")
    fleet.wait_for_ticks("twin", later)
    moved = site.back_up("twin")
    assert (moved["base_id"], moved["full_reason"]) == (at_rest["id"], ""), moved
    assert moved["read_bytes"] < full["read_bytes"] // 2, (moved, full)

    # The base is nobody's base any more and moves as well.
    wait_until(lambda: fleet.trimtab("vm", "migrate", "origin", "--to", "node3", "--wait").code == 0, "the base to be let go")
    assert fleet.runs_on(fleet.vm("origin")["id"]) == ["node3"]


def test_a_key_that_was_changed_opens_old_and_new_backups_and_the_former_one_opens_nothing(site: Site) -> None:
    fleet, former = site.fleet, site.key_file
    before = {one["id"] for one in fleet.ok("backup", "list", "--vm", "twin", "-o", "json").json()}
    site.key_file = site.folder / "second.key"
    fleet.ok("backup", "repo", "rotate-key", "site", "--key-file", str(site.key_file))
    after = site.back_up("twin")
    assert after["full_reason"] == "", "what changed since a backup under the former key is enough"
    for backup_id in (min(before), after["id"]):
        assert fleet.ok("backup", "verify", backup_id, "-o", "json").json()["level"] == "L1"
    fleet.ok("backup", "repo", "delete", "site", "--yes")
    refused = fleet.trimtab("backup", "repo", "create", "site", "--url", URL, "--existing", "--key-file", str(former))
    assert refused.code != 0, refused
    assert "key" in refused.err + refused.out, refused
    fleet.trimtab("backup", "repo", "delete", "site", "--yes")
    site.open_again(site.key_file)
    assert {one["id"] for one in fleet.ok("backup", "list", "--vm", "twin", "-o", "json").json()} == before | {after["id"]}


def test_a_guest_whose_disks_are_lost_with_its_host_comes_back_from_its_backup_and_counts_on(site: Site) -> None:
    fleet = site.fleet
    fleet.ok("backup", "policy", "create", "lossless", "--schedule", "0 2 * * *", "--repo", "site", "--recover-lost")
    fleet.ok("vm", "update", "twin", "--backup-policy", "lossless")
    counted, _uptime = fleet.ticks("twin")
    site.back_up("twin")
    twin, home = fleet.vm("twin"), fleet.vm("twin")["host"]
    fleet.lab.crash(home)
    fleet.wait_for_host(home, "lost")
    fleet.ok("host", "confirm-off", home, "--reason", "the lab cut its power", "--yes")
    wait_until(lambda: fleet.vm("twin")["host"] not in ("", home), "the guest to be elsewhere")
    there = fleet.vm("twin")["host"]
    wait_until(lambda: fleet.runs_on(twin["id"]) == [there], "the guest to run")
    assert fleet.wait_for_ticks("twin", counted)[1] < 300, "it was started anew from what its backup held"
    assert "of it are lost" in fleet.ok("failover", "get", home).out, "what is lost is told"
    fleet.lab.boot(home)
    fleet.wait_for_host(home)
    wait_until(lambda: fleet.hosts_that_define(twin["id"]) == [there], "what it left behind to be put away")
    assert fleet.runs_on(twin["id"]) == [there], "the host that came back started nothing"
    fleet.ok("vm", "update", "twin", "--backup-policy", "")
    fleet.ok("backup", "policy", "delete", "lossless", "--yes")
    for volume in fleet.ok("volume", "list", "-o", "json").json():
        if "-lost-" in volume["name"]:
            fleet.ok("volume", "delete", volume["name"], "--yes")


def test_a_plan_brings_groups_back_in_their_order_from_repository_and_key_alone(site: Site) -> None:
    fleet = site.fleet
    counted = {name: fleet.ticks(name)[0] for name in ("twin", "origin")}
    for name in counted:
        site.back_up(name)
    fleet.delete("twin", "origin")
    fleet.ok("backup", "repo", "delete", "site", "--yes")
    site.open_again(site.key_file)
    fleet.ok("recovery", "plan", "create", "site", "--group", "data=twin", "--group", "front=origin", "--repo", "site")
    told = fleet.ok("recovery", "plan", "run", "site", "--mode", "real", "--dry-run").out
    assert all(name in told for name in counted)
    ran = fleet.ok("recovery", "plan", "run", "site", "--mode", "real", "--yes", "--wait").out
    assert "2 vms came back" in ran
    for name, number in counted.items():
        fleet.wait_for_ticks(name, number)
        assert len(fleet.runs_on(fleet.vm(name)["id"])) == 1
    began = {
        one["subject"]["name"]: one["created_at"]
        for one in fleet.ok("op", "list", "--filter", "kind=vm.restore", "-o", "json").json()
    }
    assert began["twin"] < began["origin"], "a group begins once the one before is back"
    fleet.ok("recovery", "plan", "delete", "site", "--yes")
    assert {fleet.vm(name)["host"] for name in counted} <= set(HOSTS)
