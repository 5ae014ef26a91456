"""Backups of real guests through the whole stack: increments after a move and a stop, a lost vm back on another host, counting on."""

from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

URL = "file:///srv/trimtab-shared/backup"


def run(fleet: Fleet, name: str) -> dict[str, Any]:
    return dict(fleet.ok("backup", "run", name, "-o", "json").json())


def test_a_lost_vm_comes_back_on_another_host_from_its_last_increment(fleet: Fleet, tmp_path: Path) -> None:
    key_file = tmp_path / "main.key"
    fleet.ok("backup", "repo", "create", "main", "--url", URL, "--key-file", str(key_file))
    vm = fleet.create("safe", pool="local", index=71)
    fleet.wait_for_ticks("safe", 2)
    wait_until(lambda: "true" in fleet.sh(vm["host"], agent_answers(vm["id"]), check=False), "the guest agent")

    full = run(fleet, "safe")
    assert (full["state"], full["consistency"]) == ("ready", "filesystem"), full
    assert full["full_reason"] == "vda: first backup"
    fleet.wait_for_ticks("safe", fleet.ticks("safe")[0] + 2)
    increment = run(fleet, "safe")
    assert (increment["base_id"], increment["full_reason"]) == (full["id"], ""), increment
    assert increment["read_bytes"] < full["read_bytes"] // 4, (increment, full)

    fleet.ok("vm", "stop", "safe", "--wait")
    stopped = run(fleet, "safe")
    assert (stopped["base_id"], stopped["full_reason"]) == (increment["id"], ""), stopped
    fleet.ok("vm", "start", "safe", "--wait")
    counted, _ = fleet.wait_for_ticks("safe", 1)
    after = run(fleet, "safe")
    assert (after["base_id"], after["full_reason"]) == (stopped["id"], ""), after
    verified = fleet.ok("backup", "verify", after["id"], "-o", "json").json()
    assert (verified["state"], verified["level"]) == ("ready", "L1"), verified

    home = fleet.vm("safe")["host"]
    elsewhere = next(host for host in HOSTS if host != home)
    fleet.delete("safe")
    fleet.ok("backup", "restore", after["id"], "--as", "safe2", "--to", elsewhere)
    again = fleet.vm("safe2")
    assert (again["host"], fleet.runs_on(again["id"])) == (elsewhere, [elsewhere])
    assert again["nics"][0]["mac"] != vm["nics"][0]["mac"]
    fleet.wait_for_ticks("safe2", counted)

    # From the repository and its key alone.
    fleet.ok("backup", "repo", "delete", "main", "--yes")
    assert fleet.ok("backup", "list", "-o", "json").json() == []
    fleet.ok("backup", "repo", "create", "found", "--url", URL, "--existing", "--key-file", str(key_file))
    fleet.ok("backup", "repo", "rebuild", "found")
    listed = {one["id"] for one in fleet.ok("backup", "list", "-o", "json").json()}
    assert listed == {full["id"], increment["id"], stopped["id"], after["id"]}
    fleet.delete("safe2")


def agent_answers(vm_id: str) -> str:
    return f'virsh qemu-agent-command trimtab-{vm_id} \'{{"execute":"guest-ping"}}\' >/dev/null && echo true'
