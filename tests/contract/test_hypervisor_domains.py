"""What every hypervisor promises about domains: defined, powered, observed. See `hosts.py` for the hosts."""

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.contract.hosts import (
    Hosts,
    Side,
    Vm,
    absent,
    define,
    power,
    refusal,
    remove,
    until,
    vm_of,
)
from trimtab_agent.hypervisor.base import DomainChange, Stamp
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import (
    DomainState,
    PowerAction,
    StateReason,
)

pytestmark = [pytest.mark.timeout(900)]


# --- domains -------------------------------------------------------------------------------------------------------------


def test_a_defined_domain_is_stopped_and_carries_its_stamp(hosts: Hosts, vm: Vm) -> None:
    seen = define(hosts.first, vm, epoch=3, turn=9)
    assert (seen.state, seen.epoch, seen.turn, seen.is_persistent) == (DomainState.STOPPED, 3, 9, True)
    assert (seen.vm_id, seen.uuid, seen.vcpus, seen.memory_mib) == (vm.id, vm.spec.uuid, 1, 96)
    assert seen.macs == (vm.spec.nics[0].mac,)
    listed = {domain.vm_id: domain for domain in hosts.first.hypervisor.list_domains()}
    assert (listed[vm.id].epoch, listed[vm.id].turn) == (3, 9)


