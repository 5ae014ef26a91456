"""The agent's side of the warden, against a real one: who is on the list, what heartbeats may say, and who kills when it is silent."""

import asyncio
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.agent import factories
from tests.unit.agent.waiting import until
from trimtab_agent import beacon_state, warden_state
from trimtab_agent.clock import SystemClock
from trimtab_agent.guard import BeaconPlace, Guard, WardenReport
from trimtab_agent.hypervisor.base import restarts_elsewhere
from trimtab_agent.warden_guests import boottime_s
from trimtab_protos.errors import Unavailable
from trimtab_protos.messages import DiskFormat, DiskSpec, DomainObservation, DomainSpec, DomainState, PoolKind, PoolSpec

HOLD = "import signal; signal.pause()"
SHARED = PoolSpec(pool_id="pool-s", kind=PoolKind.DIR, path="/srv/s", is_shared=True, name="s")
LOCAL = PoolSpec(pool_id="pool-l", kind=PoolKind.DIR, path="/srv/l", is_shared=False, name="l")


def spec(*pools: PoolSpec, is_kept: bool = True) -> DomainSpec:
    disks = tuple(
        DiskSpec(volume_id=f"vol-{number}", pool_id=pool.pool_id, format=DiskFormat.QCOW2, index=number)
        for number, pool in enumerate(pools)
    )
    return replace(factories.domain_spec(), uuid=str(uuid.uuid4()), is_kept=is_kept, disks=disks, pools=pools)


