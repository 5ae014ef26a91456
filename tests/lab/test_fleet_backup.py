"""Backups of real guests through the whole stack: increments after a move and a stop, a lost vm back on another host, counting on."""

import hashlib
import json
import signal
import subprocess
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
    vm = fleet.create("safe", pool="local")
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

    proves_and_takes_back(fleet, after["id"])

    is_read_out_as_a_file(fleet, after["id"], tmp_path)
    runs_at_once_and_is_filled(fleet, after["id"], counted)

    # From the repository and its key alone.
    fleet.ok("backup", "repo", "delete", "main", "--yes")
    assert fleet.ok("backup", "list", "-o", "json").json() == []
    fleet.ok("backup", "repo", "create", "found", "--url", URL, "--existing", "--key-file", str(key_file))
    fleet.ok("backup", "repo", "rebuild", "found")
    listed = {one["id"] for one in fleet.ok("backup", "list", "-o", "json").json()}
    assert listed == {full["id"], increment["id"], stopped["id"], after["id"]}
    fleet.delete("safe2")


def proves_and_takes_back(fleet: Fleet, backup_id: str) -> None:
    """Boot tests, also one that ends in the middle, leave nothing; one disk comes back; the vm itself goes back to its backup."""
    before = {host: fleet.domains_of(host) for host in HOSTS}
    files = {host: volume_files(fleet, host) for host in HOSTS}
    for criterion in ((), ("--boot-pattern", r"tick \d+ uptime", "--boot-tcp", "7")):
        proven = fleet.ok("backup", "verify", backup_id, "--boot", *criterion, "-o", "json").json()
        assert (proven["level"], proven["problem"]) == ("L3", ""), proven
        assert 0 < proven["recovery_ms"] < 300_000, proven
    proves_though_its_agent_dies(fleet, backup_id, before)
    assert {host: fleet.domains_of(host) for host in HOSTS} == before
    assert {host: volume_files(fleet, host) for host in HOSTS} == files
    cut_short = fleet.begin("backup", "verify", backup_id, "--boot", "--boot-pattern", "never", "--boot-timeout", "10m")
    wait_until(lambda: any(fleet.domains_of(host) != before[host] for host in HOSTS), "the copy to be defined")
    fleet.ok("op", "cancel", cut_short)
    assert fleet.end_of(cut_short)["state"] == "cancelled"
    assert {host: fleet.domains_of(host) for host in HOSTS} == before
    assert {host: volume_files(fleet, host) for host in HOSTS} == files

    fleet.ok("backup", "restore-volume", backup_id, "vda", "--as", "one-disk", "--pool", "shared")
    volume = fleet.ok("volume", "get", "one-disk", "-o", "json").json()
    assert volume["size_bytes"] == fleet.vm("safe2")["volumes"][0]["size_bytes"]
    fleet.ok("volume", "delete", "one-disk", "--yes")

    own = run(fleet, "safe2")
    fleet.wait_for_ticks("safe2", fleet.ticks("safe2")[0] + 3)
    fleet.ok("vm", "stop", "safe2", "--force", "--wait")
    fleet.ok("backup", "restore", own["id"], "--replace", "safe2", "--yes")
    fleet.ok("vm", "start", "safe2", "--wait")
    assert fleet.wait_for_ticks("safe2", 1)
    fleet.ok("backup", "delete", own["id"], "--yes")


def proves_though_its_agent_dies(fleet: Fleet, backup_id: str, before: dict[str, str]) -> None:
    """The guest of a boot test is on no network; `kill -9` of the agent that stands at its cards' other ends leaves the test to go on."""
    links = {host: fleet.sh(host, "ls /sys/class/net") for host in HOSTS}
    begun = fleet.begin("backup", "verify", backup_id, "--boot", "--boot-tcp", "7")
    home = wait_until(
        lambda: next((host for host in HOSTS if fleet.domains_of(host) != before[host]), ""), "the copy to be defined"
    )
    fleet.lab.signal_service(home, "trimtab-agent", signal.SIGKILL)
    wait_until(lambda: "trimtab-" in fleet.sh(home, "virsh list --name"), "the copy to run")
    assert fleet.sh(home, "ls /sys/class/net") == links[home], "no interface of the host belongs to it"
    ended = fleet.end_of(begun)
    assert (ended["state"], (ended["result"] or {}).get("problem")) == ("done", ""), ended
    proven = fleet.ok("backup", "get", backup_id, "-o", "json").json()
    assert (proven["level"], proven["problem"]) == ("L3", ""), proven


def is_read_out_as_a_file(fleet: Fleet, backup_id: str, folder: Path) -> None:
    whole, cut = folder / "out.qcow2", folder / "out.raw"
    told = fleet.ok("backup", "export", backup_id, str(whole)).out
    assert told.split()[0] == hashlib.sha256(whole.read_bytes()).hexdigest()
    # A run that broke off is gone on with: the piece that it has stays, what was cut is asked for again.
    fleet.ok("backup", "export", backup_id, str(cut))
    begun = cut.with_name(f"{cut.name}.{backup_id}-first.part")
    begun.write_bytes(cut.read_bytes()[: (1 << 20) + 5])
    first = cut.read_bytes()
    cut.unlink()
    fleet.ok("backup", "export", backup_id, str(cut))
    assert cut.read_bytes() == first
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(whole)], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(whole), str(cut)], check=True)


