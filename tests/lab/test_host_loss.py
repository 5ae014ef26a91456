"""A host is lost with real guests on it: each counts on elsewhere, and at any time one QEMU wrote. By lease alone: no power device.

The disks are lock-free, so a second run would be seen in their server's log. One lab; each test leaves every host up and armed.
"""

import itertools
import os
import random
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.guest_view import guest_says
from tests.lab.host_faults import Hands, Must, all_faults
from tests.lab.host_loss_kit import LossFleet, boottime_s
from trimtab_lab.commands import own_programs
from trimtab_lab.demo import Demo
from trimtab_lab.demo_backup import show_backup
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices

HEARTBEAT_S = 3.0
URL = "file:///srv/trimtab-shared/backup-kept"
VOLUMES = "/srv/trimtab-shared/volumes"
LONGEST_GAP_S = 5.0
"""Between two lines of a guest that counts each second, on a busy machine; a guest that was started anew is silent for longer."""

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossFleet]:
    lab = Lab.named(f"loss-{os.getpid()}", state_directory=tmp_path_factory.mktemp("loss"))
    try:
        yield kit.build(lab)
    finally:
        lab.down()


@pytest.fixture(scope="module")
def kept(losses: LossFleet) -> str:
    """A vm that is kept; where it lives changes with every test."""
    return losses.keep("kept", to="node1")


@pytest.fixture(scope="module")
def devices(losses: LossFleet) -> Iterator[PowerDevices]:
    made = PowerDevices(losses.lab)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def comes_back_elsewhere(losses: LossFleet, vm_id: str, home: str, at_s: float) -> None:
    """Wait for the vm elsewhere and check that its former home had stopped writing before. The seconds are a benchmark's matter."""
    first = losses.first_elsewhere(vm_id, home, at_s)
    assert losses.double_runs() == []
    assert losses.overlap(vm_id, home, first) == ""
    former = [each for each in losses.writes(vm_id) if each.host == home and each.at_s < first.at_s]
    assert first.counter >= former[-1].counter, "what the guest had written before is there"
    assert first.epoch > former[-1].epoch


def test_a_kept_guest_counts_on_elsewhere_after_a_power_cut_and_one_that_is_not_kept_does_not(
    losses: LossFleet, kept: str, tmp_path: Path
) -> None:
    losses.keep("left", to="node1", ha="none")
    losses.ok("backup", "repo", "create", "kept", "--url", URL, "--key-file", str(tmp_path / "kept.key"))
    first, second = back_up(losses), back_up(losses)
    assert (second["base_id"], second["full_reason"]) == (first["id"], ""), second
    home, at_s = losses.home(kept), boottime_s()
    losses.lab.crash(home)
    comes_back_elsewhere(losses, kept, home, at_s)
    is_backed_up_as_it_came_back(losses, second)
    assert {each.host for each in losses.writes(str(losses.vm("left")["id"]))} == {"node1"}
    losses.lab.boot(home)
    losses.wait_until_armed()
    losses.delete("left")


def back_up(losses: LossFleet) -> dict[str, Any]:
    return dict(losses.ok("backup", "run", "kept", "--repo", "kept", "-o", "json").json())


def is_backed_up_as_it_came_back(losses: LossFleet, last: dict[str, Any]) -> None:
    """The QEMU that knew what had changed is lost with its host: the disk is read in full, and from then on as ever."""
    losses.ok("vm", "pause", "kept", "--wait")  # so that its disk is still what was backed up
    full = back_up(losses)
    assert full["base_id"] == last["id"], full
    assert "vda: this host does not know the checkpoint" in full["full_reason"], full
    losses.ok("backup", "restore-volume", full["id"], "vda", "--as", "same", "--pool", "shared")
    own, same = losses.vm("kept")["volumes"][0]["id"], losses.ok("volume", "get", "same", "-o", "json").json()["id"]
    compared = f"qemu-img compare -U -f qcow2 -F qcow2 {VOLUMES}/{own}.qcow2 {VOLUMES}/{same}.qcow2"
    assert "identical" in losses.sh(str(losses.vm("kept")["host"]), compared)
    losses.ok("volume", "delete", "same", "--yes")
    losses.ok("vm", "resume", "kept", "--wait")
    next_one = back_up(losses)
    assert (next_one["base_id"], next_one["full_reason"]) == (full["id"], ""), next_one
    losses.ok("backup", "repo", "delete", "kept", "--yes")


