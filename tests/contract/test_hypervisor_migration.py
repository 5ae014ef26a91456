"""What every hypervisor promises about live migration. See `hosts.py` for the hosts."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.contract.hosts import (
    Control,
    Hosts,
    Side,
    Vm,
    absent,
    define,
    has_left,
    power,
    refusal,
    remove,
    until,
    vm_of,
    with_evil_disk,
)
from trimtab_agent.hypervisor.base import Stamp
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import (
    DomainObservation,
    DomainState,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    PowerAction,
    VolumeSpec,
)
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

pytestmark = [pytest.mark.timeout(900)]


# --- migration -----------------------------------------------------------------------------------------------------------


def move(hosts: Hosts, vm: Vm, *, control: Control | None = None, **fields: Any) -> MigrationResult:
    copied = fields.pop("copied", ())
    libvirt_uri, migration_uri = hosts.second.hypervisor.prepare_migration(vm.spec, copied, hosts.first.name)
    return hosts.first.hypervisor.migrate(
        vm.id,
        vm.spec,
        Stamp(epoch=2, turn=7),
        libvirt_uri=libvirt_uri,
        migration_uri=migration_uri,
        copied_volume_ids=tuple(volume.volume_id for volume in copied),
        options=MigrationOptions(**fields),
        control=control or Control(),
    )


def settle(side: Side, vm: Vm, which: MigrationSide, *, removed: tuple[VolumeSpec, ...] = ()) -> DomainObservation:
    return side.hypervisor.settle_migration(vm.id, which, vm.spec, removed, Stamp(epoch=2, turn=8))


def test_a_guest_moves_on_shared_storage_and_both_sides_settle(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    result = move(hosts, vm)
    assert result.total_ms > 0
    assert has_left(hosts.first, vm)
    arrived = hosts.second.hypervisor.observe_domain(vm.id)
    assert (arrived.state, arrived.is_persistent) == (DomainState.RUNNING, True)
    for _repetition in range(2):
        kept = settle(hosts.second, vm, MigrationSide.KEEP)
        assert (kept.state, kept.epoch, kept.turn) == (DomainState.RUNNING, 2, 8)
        assert settle(hosts.first, vm, MigrationSide.REMOVE).state is DomainState.ABSENT


def test_a_guest_moves_with_its_disk(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.local_pool)
    define(hosts.first, made)
    try:
        power(hosts.first, made, PowerAction.START)
        move(hosts, made, copied=(made.volume,))
        assert has_left(hosts.first, made)
        assert hosts.second.hypervisor.observe_domain(made.id).state is DomainState.RUNNING
        settle(hosts.second, made, MigrationSide.KEEP)
        settle(hosts.first, made, MigrationSide.REMOVE, removed=(made.volume,))
        assert not hosts.first.hypervisor.observe_volume(made.volume.volume_id, made.pool).is_present
        assert hosts.second.hypervisor.observe_volume(made.volume.volume_id, made.pool).is_present
    finally:
        remove(hosts, made)


def test_a_raw_disk_that_begins_like_an_image_arrives_as_its_bytes(hosts: Hosts, name: str) -> None:
    """Its guest wrote the header of an image over /etc/shadow: whoever looked what the disk is would read that."""
    made, header = with_evil_disk(hosts, hosts.first, name)
    try:
        power(hosts.first, made, PowerAction.START)
        move(hosts, made, copied=(made.volume,))
        settle(hosts.second, made, MigrationSide.KEEP)
        settle(hosts.first, made, MigrationSide.REMOVE, removed=(made.volume,))
        there = hosts.second.hypervisor.observe_volume(made.volume.volume_id, made.pool)
        assert (there.is_present, there.size_bytes) == (True, made.volume.size_bytes)
        assert hosts.read(hosts.second, made.volume, made.pool, len(header)) == header
    finally:
        remove(hosts, made)


def test_a_cancelled_migration_leaves_the_guest_where_it_was(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    control = Control()
    errors: list[TrimtabError] = []

    def run() -> None:
        try:
            move(hosts, vm, control=control, bandwidth_mib_s=1)
        except TrimtabError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: hosts.first.hypervisor.observe_domain(vm.id).is_migrating, what="the move", deadline_s=hosts.first.patience_s)
    control.cancelled.set()
    thread.join(hosts.first.patience_s)
    assert [(type(error), error.code) for error in errors] == [(Conflict, "job-cancelled")]
    assert hosts.first.hypervisor.observe_domain(vm.id).state is DomainState.RUNNING
    until(lambda: absent(hosts.second, vm), what="the target's end", deadline_s=hosts.second.patience_s)
    kept = settle(hosts.first, vm, MigrationSide.KEEP)
    assert (kept.state, kept.is_migrating) == (DomainState.RUNNING, False)
    settle(hosts.second, vm, MigrationSide.REMOVE)


def test_a_disk_that_is_neither_shared_nor_copied_keeps_the_guest(hosts: Hosts, name: str) -> None:
    made = vm_of(hosts.first, name, hosts.first.local_pool)
    define(hosts.first, made)
    try:
        power(hosts.first, made, PowerAction.START)
        # The target may miss the disk before the source sees that it would be left behind.
        assert refusal(lambda: move(hosts, made)) in {(Conflict, "migration-unsafe"), (NotFound, "volume-not-found")}
        assert hosts.first.hypervisor.observe_domain(made.id).state is DomainState.RUNNING
    finally:
        remove(hosts, made)


def test_a_stopped_domain_does_not_migrate(hosts: Hosts, vm: Vm) -> None:
    assert refusal(lambda: move(hosts, vm)) == (Conflict, "wrong-domain-state")


def test_a_target_that_cannot_run_the_guest_says_so_before_anything_moves(hosts: Hosts, vm: Vm) -> None:
    prepare = hosts.second.hypervisor.prepare_migration
    for changes in ({"cpu_model": "EPYC-Nonesuch"}, {"machine": "pc-q35-99.1"}):
        spec = replace(vm.spec, **changes)  # type: ignore[arg-type]
        assert refusal(lambda spec=spec: prepare(spec, (), hosts.first.name))[0] is Conflict  # type: ignore[misc]
    missing = replace(hosts.second.network, network_id="net-missing", bridge="br-missing")
    spec = replace(vm.spec, networks=(missing,), nics=(replace(vm.spec.nics[0], network_id="net-missing"),))
    assert refusal(lambda: prepare(spec, (), hosts.first.name))[0] is Conflict


def test_settling_against_what_is_there_is_refused(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    assert refusal(lambda: settle(hosts.first, vm, MigrationSide.REMOVE)) == (Conflict, "domain-runs-here")
    assert refusal(lambda: settle(hosts.second, vm, MigrationSide.KEEP)) == (Conflict, "domain-absent")
    assert settle(hosts.second, vm, MigrationSide.REMOVE).state is DomainState.ABSENT


def test_a_shared_disk_is_never_removed_by_settling(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    settle(hosts.second, vm, MigrationSide.REMOVE, removed=(vm.volume,))
    assert hosts.first.hypervisor.observe_volume(vm.volume.volume_id, vm.pool).is_present


# --- firewalls -----------------------------------------------------------------------------------------------------------


def test_a_firewall_moves_with_its_vm_the_highest_generation_stays_and_it_goes_with_it(hosts: Hosts, vm: Vm) -> None:
    def closed(generation: int) -> FirewallSpec:
        rules = (FirewallRule(protocol="tcp", first_port=generation, last_port=generation),)
        return FirewallSpec(generation=generation, is_closed=True, rules=rules)

    first, second = hosts.first.hypervisor, hosts.second.hypervisor
    assert second.set_firewall(vm.id, closed(3)) == 0, "the vm is not there"
    vm = replace(vm, spec=replace(vm.spec, firewall=closed(3)))
    define(hosts.first, vm)
    assert first.set_firewall(vm.id, closed(5)) == 5
    assert first.set_firewall(vm.id, closed(4)) == 5, "a late message changes nothing"
    power(hosts.first, vm, PowerAction.START)
    assert first.set_firewall(vm.id, closed(5)) == 5, "nor does a start"
    move(hosts, vm)
    assert second.set_firewall(vm.id, closed(2)) == 3, "readied with what its spec says"
    settle(hosts.second, replace(vm, spec=replace(vm.spec, firewall=closed(6))), MigrationSide.KEEP)
    settle(hosts.first, vm, MigrationSide.REMOVE)
    assert second.set_firewall(vm.id, closed(1)) == 6
    assert first.set_firewall(vm.id, closed(7)) == 0, "the source forgot it"
    second.undefine_domain(vm.id, vm.spec.pools, kill_if_running=True, keep_state_files=False)
    assert second.set_firewall(vm.id, closed(7)) == 0
