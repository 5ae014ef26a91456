"""The agent's side of the warden, against a real one: who is on the list, what heartbeats may say, and who kills when it is silent."""

import asyncio
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.agent import factories
from tests.unit.agent.waiting import until
from trimtab_agent import warden_state
from trimtab_agent.clock import SystemClock
from trimtab_agent.guard import Guard
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

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.killed: list[str] = []
        self.guard = Guard(runtime_dir=directory, state_dir=directory, clock=SystemClock(), on_killed=self._note)
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
    side.guard.told(1, is_armed=True)
    side.guard.heard(1)
    side.warden.kill()
    await until(lambda: not side.guard.report.is_armed)
    with pytest.raises(Unavailable) as refused:
        await asyncio.to_thread(side.guard.expect, spec(SHARED), 1)
    assert refused.value.code == "warden-silent"
    await asyncio.to_thread(side.guard.expect, spec(LOCAL), 1)  # nobody will start that one elsewhere
    side.guard.told(2, is_armed=False)
    side.guard.heard(2)  # the controller knows: this host is recovered only after power fencing
    await asyncio.to_thread(side.guard.expect, spec(SHARED), 1)


async def test_an_armed_heartbeat_after_an_unarmed_one_is_not_taken_back_by_the_latters_ack(side: Side) -> None:
    side.guard.listed(())
    await side.armed()
    side.guard.told(1, is_armed=False)
    side.guard.told(2, is_armed=True)
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
    side.guard.told(1, is_armed=True)
    side.guard.renewed(boottime_s() + 0.5, ttl_s=0.5)
    side.warden.kill()
    await until(lambda: guest.poll() is not None)
    await until(lambda: side.killed == [domain.vm_id])


async def test_what_the_warden_killed_is_reported_once(side: Side) -> None:
    domain = spec(SHARED)
    side.guard.listed(())
    await side.armed()
    await asyncio.to_thread(side.guard.expect, domain, 1)
    guest = side.start_guest(domain)
    side.guard.renewed(boottime_s() + 0.3, ttl_s=0.3)
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