def test_the_warden_of_a_host_that_was_cut_off_kills_what_may_start_elsewhere_and_nothing_else(
    losses: LossFleet, kept: str
) -> None:
    home = losses.home(kept)
    local = losses.keep("local", to=home, pool="local")
    unkept = losses.keep("unkept", to=home, ha="none")
    at_s = boottime_s()
    losses.lab.cut(home)
    comes_back_elsewhere(losses, kept, home, at_s)
    last = [each for each in losses.writes(kept) if each.host == home][-1]
    assert last.at_s - at_s <= kit.LEASE_S + kit.KILL_S
    moved_s = boottime_s()
    for spared in (local, unkept):
        wait_until(lambda vm_id=spared: losses.writes(vm_id)[-1].at_s > moved_s, f"{spared} to count on where it is")
    losses.lab.heal(home)
    losses.wait_until_armed()
    assert losses.runs_on(kept) == [losses.home(kept)], "the host that came back started nothing"
    wait_until(
        lambda: "killed" in losses.lab.run(home, ["cat", "/var/log/trimtab/trimtab-agent.log"]).stdout, "the agent to report it"
    )
    losses.delete("local", "unkept")


@pytest.mark.soak
def test_a_frozen_agent_does_not_keep_the_warden_from_its_work(losses: LossFleet, kept: str) -> None:
    home, at_s = losses.home(kept), boottime_s()
    losses.lab.freeze(home)
    try:
        comes_back_elsewhere(losses, kept, home, at_s)
    finally:
        losses.lab.thaw(home)
    losses.wait_until_armed()
    assert losses.double_runs() == []


def test_with_agent_and_warden_both_frozen_the_warden_is_started_anew_and_does_its_work(losses: LossFleet, kept: str) -> None:
    home, at_s = losses.home(kept), boottime_s()
    frozen = losses.lab.signal_service(home, "trimtab-warden", signal.SIGSTOP)
    losses.lab.freeze(home)
    try:
        comes_back_elsewhere(losses, kept, home, at_s)
        assert losses.lab.service_process_id(home, "trimtab-warden") != frozen
    finally:
        losses.lab.thaw(home)
    losses.wait_until_armed()


@pytest.mark.soak
def test_a_host_whose_warden_is_not_armed_is_never_recovered_by_lease_alone(losses: LossFleet, kept: str) -> None:
    home = losses.home(kept)
    losses.lab.run(home, ["systemctl", "stop", "trimtab-warden"])
    wait_until(lambda: losses.unarmed_hosts() == 1, "the host to say that its warden is not armed")
    at_s = boottime_s()
    losses.lab.cut(home)
    try:
        losses.wait_for_host(home, "lost")
        far_beyond_s = at_s + 2 * (kit.LEASE_S + kit.KILL_S)
        wait_until(lambda: losses.writes(kept)[-1].at_s > far_beyond_s, "the guest to count on where it is", patience_s=90)
        assert {each.host for each in losses.writes(kept) if each.at_s > at_s} == {home}
    finally:
        losses.lab.heal(home)
        losses.lab.run(home, ["systemctl", "start", "trimtab-warden"])
    losses.wait_until_armed()
    assert losses.double_runs() == []


