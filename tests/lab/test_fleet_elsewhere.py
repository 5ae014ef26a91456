"""A site comes back on another fleet: its own control plane, database and hosts, with pools and networks of other names. All that it has
of the first is a copy of the repository, its key and the id of the fleet that is gone."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import TICK, Fleet, Ran, fleet_settings, wait_until
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(1200)]

URL = "file:///srv/trimtab-shared/backup-shop"
HOST = "node1"
"""The other fleet's only one."""


@dataclass(slots=True)
class Shop:
    """The project of that name on one fleet."""

    fleet: Fleet

    def trimtab(self, *arguments: str) -> Ran:
        return self.fleet.trimtab(*arguments, "--project", "shop")

    def ok(self, *arguments: str) -> Ran:
        return self.fleet.ok(*arguments, "--project", "shop")

    def ticks(self, name: str) -> int:
        return max((int(number) for number, _uptime in TICK.findall(self.ok("vm", "console", name, "--log").out)), default=0)

    def wait_for_ticks(self, name: str, at_least: int) -> int:
        return wait_until(lambda: seen if (seen := self.ticks(name)) >= at_least else None, f"{name} to count to {at_least}")

    def vm(self, name: str) -> dict[str, Any]:
        return dict(self.ok("vm", "get", name, "-o", "json").json())

    def preview(self) -> str:
        return self.ok("recovery", "plan", "run", "site", "--mode", "real", "--dry-run").out


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Another fleet that has never heard of the first."""
    lab = Lab.named("elsewhere", state_directory=tmp_path_factory.mktemp("elsewhere"))
    try:
        lab.up(hosts=1)
        plane = ControlPlane(lab, settings=fleet_settings(lab))
        plane.start()
        plane.join_hosts()
        made = Fleet(lab, plane)
        made.wait_for_host(HOST)
        made.ok("pool", "create", "vault", "--path", "/srv/trimtab-local", "--default")
        yield made
    finally:
        lab.down()


def test_a_site_comes_back_on_another_fleet_group_by_group_and_counts_on(fleet: Fleet, elsewhere: Fleet, tmp_path: Path) -> None:
    key_file, here = tmp_path / "shop.key", Shop(fleet)
    counted = back_up_a_shop(here, key_file)
    shutil.copytree(fleet.lab.spec.shared_mount / "backup-shop", elsewhere.lab.spec.shared_mount / "backup-shop")

    there = Shop(elsewhere)
    takes_the_repository_over(elsewhere, key_file)
    misspelt = there.trimtab("recovery", "plan", "import", "sight", "--repo", "found")
    assert (misspelt.code != 0, "they know site" in misspelt.err) == (True, True), misspelt

    # Nothing of the first fleet's names is here: what lacks a counterpart is told before anything begins, and stops a run.
    there.ok("recovery", "plan", "import", "site", "--repo", "found")
    assert "--pool local=" in there.preview()
    there.ok("recovery", "plan", "delete", "site", "--yes")
    there.ok("recovery", "plan", "import", "site", "--repo", "found", "--pool", "local=vault")
    assert "--network lan=" in there.preview()
    stopped = there.ok("recovery", "plan", "run", "site", "--mode", "real", "--yes", "--wait").out
    assert ("stopped" in stopped, "--network lan=" in stopped) == (True, True), stopped
    assert there.ok("vm", "list", "-o", "json").json() == []

    there.ok("network", "create", "yard", "--bridge", "br-guest")
    there.ok("recovery", "plan", "delete", "site", "--yes")
    there.ok("recovery", "plan", "import", "site", "--repo", "found", "--pool", "local=vault", "--network", "lan=yard")
    shown = there.preview()
    assert all(name in shown for name in counted), shown

    # Each guest is asked at its port first, on no network; then they come back for good.
    tested = there.ok("recovery", "plan", "run", "site", "--yes", "--wait").out
    assert "2 vms came back" in tested, tested
    assert there.ok("vm", "list", "-o", "json").json() == [], "a test leaves nothing"
    levels = {one["level"] for one in there.ok("backup", "list", "-o", "json").json()}
    assert levels == {"L3"}, levels
    ran = there.ok("recovery", "plan", "run", "site", "--mode", "real", "--yes", "--wait").out
    assert "2 vms came back" in ran, ran
    for name, number in counted.items():
        there.wait_for_ticks(name, number)
        vm = there.vm(name)
        assert (vm["host"], [one["network"] for one in vm["nics"]]) == (HOST, ["yard"])
        assert {one["pool"] for one in vm["volumes"]} == {"vault"}
        assert f"trimtab-{vm['id']}" in elsewhere.sh(HOST, "virsh list --name"), "asked of libvirt and not of Trimtab"
    restores = there.ok("op", "list", "--filter", "kind=vm.restore", "-o", "json").json()
    began = {one["subject"]["name"]: one for one in restores}
    assert began["ledger"]["ended_at"] <= began["counter"]["created_at"], "a group begins once the one before is back"
    for name in counted:
        there.ok("vm", "delete", name, "--yes", "--wait")


def back_up_a_shop(here: Shop, key_file: Path) -> dict[str, int]:
    """Make two guests, a plan for them and their backups on the first fleet, and lose all but the repository; return their counters."""
    fleet, counted = here.fleet, {}
    fleet.ok("project", "create", "shop")
    fleet.ok("backup", "repo", "create", "shop", "--url", URL, "--key-file", str(key_file))
    here.ok("image", "import", "micro-shop", str(build_guest_image().qcow2), "--pool", "shared", "--wait")
    here.ok("network", "create", "lan", "--bridge", "br-guest")
    for name in ("ledger", "counter"):
        wishes = ("--memory", "96MiB", "--pool", "local", "--network", "lan")
        here.ok("vm", "create", name, "--image", "micro-shop", *wishes, "--wait")
    here.ok(
        "recovery", "plan", "create", "site", "--group", "data=ledger", "--group", "front=counter", "--repo", "shop", "--awaits",
        "agent", "--tcp", "7",
    )  # fmt: skip
    for name in ("ledger", "counter"):
        counted[name] = here.wait_for_ticks(name, 2)
        here.ok("backup", "run", name, "--repo", "shop")
        here.ok("vm", "delete", name, "--yes", "--wait")
    here.ok("recovery", "plan", "delete", "site", "--yes")
    fleet.ok("backup", "repo", "delete", "shop", "--yes")
    return counted


def takes_the_repository_over(elsewhere: Fleet, key_file: Path) -> None:
    """With the key alone the repository is another fleet's, which has to be named as gone; its backups find their project by its name."""
    found = ("backup", "repo", "create", "found", "--url", URL, "--existing", "--key-file", str(key_file))
    refused = elsewhere.trimtab(*found)
    gone = re.search(r"fleet-[0-9a-z]+", refused.err)
    assert refused.code != 0, refused
    assert gone is not None, refused
    elsewhere.trimtab("backup", "repo", "delete", "found", "--yes")
    elsewhere.ok(*found, "--fleet-id", gone.group(0))
    elsewhere.ok("project", "create", "shop")
    elsewhere.ok("backup", "repo", "rebuild", "found")
    listed = Shop(elsewhere).ok("backup", "list", "-o", "json").json()
    assert sorted(one["vm"] for one in listed) == ["counter", "ledger"], listed