def test_a_domain_starts_once_pauses_resumes_and_is_forced_off(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    started = power(side, vm, PowerAction.START, epoch=2, turn=5)
    assert (started.state, started.epoch, started.turn) == (DomainState.RUNNING, 2, 5)
    again = power(side, vm, PowerAction.START, turn=6)
    assert (again.state, again.starts) == (DomainState.RUNNING, started.starts)
    paused = power(side, vm, PowerAction.PAUSE)
    assert (paused.state, paused.reason) == (DomainState.PAUSED, StateReason.USER_PAUSED)
    assert power(side, vm, PowerAction.PAUSE).state is DomainState.PAUSED
    assert power(side, vm, PowerAction.RESUME).state is DomainState.RUNNING
    assert power(side, vm, PowerAction.RESUME).state is DomainState.RUNNING
    off = power(side, vm, PowerAction.FORCE_OFF)
    assert (off.state, off.reason) == (DomainState.STOPPED, StateReason.DESTROYED)
    assert power(side, vm, PowerAction.FORCE_OFF).state is DomainState.STOPPED
    assert power(side, vm, PowerAction.SHUT_DOWN).state is DomainState.STOPPED


@pytest.mark.parametrize("action", [PowerAction.PAUSE, PowerAction.RESUME, PowerAction.REBOOT, PowerAction.RESET])
def test_a_stopped_domain_is_only_started(hosts: Hosts, vm: Vm, action: PowerAction) -> None:
    assert refusal(lambda: power(hosts.first, vm, action)) == (Conflict, "wrong-domain-state")


def test_a_paused_guest_cannot_be_asked_to_shut_down(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    power(hosts.first, vm, PowerAction.PAUSE)
    assert refusal(lambda: power(hosts.first, vm, PowerAction.SHUT_DOWN)) == (Conflict, "wrong-domain-state")


def test_an_absent_domain_is_an_answer_and_no_place_for_power(hosts: Hosts, name: str) -> None:
    nobody = vm_of(hosts.first, name, hosts.first.shared_pool)
    seen = hosts.first.hypervisor.observe_domain(nobody.id)
    assert (seen.vm_id, seen.state) == (nobody.id, DomainState.ABSENT)
    assert refusal(lambda: power(hosts.first, nobody, PowerAction.START))[0] is NotFound
    hosts.first.hypervisor.undefine_domain(nobody.id, (), kill_if_running=False, keep_state_files=False)


def test_a_start_without_the_disk_is_refused(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.shared_pool)
    hosts.first.hypervisor.define_domain(made.spec, Stamp(1, 1))
    assert refusal(lambda: power(hosts.first, made, PowerAction.START)) == (NotFound, "volume-not-found")
    remove(hosts, made)


def test_a_definition_that_needs_its_disks_is_refused_without_them(hosts: Hosts, vm: Vm, name: str) -> None:
    missing = vm_of(hosts.first, f"{name}x", hosts.first.shared_pool)
    define_domain = hosts.first.hypervisor.define_domain
    error = refusal(lambda: define_domain(missing.spec, Stamp(1, 1), needs_volumes=True))
    assert error == (NotFound, "volume-not-found")
    assert absent(hosts.first, missing)
    assert define_domain(vm.spec, Stamp(1, 1), needs_volumes=True).state is DomainState.STOPPED


def test_a_running_domain_goes_only_where_it_may_be_killed(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    undefine = hosts.first.hypervisor.undefine_domain
    error = refusal(lambda: undefine(vm.id, (vm.pool,), kill_if_running=False, keep_state_files=False))
    assert error == (Conflict, "domain-running")
    undefine(vm.id, (vm.pool,), kill_if_running=True, keep_state_files=False)
    assert absent(hosts.first, vm)
    undefine(vm.id, (vm.pool,), kill_if_running=True, keep_state_files=False)


def test_defining_a_running_domain_leaves_it_running_and_raises_its_stamp(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    seen = define(hosts.first, vm, epoch=4, turn=12)
    assert (seen.state, seen.epoch, seen.turn) == (DomainState.RUNNING, 4, 12)


@pytest.mark.parametrize(
    "changes", [{"cpu_model": "EPYC-Nonesuch"}, {"machine": "pc-q35-99.1"}, {"machine": "q35"}, {"vm_id": "../x"}], ids=str
)
def test_a_spec_that_this_host_cannot_run_is_refused(hosts: Hosts, vm: Vm, changes: dict[str, Any]) -> None:
    spec = replace(vm.spec, **changes)
    assert refusal(lambda: hosts.first.hypervisor.define_domain(spec, Stamp(1, 1)))[0] in {Conflict, InvalidRequest}


def test_changes_are_told_in_order(hosts: Hosts, vm: Vm) -> None:
    heard: list[DomainChange] = []
    hosts.first.hypervisor.subscribe(heard.append)
    for action in (PowerAction.START, PowerAction.PAUSE, PowerAction.RESUME, PowerAction.FORCE_OFF):
        power(hosts.first, vm, action)
    wanted = ["started", "paused", "resumed", "stopped"]

    def has_heard_all() -> bool:
        """In this order, whatever else came between: libvirt tells a start as a resume too."""
        kinds = iter([change.kind for change in list(heard) if change.domain.vm_id == vm.id])
        return all(kind in kinds for kind in wanted)

    until(has_heard_all, what="four events in order", deadline_s=hosts.first.patience_s)
    last = [change for change in heard if change.domain.vm_id == vm.id][-1].domain
    assert last.state is DomainState.STOPPED


def test_the_console_is_read_from_an_offset_on(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    content = until(
        lambda: side.hypervisor.read_console(vm.id, 0, 65536)[0], what="a first line", deadline_s=max(150, side.patience_s)
    )
    head, offset = side.hypervisor.read_console(vm.id, 0, 5)
    assert (head, offset) == (content[:5], 5)
    rest, _end = side.hypervisor.read_console(vm.id, offset, 65536)
    assert content[5:] == rest[: len(content) - 5]
    tail, end = side.hypervisor.read_console(vm.id, -3, 65536)
    assert len(tail) >= 3
    assert side.hypervisor.read_console(vm.id, end + 1_000_000, 10)[0] == b""
    assert refusal(lambda: side.hypervisor.read_console("vm-none", 0, 10))[0] is NotFound


def test_a_guest_shuts_down_when_it_is_asked(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    if hosts.boots:
        until(lambda: b"GUEST UP" in side.hypervisor.read_console(vm.id, -65536, 65536)[0], what="the guest", deadline_s=180)
    power(side, vm, PowerAction.SHUT_DOWN)
    until(lambda: side.hypervisor.observe_domain(vm.id).state is DomainState.STOPPED, what="the end", deadline_s=side.patience_s)
    assert side.hypervisor.observe_domain(vm.id).reason is StateReason.GUEST_SHUTDOWN


def test_a_guest_reboots_when_it_is_asked_and_stays_the_same_domain(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    started = power(side, vm, PowerAction.START)
    if hosts.boots:
        until(lambda: side.hypervisor.observe_domain(vm.id).has_guest_agent, what="the guest", deadline_s=180)
        until(lambda: counters(lives(side, vm)[0]), what="its first tick", deadline_s=180)
    power(side, vm, PowerAction.REBOOT, turn=3)
    if hosts.boots:
        again = until(lambda: counters(lives(side, vm)[-1]) if len(lives(side, vm)) == 2 else [], what="its boot", deadline_s=180)
        before = lives(side, vm)[0]
        assert "GUEST DOWN reboot" in before, "it was asked, and brought its disk in order"
        assert again[0] in (max(counters(before)) + 1, max(counters(before)) + 2), "the counter on its disk goes on"
    seen = side.hypervisor.observe_domain(vm.id)
    assert (seen.state, seen.starts, seen.turn, seen.is_persistent) == (DomainState.RUNNING, started.starts, 3, True)
    assert (seen.uuid, seen.epoch, seen.macs) == (started.uuid, started.epoch, started.macs)


def lives(side: Side, vm: Vm) -> list[str]:
    """Return what a real guest said since each of its boots."""
    text = side.hypervisor.read_console(vm.id, -65536, 65536)[0].decode(errors="replace")
    return text.split("GUEST UP")[1:] or [""]


def counters(said: str) -> list[int]:
    return [int(number) for number in re.findall(r"tick (\d+) uptime", said)]


def test_a_disk_that_is_open_elsewhere_locks_the_start(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    define(hosts.second, vm)
    assert refusal(lambda: power(hosts.second, vm, PowerAction.START)) == (Conflict, "image-locked")
    power(hosts.first, vm, PowerAction.FORCE_OFF)
    assert power(hosts.second, vm, PowerAction.START).state is DomainState.RUNNING