class Side:
    """A guard, the warden it speaks to, and what it reported."""

    def __init__(
        self,
        directory: Path,
        *,
        needs_beacon: bool = False,
        beacon: Callable[[], BeaconPlace | None] = lambda: None,
        on_forbidden: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.killed: list[str] = []
        self.guard = Guard(
            runtime_dir=directory,
            state_dir=directory,
            clock=SystemClock(),
            on_killed=self._note,
            needs_beacon=needs_beacon,
            beacon=beacon,
            on_forbidden=on_forbidden,
        )
        self.task = asyncio.create_task(self.guard.run())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.warden = self.start_warden()

    async def _note(self, vm_ids: Sequence[str]) -> None:
        self.killed += vm_ids

    def start_warden(self) -> "subprocess.Popen[bytes]":
        words = ["-m", "trimtab_agent.warden", f"--runtime-dir={self.directory}", f"--state-dir={self.directory}"]
        self.processes.append(subprocess.Popen([sys.executable, *words]))
        return self.processes[-1]

    def start_guest(self, domain: DomainSpec) -> "subprocess.Popen[bytes]":
        words = ["qemu-system-x86_64", "-c", HOLD, "-uuid", domain.uuid]
        self.processes.append(subprocess.Popen(words, executable=sys.executable))
        return self.processes[-1]

    async def armed(self) -> None:
        await until(lambda: self.guard.report.is_armed)


@pytest.fixture
async def side(tmp_path: Path) -> AsyncIterator[Side]:
    made = Side(tmp_path)
    try:
        yield made
    finally:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
        for process in made.processes:
            process.kill()
            process.wait()


def test_only_a_kept_vm_whose_written_disks_are_all_shared_may_start_elsewhere() -> None:
    assert restarts_elsewhere(spec(SHARED))
    assert not restarts_elsewhere(spec(SHARED, LOCAL))
    assert not restarts_elsewhere(spec(SHARED, is_kept=False))
    read_only = spec(SHARED, LOCAL)
    read_only = replace(read_only, disks=(read_only.disks[0], replace(read_only.disks[1], is_read_only=True)))
    assert restarts_elsewhere(read_only)


async def test_nothing_is_armed_before_the_hypervisor_has_listed_its_domains(side: Side) -> None:
    await asyncio.to_thread(side.guard.expect, spec(LOCAL), 1)
    await until((side.directory / warden_state.SOCKET_NAME).exists)
    assert not side.guard.report.is_armed
    side.guard.listed(())
    await side.armed()


async def test_a_vm_is_on_the_wardens_list_before_it_is_defined(side: Side) -> None:
    side.guard.listed(())
    await side.armed()
    domain = spec(SHARED)
    await asyncio.to_thread(side.guard.expect, domain, 3)
    handed = warden_state.read(side.directory)
    assert handed is not None
    assert [(guest.vm_id, guest.uuid, guest.epoch) for guest in handed.guests] == [(domain.vm_id, domain.uuid, 3)]
    assert side.guard.report.is_armed
    side.guard.listed(())  # a list that was begun before the definition does not take it off again
    await side.armed()
    handed = warden_state.read(side.directory)
    assert handed is not None
    assert len(handed.guests) == 1


async def test_while_the_lease_is_counted_on_nothing_is_defined_that_no_warden_knows(side: Side) -> None:
    side.guard.listed(())
    await side.armed()
    side.guard.told(1, WardenReport(is_armed=True))
    side.guard.heard(1)
    side.warden.kill()
    await until(lambda: not side.guard.report.is_armed)
    with pytest.raises(Unavailable) as refused:
        await asyncio.to_thread(side.guard.expect, spec(SHARED), 1)
    assert refused.value.code == "warden-silent"
    await asyncio.to_thread(side.guard.expect, spec(LOCAL), 1)  # nobody will start that one elsewhere
    side.guard.told(2, WardenReport())
    side.guard.heard(2)  # the controller knows: this host is recovered only after power fencing
    await asyncio.to_thread(side.guard.expect, spec(SHARED), 1)


async def test_an_armed_heartbeat_after_an_unarmed_one_is_not_taken_back_by_the_latters_ack(side: Side) -> None:
    side.guard.listed(())
    await side.armed()
    side.guard.told(1, WardenReport())
    side.guard.told(2, WardenReport(is_armed=True))
    side.guard.heard(1)
    side.warden.kill()
    await until(lambda: not side.guard.report.is_armed)
    with pytest.raises(Unavailable):
        await asyncio.to_thread(side.guard.expect, spec(SHARED), 1)


async def test_the_agent_kills_in_the_place_of_a_warden_that_is_gone_and_reports_it(side: Side) -> None:
    domain = spec(SHARED)
    side.guard.listed(())
    await side.armed()
    await asyncio.to_thread(side.guard.expect, domain, 1)
    guest = side.start_guest(domain)
    side.guard.told(1, WardenReport(is_armed=True))
    side.guard.renewed(boottime_s() + 0.5, ttl_s=0.5, lease_number=1)
    side.warden.kill()
    await until(lambda: guest.poll() is not None)
    await until(lambda: side.killed == [domain.vm_id])


async def test_a_warden_that_is_started_after_the_controller_was_told_of_its_absence_ends_nobody(side: Side) -> None:
    domain = spec(SHARED)
    side.guard.listed(())
    await side.armed()
    await asyncio.to_thread(side.guard.expect, domain, 1)
    guest = side.start_guest(domain)
    side.guard.told(1, WardenReport(is_armed=True))
    side.warden.kill()
    side.warden.wait()
    await until(lambda: not side.guard.report.is_armed)
    side.guard.told(2, WardenReport())
    side.guard.heard(2)
    side.guard.renewed(boottime_s() + 0.3, ttl_s=0.3, lease_number=1)
    await until(lambda: handed(side) == [], what="the list to be empty once the lease is over")
    assert guest.poll() is None
    side.start_warden()
    await until(lambda: bool(side.guard._is_fresh()), what="the warden to answer")
    assert guest.poll() is None


async def test_what_the_warden_killed_is_reported_once(side: Side) -> None:
    domain = spec(SHARED)
    side.guard.listed(())
    await side.armed()
    await asyncio.to_thread(side.guard.expect, domain, 1)
    guest = side.start_guest(domain)
    side.guard.renewed(boottime_s() + 0.3, ttl_s=0.3, lease_number=1)
    await until(lambda: guest.poll() is not None)
    await until(lambda: side.killed == [domain.vm_id])
    assert not list(side.directory.glob("warden-killed*"))


async def test_the_hypervisors_list_puts_what_restarts_elsewhere_on_ours(side: Side) -> None:
    kept = DomainObservation(vm_id="vm-1", uuid="u-1", state=DomainState.RUNNING, epoch=2, restarts_elsewhere=True)
    local = DomainObservation(vm_id="vm-2", uuid="u-2", state=DomainState.RUNNING, epoch=2)
    unmanaged = DomainObservation(vm_id="", uuid="u-3", state=DomainState.RUNNING)
    side.guard.listed((kept, local, unmanaged))
    await side.armed()
    handed = warden_state.read(side.directory)
    assert handed is not None
    assert [guest.vm_id for guest in handed.guests] == ["vm-1"]
    threading.Thread(target=side.guard.stand_down).start()
    await until(lambda: (now := warden_state.read(side.directory)) is not None and now.guests == ())


# --- armed while the beacon renews ---------------------------------------------------------------------------------------------

PLACE = BeaconPlace(host_id="host-a", boot_id="b", pool_id="pool-s", pool_path="/srv/s")


@pytest.fixture
async def beaconed(tmp_path: Path) -> AsyncIterator[Side]:
    made = Side(tmp_path, needs_beacon=True, beacon=lambda: PLACE)
    try:
        yield made
    finally:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
        for process in made.processes:
            process.kill()
            process.wait()


def beats(side: Side, *, age_s: float = 0.0, forbidden_lease: int = 0) -> None:
    """Leave what a beacon leaves that renewed so long ago."""
    renewed_s = boottime_s() - age_s
    state = beacon_state.State(renewed_s + 15.0, renewed_s, pool_id="pool-s", counter=3, forbidden_lease=forbidden_lease)
    beacon_state.write_state(side.directory, state)


def handed(side: Side) -> list[str]:
    now = warden_state.read(side.directory)
    return [guest.vm_id for guest in now.guests] if now is not None else []


def exchange(side: Side, sequence: int) -> WardenReport:
    """One heartbeat that is granted."""
    report = side.guard.report
    side.guard.told(sequence, report)
    side.guard.heard(sequence)
    side.guard.renewed(boottime_s() + 15.0, ttl_s=15.0, lease_number=4)
    return report


async def test_a_host_arms_itself_only_once_its_beacon_renews(beaconed: Side) -> None:
    kept = DomainObservation(vm_id="vm-1", uuid="u-1", state=DomainState.RUNNING, epoch=2, restarts_elsewhere=True)
    beaconed.guard.listed((kept,))
    await until((beaconed.directory / warden_state.STATE_NAME).exists)
    first = exchange(beaconed, 1)
    assert not first.is_armed
    assert first.beacon_pool_id == "", "no slot was seen to work yet"
    assert "shared pool" in first.missing[0]
    task = beacon_state.read_task(beaconed.directory)
    assert task is not None
    assert task.lease_number == 0, "no lease depends on it before the controller knows of it"
    assert handed(beaconed) == []
    beats(beaconed, age_s=100)
    assert exchange(beaconed, 2).beacon_pool_id == "pool-s"
    task = beacon_state.read_task(beaconed.directory)
    assert task is not None
    assert task.lease_number == 4, "the renewal that told it was granted, so it is on record"
    beats(beaconed)
    await beaconed.armed()
    assert handed(beaconed) == ["vm-1"]


async def test_a_host_whose_beacon_ended_keeps_its_warden_until_the_controller_knows(beaconed: Side) -> None:
    kept = DomainObservation(vm_id="vm-1", uuid="u-1", state=DomainState.RUNNING, epoch=2, restarts_elsewhere=True)
    beats(beaconed)
    beaconed.guard.listed((kept,))
    await beaconed.armed()
    assert exchange(beaconed, 1).is_armed
    beats(beaconed, age_s=60)
    report = beaconed.guard.report
    assert not report.is_armed
    beaconed.guard.told(2, report)
    wanted = warden_state.read(beaconed.directory)
    assert wanted is not None
    await until(lambda: (now := warden_state.read(beaconed.directory)) is not None and now.sequence > wanted.sequence + 1)
    assert handed(beaconed) == ["vm-1"], "its last word that was granted is that it is armed"
    beaconed.guard.heard(2)
    await until(lambda: handed(beaconed) == [])


async def test_an_agent_that_starts_again_while_the_controllers_are_away_leaves_the_beacon_at_its_work(beaconed: Side) -> None:
    beats(beaconed)
    beaconed.guard.listed(())
    await beaconed.armed()
    exchange(beaconed, 1)
    task = beacon_state.read_task(beaconed.directory)
    assert task is not None
    Guard(
        runtime_dir=beaconed.directory,
        state_dir=beaconed.directory,
        clock=SystemClock(),
        on_killed=beaconed._note,
        needs_beacon=True,
        beacon=lambda: PLACE,
    )
    assert beacon_state.read_task(beaconed.directory) == task


async def test_a_lease_that_an_intent_forbids_is_replaced_by_a_new_session_and_once(tmp_path: Path) -> None:
    opened: list[None] = []
    side = Side(tmp_path, needs_beacon=True, beacon=lambda: PLACE, on_forbidden=lambda: opened.append(None))
    side.task.cancel()
    beats(side, age_s=30, forbidden_lease=4)
    exchange(side, 1)
    exchange(side, 2)
    assert len(opened) == 1
    side.warden.kill()
    side.warden.wait()
