"""A host is lost with real guests on it: each counts on elsewhere, and at any time one QEMU wrote. By lease alone: no power device.

The disks are lock-free, so a second run would be seen in their server's log. One lab; each test leaves every host up and armed.
"""

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.host_faults import Hands
from tests.lab.host_loss_kit import LossFleet, boottime_s
from trimtab_lab.commands import own_programs
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]


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


def comes_back_elsewhere(losses: LossFleet, vm_id: str, home: str, at_s: float) -> None:
    """Wait for the vm elsewhere and check that its former home had stopped writing before. The seconds are a benchmark's matter."""
    first = losses.first_elsewhere(vm_id, home, at_s)
    assert losses.double_runs() == []
    assert losses.overlap(vm_id, home, first) == ""
    former = [each for each in losses.writes(vm_id) if each.host == home and each.at_s < first.at_s]
    assert first.counter >= former[-1].counter, "what the guest had written before is there"
    assert first.epoch > former[-1].epoch


def test_a_kept_guest_counts_on_elsewhere_after_a_power_cut_and_one_that_is_not_kept_does_not(
    losses: LossFleet, kept: str
) -> None:
    losses.keep("left", to="node1", ha="none")
    home, at_s = losses.home(kept), boottime_s()
    losses.lab.crash(home)
    comes_back_elsewhere(losses, kept, home, at_s)
    assert {each.host for each in losses.writes(str(losses.vm("left")["id"]))} == {"node1"}
    losses.lab.boot(home)
    losses.wait_until_armed()
    losses.delete("left")


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


# --- as hosts are by default: armed while their beacons renew in the shared pool ------------------------------------------------


@pytest.fixture(scope="module")
def devices(losses: LossFleet) -> Iterator[PowerDevices]:
    made = PowerDevices(losses.lab)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def beaconed(losses: LossFleet, kept: str) -> LossFleet:
    kit.use_beacons(losses)
    return losses


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