def test_an_upgrade_of_agent_warden_and_libvirtd_under_a_guest_stops_neither_it_nor_its_hosts_lease(
    losses: LossFleet, kept: str
) -> None:
    home, at_s, at_unix_s = losses.home(kept), boottime_s(), time.time()
    services = ("trimtab-warden", "trimtab-agent", "libvirtd")
    before = {name: losses.lab.service_process_id(home, name) for name in services}
    qemu, boot = losses.qemu_process(kept, home), losses.writes(kept)[-1].boot
    said = losses.warden_log(home)
    ages_s: list[float] = []

    def is_seen(ask: Callable[[], bool]) -> bool:
        protection = losses.protection(home)
        ages_s.append(protection["lease_age_s"])
        assert protection["is_warden_armed"], protection
        return ask()

    def is_replaced(name: str) -> bool:
        return losses.lab.service_process_id(home, name) not in {None, before[name]}

    # In the order of docs/failover.md; libvirtd as its package's upgrade restarts it.
    for verb, name in (("reload", "trimtab-warden"), ("restart", "trimtab-agent"), ("restart", "libvirtd")):
        losses.lab.run(home, ["systemctl", verb, name])
        wait_until(lambda name=name: is_seen(lambda: is_replaced(name)), f"{name} to be another process", patience_s=30)
    replaced_s = boottime_s()
    wait_until(lambda: is_seen(lambda: boottime_s() > replaced_s + kit.LEASE_S + kit.KILL_S), "more than a lease to pass")
    seen = [each for each in losses.writes(kept) if each.at_s > at_s]
    assert {(each.host, each.boot) for each in seen} == {(home, boot)}
    gaps_s = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(seen)]
    assert max(gaps_s) < LONGEST_GAP_S, "its counter never stopped"
    assert [later.counter - earlier.counter for earlier, later in itertools.pairwise(seen)] == [1] * len(gaps_s)
    assert losses.qemu_process(kept, home) == qemu
    assert max(ages_s) < kit.LEASE_S - HEARTBEAT_S, (
        "a renewal was there before the lease had ended, and one more could have been lost"
    )
    assert losses.events("failover.", after_unix_s=at_unix_s) == []
    lines = losses.warden_log(home)[len(said) :]
    order = [line.split()[1:3] for line in lines if line.split()[2].rstrip(";") in {"guards", "leaves"}]
    former = next(line.split()[1] for line in reversed(said) if line.split()[2].rstrip(";") == "guards")
    assert [(who == former, what.rstrip(";")) for who, what in order] == [(False, "guards"), (True, "leaves")], (
        "the successor guarded before its predecessor left"
    )
    assert not [line for line in lines if "lease ended" in line or "silent" in line]
    # And the guest may be lost with its host as before.
    wait_until(lambda: losses.unarmed_hosts() == 0, "the host to say that it is armed")
    assert losses.double_runs() == []


@pytest.mark.soak
def test_a_guest_goes_on_with_its_qemu_after_another_was_installed_and_says_so_until_it_has_moved(
    losses: LossFleet, kept: str
) -> None:
    home, newer = losses.home(kept), "9.9.9 (Debian 1:9.9+dfsg-1)"
    qemu, boot = losses.qemu_process(kept, home), losses.writes(kept)[-1].boot
    assert losses.vm("kept")["observed"]["qemu"] == ""
    # The lab's hosts have a program of their own in QEMU's place; here it only says that it is a newer one.
    program = losses.lab.spec.host(home).init_directory / "bin" / "qemu-system-x86_64"
    before = program.read_text()
    first, rest = before.split("\n", 1)
    program.write_text(f"{first}\n[ \"$1\" != --version ] || {{ echo 'QEMU emulator version {newer}'; exit; }}\n{rest}")
    try:
        observed = wait_until(
            lambda: seen if (seen := losses.vm("kept")["observed"])["qemu"] else None,
            "the other QEMU to be told of",
            patience_s=90,
        )
        assert observed["installed_qemu"] == newer
        assert observed["qemu"][0].isdigit()
        assert f"runs {observed['qemu']}, its host has {newer}" in losses.ok("vm", "get", "kept").out
        assert f"{newer} is installed; guests with another until they move or stop: 1 (" in losses.ok("host", "get", home).out
        assert "these guests run another: kept" in losses.trimtab("doctor").out
        assert (losses.qemu_process(kept, home), losses.writes(kept)[-1].boot) == (qemu, boot)
        away = next(host for host in losses.hosts if host != home)
        losses.ok("vm", "migrate", "kept", "--to", away, "--wait")
        assert losses.vm("kept")["observed"]["qemu"] == ""
    finally:
        program.write_text(before)
    wait_until(lambda: losses.home(kept) == away, "it to count there")
    assert losses.double_runs() == []