def runs_at_once_and_is_filled(fleet: Fleet, backup_id: str, counted: int) -> None:
    """A guest runs on the backup through the deaths of everything, itself included; what is refused says why; then it stands alone."""
    home = HOSTS[2]
    options = ("--as", "fast", "--to", home, "--pool", "local=shared", "--instant", "--bandwidth", "1")
    fleet.ok("backup", "restore", backup_id, *options)
    vm = fleet.vm("fast")
    assert vm["host"] == home
    [ran] = [one for one in fleet.ok("op", "list", "--filter", "kind=vm.restore", "-o", "json").json() if subject_is(one, "fast")]
    print(f"instant restore: accepted {ran['created_at']}, running {ran['ended_at']}")  # noqa: T201 - a figure, shown by -rP
    [fill] = [
        one for one in fleet.ok("op", "list", "--filter", "kind=vm.fill", "-o", "json").json() if one["subject"]["name"] == "fast"
    ]
    refused = fleet.trimtab("vm", "migrate", "fast", "--wait")
    assert (refused.code, "vm-filling" in refused.err) == (5, True), refused

    # However long the guest takes to boot, the fill is not over before that.
    domain = f"trimtab-{vm['id']}"
    wait_until(lambda: fills(fleet, home, domain), "the fill to begin")
    fills_at(fleet, home, domain, 16 << 10)
    # What its firmware and its boot loader read comes in bursts, seconds apart: they wait for it.
    serves = "-f '[b]ackup.export.process'"
    fleet.sh(home, f"for burst in 1 2 3 4 5 6; do pkill -STOP {serves}; sleep 2; pkill -CONT {serves}; sleep 0.2; done")

    # The agent dies, and the process that serves the backup with it: QEMU waits until another serves it.
    before, _uptime = fleet.wait_for_ticks("fast", 1)
    fleet.sh(home, "pkill -KILL -f '[b]ackup.export.process'")
    fleet.lab.signal_service(home, "trimtab-agent", signal.SIGKILL)
    wait_until(lambda: fleet.trimtab("vm", "console", "fast", "--log").code == 0, "the agent to answer again")
    fleet.wait_for_ticks("fast", before + 20)
    fills_at(fleet, home, domain, 1 << 20)
    # The guest dies in the middle.
    fleet.ok("vm", "stop", "fast", "--force", "--wait")
    fleet.ok("vm", "start", "fast", "--wait")
    fleet.wait_for_ticks("fast", counted)
    ended = fleet.end_of(fill["id"])
    assert ended["state"] == "done", ended
    wait_until(lambda: "export.process" not in fleet.sh(home, "ps -eo args"), "the export to end")
    chain = fleet.sh(home, f"qemu-img info -U --output=json /srv/trimtab-shared/volumes/{vm['volumes'][0]['id']}.qcow2")
    assert "backing-filename" not in chain
    fleet.ok("vm", "migrate", "fast", "--wait")
    is_kept_while_its_host_knows(fleet, "fast")
    fleet.delete("fast")


def monitor(fleet: Fleet, host: str, domain: str, command: str, **arguments: object) -> Any:
    """Ask QEMU itself; None where it does not answer."""
    text = json.dumps({"execute": command, "arguments": arguments})
    said = fleet.sh(host, f"virsh qemu-monitor-command {domain} '{text}' 2>/dev/null", check=False)
    return json.loads(said).get("return") if said.strip() else None


def fills(fleet: Fleet, host: str, domain: str) -> list[str]:
    """Return the jobs that copy a backup into this guest's disks now."""
    return [
        job["device"] for job in monitor(fleet, host, domain, "query-block-jobs") or [] if job["device"].startswith("fill-vol-")
    ]


def fills_at(fleet: Fleet, host: str, domain: str, bytes_s: int) -> None:
    for job in fills(fleet, host, domain):
        monitor(fleet, host, domain, "block-job-set-speed", device=job, speed=bytes_s)


def is_kept_while_its_host_knows(fleet: Fleet, name: str) -> None:
    """What a running guest's domain says to its host's warden, live and stored, follows `--ha`; the guest counts on."""
    vm, (counted, uptime) = fleet.vm(name), fleet.wait_for_ticks(name, 1)
    for ha, is_told in (("restart", True), ("none", False)):
        fleet.ok("vm", "update", name, "--ha", ha, "--priority", "5")
        assert (fleet.vm(name)["ha"], fleet.vm(name)["priority"]) == (ha, 5)
        for stored in ("", "--inactive"):
            definition = fleet.sh(vm["host"], f"virsh dumpxml {stored} trimtab-{vm['id']}")
            assert ("restarts='elsewhere'" in definition.replace('"', "'")) == is_told, (ha, stored)
    assert fleet.wait_for_ticks(name, counted + 2)[1] > uptime, "it was not started anew"


def subject_is(operation: dict[str, Any], name: str) -> bool:
    return bool(operation["subject"]["name"] == name)


def volume_files(fleet: Fleet, host: str) -> set[str]:
    """Return the volumes' files on both pools as one host sees them."""
    return set(fleet.sh(host, "ls /srv/trimtab-shared/volumes /srv/trimtab-local/volumes").splitlines())


def agent_answers(vm_id: str) -> str:
    return f'virsh qemu-agent-command trimtab-{vm_id} \'{{"execute":"guest-ping"}}\' >/dev/null && echo true'
