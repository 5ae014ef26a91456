"""Live migration between real hosts: cancelled, attached to, cut, copied; the guest counts on and loses nothing.

One lab of two hosts for the file; each test brings its own vm. Guests run under TCG and boot in 10 to 20 s.
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.contract.kvm_fixture import KvmHost
from tests.lab.kvm_guests import (
    BOOT_TIMEOUT_S,
    MIB,
    Control,
    Migration,
    cleaned,
    spec_of,
    start,
    state_of,
    two_hosts,
    until,
    volume_of,
    wait_for_state,
    wait_for_tick,
)
from trimtab_agent.hypervisor.base import Stamp
from trimtab_lab.hosts import Lab
from trimtab_protos.errors import Conflict, DeadlineExceeded, Unavailable
from trimtab_protos.messages import (
    DomainState,
    Firmware,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    PowerAction,
    StateReason,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, KvmHost, KvmHost]]:
    with two_hosts(tmp_path_factory.mktemp("kvm")) as made:
        yield made


@pytest.fixture(scope="module")
def lab(hosts: tuple[Lab, KvmHost, KvmHost]) -> Lab:
    return hosts[0]


@pytest.fixture(scope="module")
def node1(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[1]


@pytest.fixture(scope="module")
def node2(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[2]


SLOW = MigrationOptions(bandwidth_mib_s=4)


def test_a_move_on_shared_storage_can_be_cancelled_attached_to_and_finished(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "shared", node1.shared_pool)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 2)
        with pytest.raises(Conflict) as refused:
            start(node2, spec)
        assert refused.value.code == "image-locked"

        first = Migration(node1, node2, spec, options=SLOW)
        until(lambda: first.control.reports[-1:] and first.control.reports[-1].rate_bytes_s, what="a rate")
        assert state_of(node2, spec.vm_id)[0] is DomainState.INCOMING
        source = node1.hypervisor.observe_domain(spec.vm_id)
        assert (source.state, source.is_migrating, source.epoch) == (DomainState.RUNNING, True, 1)
        with pytest.raises(Conflict):
            node2.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=2, turn=3))
        with pytest.raises(Conflict):
            node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=3))
        second = Migration(node1, node2, spec, is_prepared=True)
        until(lambda: second.control.reports, what="progress seen by the one that attached")
        second.control.cancelled.set()
        for each in (first, second):
            outcome = each.ended()
            assert isinstance(outcome, Conflict)
            assert outcome.code == "job-cancelled"
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)

        late = Migration(node1, node2, spec, options=replace(SLOW, timeout_s=2)).ended()
        assert isinstance(late, Conflict)
        assert late.code == "migration-timeout"

        done = Migration(node1, node2, spec, options=MigrationOptions(has_auto_converge=True, max_downtime_ms=500)).ended()
        assert isinstance(done, MigrationResult)
        assert done.transferred_bytes > 10 * MIB
        assert state_of(node1, spec.vm_id) == (DomainState.STOPPED, StateReason.MIGRATED)
        arrived = node2.hypervisor.observe_domain(spec.vm_id)
        assert (arrived.state, arrived.epoch, arrived.is_persistent) == (DomainState.RUNNING, 2, True)
        with pytest.raises(Conflict):
            node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (), Stamp(epoch=2, turn=4))
        for _ in range(2):
            node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume_of(spec),), Stamp(epoch=2, turn=4))
            kept = node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
            assert (kept.state, kept.turn) == (DomainState.RUNNING, 4)
        assert wait_for_tick(node2, spec.vm_id, tick + 2) > tick
        assert node2.hypervisor.observe_volume(spec.disks[0].volume_id, node2.shared_pool).is_present


def test_a_move_with_copied_disk_takes_what_the_guest_wrote_and_nothing_stale(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "copied", node1.local_pool)
    volume = volume_of(spec)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 3)
        with pytest.raises(Conflict) as refused:
            node1.hypervisor.migrate(
                spec.vm_id,
                spec,
                Stamp(epoch=2, turn=3),
                libvirt_uri="qemu+tls://192.0.2.1/system",
                migration_uri="tcp://192.0.2.1",
                copied_volume_ids=(),
                options=MigrationOptions(),
                control=Control(),
            )
        assert refused.value.code == "migration-unsafe"
        # What an earlier attempt left: it must be made anew, not filled up.
        node2.hypervisor.ensure_volume(replace(volume, base_image_id="", base_image_format=None), node2.local_pool)
        done = Migration(node1, node2, spec, copied=(volume,)).ended()
        assert isinstance(done, MigrationResult)
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
        node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume,), Stamp(epoch=2, turn=4))
        assert not node1.hypervisor.observe_volume(volume.volume_id, node1.local_pool).is_present
        moved = wait_for_tick(node2, spec.vm_id, tick + 1)
        node2.hypervisor.change_power(spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=2, turn=5))
        assert state_of(node2, spec.vm_id) == (DomainState.STOPPED, StateReason.DESTROYED)
        before = node2.hypervisor.read_console(spec.vm_id, -1, 1)[1]
        node2.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=2, turn=6))
        until(
            lambda: b" uptime " in node2.hypervisor.read_console(spec.vm_id, before, 65536)[0].rpartition(b"GUEST UP")[2],
            what="a tick after the restart",
            deadline_s=BOOT_TIMEOUT_S,
        )
        after = node2.hypervisor.read_console(spec.vm_id, before, 65536)[0].decode(errors="replace")
        first = int(after.partition("GUEST UP")[2].partition("tick ")[2].split()[0])
        assert first >= moved, "the counter on the copied disk went back"


def test_a_move_that_loses_its_peer_or_its_libvirtd_leaves_the_guest_where_it_was(
    lab: Lab, node1: KvmHost, node2: KvmHost
) -> None:
    spec = spec_of(node1, "faults", node1.shared_pool)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 2)
        move = Migration(node1, node2, spec, options=SLOW)
        until(lambda: move.control.reports[-1:] and move.control.reports[-1].rate_bytes_s, what="a rate")
        lab.cut("node2", network="control")
        outcome = move.ended()
        lab.heal("node2")
        assert isinstance(outcome, DeadlineExceeded)
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)

        move = Migration(node1, node2, spec, options=SLOW)
        until(lambda: move.control.reports[-1:] and move.control.reports[-1].rate_bytes_s, what="a rate")
        lab.signal_service("node1", "libvirtd", signal.SIGKILL)
        assert isinstance(move.ended(), DeadlineExceeded)
        with contextlib.suppress(Unavailable):
            node1.hypervisor.list_domains()
        until(node1.hypervisor.is_up, what="libvirt again")
        assert state_of(node1, spec.vm_id)[0] is DomainState.RUNNING
        wait_for_state(node2, spec.vm_id, DomainState.ABSENT)
        kept = node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=1, turn=9))
        assert (kept.state, kept.epoch, kept.turn) == (DomainState.RUNNING, 1, 9)
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (), Stamp(epoch=1, turn=9))
        wait_for_tick(node1, spec.vm_id, tick + 2)


def test_a_uefi_guest_moves_with_its_variables(node1: KvmHost, node2: KvmHost) -> None:
    spec = spec_of(node1, "uefi", node1.local_pool, firmware=Firmware.UEFI, memory_mib=256, memory_max_mib=512, vcpus_max=2)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        wait_for_tick(node1, spec.vm_id, 2)
        done = Migration(node1, node2, spec, copied=(volume_of(spec),)).ended()
        assert isinstance(done, MigrationResult), done
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, spec, (), Stamp(epoch=2, turn=4))
        node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, spec, (volume_of(spec),), Stamp(epoch=2, turn=4))
        wait_for_tick(node2, spec.vm_id, 4)