HOOK = "mkdir -p /etc/trimtab && cd /etc/trimtab && printf '#!/bin/sh\\necho $1 >>/data/hook\\n' >backup-hook && chmod +x backup-hook"


@pytest.mark.soak
def test_the_demo_shows_a_guest_that_comes_back_from_its_backup_on_another_host(
    losses: LossFleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses.ok("vm", "create", "safe", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--wait")
    home, vm_id = str(losses.vm("safe")["host"]), str(losses.vm("safe")["id"])
    guest_says(losses.lab, home, vm_id, HOOK)
    capsys.readouterr()
    show_backup(Demo(losses.lab, losses.plane), "safe", key_file=tmp_path / "main.key")
    told = capsys.readouterr().out
    again = losses.vm("safe-again")
    assert again["host"] != home
    counted, first = (
        int(number) for number in re.findall(rf"safe counted (\d+) when .* on {again['host']} it went on with (\d+)", told)[0]
    )
    assert first > counted >= 3
    # Both were told of by the command that made them, the increment by its size too.
    made = re.findall(r"^bk-\S+: application-consistent, (.+) read, .+ stored$", told, re.MULTILINE)
    assert len(made) == 2
    assert re.search(r"^bk-\S+ is ready, L1$", told, re.MULTILINE)
    assert re.search(r"^safe-again ", told.rpartition("$ trimtab backup status")[2], re.MULTILINE)
    # Its owner's hook held it for each backup, and let it go: the second instant lies between its two halves.
    assert guest_says(losses.lab, str(again["host"]), str(again["id"]), "cat /data/hook").split() == ["freeze", "thaw", "freeze"]
    losses.delete("safe-again")
    assert losses.double_runs() == []


# --- one of the campaign's losses, another each time ------------------------------------------------------------------------------

DRAWN = (
    "power", "link", "one-way-cut", "frozen-agent", "both-frozen", "link-and-frozen-warden", "link-and-killed-warden",
    "link-and-killed-agent", "link-and-killed-libvirtd", "killed-libvirtd", "frozen-warden", "redis-down", "device-works",
)  # fmt: skip
"""Of `host_faults`: what takes no longer than a loss does."""


def test_a_loss_that_is_drawn_by_the_seed_moves_whom_it_must_and_nobody_else(
    losses: LossFleet, kept: str, devices: PowerDevices
) -> None:
    seed = os.environ.get("TRIMTAB_LOSS_SEED") or "7"
    name = random.Random(seed).choice(DRAWN)
    # Shown where it fails.
    sys.stdout.write(f"drawn: {name}, of {losses.home(kept)}; TRIMTAB_LOSS_SEED={seed} repeats it\n")
    fault = all_faults(losses, Hands(losses, devices))[name]
    home, at_s = losses.home(kept), boottime_s()
    fault.inflict(home)
    try:
        if fault.must is Must.MOVE:
            comes_back_elsewhere(losses, kept, home, at_s)
        else:
            assert fault.must is Must.STAY
            far_beyond_s = at_s + 2 * (kit.LEASE_S + kit.KILL_S)
            wait_until(lambda: losses.writes(kept)[-1].at_s > far_beyond_s, "the guest to count on where it is", patience_s=90)
            assert {each.host for each in losses.writes(kept) if each.at_s > at_s} == {home}
    finally:
        fault.end(home)
    losses.wait_until_armed()
    assert losses.runs_on(kept) == [losses.home(kept)]
    assert losses.double_runs() == []


# --- as hosts are by default: armed while their beacons renew in the shared pool ------------------------------------------------


@pytest.fixture(scope="module")
def beaconed(losses: LossFleet, kept: str) -> LossFleet:
    kit.use_beacons(losses)
    return losses


@pytest.mark.soak
def test_controllers_that_are_away_for_longer_than_a_lease_end_nobody_while_the_beacon_renews(
    beaconed: LossFleet, kept: str
) -> None:
    home, at_s = beaconed.home(kept), boottime_s()
    beaconed.plane.crash()
    try:
        far_beyond_s = at_s + 2 * (kit.LEASE_S + kit.KILL_S)
        beaconed.lab.signal_service(home, "trimtab-warden", signal.SIGKILL)  # the next one knows the lease only by the beacon
        wait_until(lambda: boottime_s() > at_s + kit.LEASE_S, "the lease of the controllers to end")
        beaconed.lab.run(home, ["systemctl", "restart", "trimtab-agent"])  # an upgrade, in the middle of it
        beaconed.lab.signal_service(home, "trimtab-warden", signal.SIGKILL)
        wait_until(lambda: beaconed.writes(kept)[-1].at_s > far_beyond_s, "the guest to count on where it is", patience_s=90)
    finally:
        beaconed.plane.start()
    assert {each.host for each in beaconed.writes(kept) if each.at_s > at_s} == {home}
    assert beaconed.double_runs() == []
    beaconed.wait_until_armed()


def test_storage_that_hangs_holds_up_neither_agent_nor_warden(beaconed: LossFleet, kept: str) -> None:
    home = beaconed.home(kept)
    beaconed.lab.hang_storage()
    try:
        # Its word "armed" is taken back: without a beacon, controllers that are away would end its guests.
        wait_until(lambda: beaconed.unarmed_hosts() == 3, "every host to say that its beacon does not renew", patience_s=60)
        protection = beaconed.protection(home)
        assert protection["lease_age_s"] < kit.LEASE_S / 2
        assert protection["beacon_age_s"] > kit.LEASE_S
        assert all(beaconed.host(host)["connectivity"] == "up" for host in beaconed.hosts)
    finally:
        beaconed.lab.hang_storage(is_hung=False)
    boot, now_s = beaconed.writes(kept)[-1].boot, boottime_s()
    beaconed.wait_until_armed()
    # It waited for its disk, as on any storage that hangs, and nobody ended it for that.
    wait_until(lambda: beaconed.writes(kept)[-1].at_s > now_s, "the guest to count on")
    assert (beaconed.home(kept), beaconed.writes(kept)[-1].boot) == (home, boot)


def test_a_dead_host_with_a_beacon_is_recovered_after_an_intent_that_another_host_wrote(beaconed: LossFleet, kept: str) -> None:
    home, at_s = beaconed.home(kept), boottime_s()
    beaconed.lab.crash(home)
    comes_back_elsewhere(beaconed, kept, home, at_s)
    beaconed.lab.boot(home)
    beaconed.wait_until_armed()
    wait_until(lambda: beaconed.protection(home)["beacon_age_s"] is not None, "its beacon to renew under its new lease")


@pytest.mark.soak
def test_a_host_that_is_rebooted_is_emptied_first_and_comes_back_under_another_boot_id(beaconed: LossFleet, kept: str) -> None:
    home = beaconed.home(kept)
    before, inits = beaconed.host(home), beaconed.lab.init_process_id(home)
    at_s = boottime_s()
    beaconed.ok("host", "reboot", home, "--yes", "--wait")
    after = beaconed.wait_for_host(home)
    assert after["boot_id"] != before["boot_id"]
    assert beaconed.lab.init_process_id(home) == inits, "it restarted by itself; nobody took its power"
    assert not after["is_cordoned"]
    assert beaconed.writes(kept)[-1].host != home
    boots = {each.boot for each in beaconed.writes(kept) if each.at_s > at_s}
    assert len(boots) == 1, "the guest moved and ran all the time"
    assert beaconed.double_runs() == []
    beaconed.wait_until_armed()


@pytest.mark.soak
def test_a_real_drill_cuts_the_power_by_the_hosts_own_device_and_measures_what_follows(
    beaconed: LossFleet, kept: str, devices: PowerDevices
) -> None:
    home = beaconed.home(kept)
    refused = beaconed.trimtab("drill", "host-loss", home, "--mode", "real", "--confirm-host", home)
    assert refused.code == 5, "it has no power device"
    Hands(beaconed, devices).give_device(home)
    at_s = boottime_s()
    drilled = beaconed.ok("drill", "host-loss", home, "--mode", "real", "--confirm-host", home)
    assert "MEASURED" in drilled.out
    assert not devices.is_on(home)
    first = beaconed.first_elsewhere(kept, home, at_s)
    assert beaconed.overlap(kept, home, first) == ""
    beaconed.lab.boot(home)
    beaconed.wait_until_armed()
    assert beaconed.double_runs() == []


@pytest.mark.soak
def test_after_a_database_of_yesterday_was_restored_nothing_is_doubled_lost_or_resurrected(
    beaconed: LossFleet, kept: str
) -> None:
    home = beaconed.home(kept)
    away = next(host for host in beaconed.hosts if host != home)
    silent = next(host for host in beaconed.hosts if host not in {home, away})
    gone, unknown = beaconed.keep("gone", to=away), beaconed.keep("unknown", to=silent)
    database, yesterday = (beaconed.plane.data_directory / name for name in ("trimtab.db", "yesterday.db"))
    with closing(sqlite3.connect(database)) as now, closing(sqlite3.connect(yesterday)) as kept_aside:
        now.backup(kept_aside)
    # What is done from here on, the database will not know.
    beaconed.ok("vm", "migrate", "kept", "--to", away, "--wait")
    beaconed.delete("gone")
    since = beaconed.keep("since", to=home)
    beaconed.plane.crash()
    for leftover in ("trimtab.db-wal", "trimtab.db-shm"):
        (beaconed.plane.data_directory / leftover).unlink(missing_ok=True)
    yesterday.replace(database)
    at_s = boottime_s()
    beaconed.lab.freeze(silent)
    try:
        command = [str(own_programs() / "trimtab-controller"), "recover", "--data-dir", str(beaconed.plane.data_directory)]
        shown = beaconed.lab.run("ctl", command, check=False)
        words = [line.split() for line in shown.stdout.splitlines()]
        found = {line[1]: line[0] for line in words if len(line) > 1}
        assert shown.returncode == 3, "an operator has something to look at"
        assert {"kept": "elsewhere", "gone": "gone", f"trimtab-{since}": "stranger"}.items() <= found.items(), shown.stdout
        assert found[silent] == "unknown", "nobody knows what a silent host holds"
        assert "Nothing was changed" in shown.stdout
        assert beaconed.lab.run("ctl", [*command, "--apply"], check=False).returncode == 3
        beaconed.plane.start()
    finally:
        beaconed.lab.thaw(silent)
    beaconed.wait_until_armed()
    beaconed.ok("failover", "resume")
    far_beyond_s = boottime_s() + kit.LEASE_S + kit.KILL_S
    for vm_id in (kept, since, unknown):
        wait_until(lambda vm_id=vm_id: beaconed.writes(vm_id)[-1].at_s > far_beyond_s, "each guest to count on where it was")
    assert [{each.host for each in beaconed.writes(vm_id) if each.at_s > at_s} for vm_id in (kept, since, unknown)] == [
        {away}, {home}, {silent}
    ]  # fmt: skip
    assert beaconed.runs_on(gone) == []
    assert beaconed.double_runs() == []
    assert beaconed.vm("kept")["host"] == away
    assert beaconed.trimtab("vm", "get", "since").code == 4, "it is shown as a domain that is not ours, and not touched"
    beaconed.ok("vm", "stop", "kept", "--force", "--wait")
    assert beaconed.runs_on(kept) == [], "it obeys"
