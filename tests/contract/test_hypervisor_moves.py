"""What every hypervisor promises about volumes that go to another pool of their host. See `hosts.py` for the hosts.

That a guest's counter goes on and that no byte is lost is asked of real guests in `tests/lab/test_fleet_moves.py`.
"""

from dataclasses import replace

import pytest

from tests.contract.hosts import MIB, Control, Hosts, Side, Vm, power, refusal, with_evil_disk
from trimtab_agent.hypervisor.base import Stamp
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import DiskFormat, DomainSpec, DomainState, PowerAction, VolumeSpec
from trimtab_protos.volume_messages import VolumeMove

pytestmark = [pytest.mark.timeout(900)]
STAMP = Stamp(epoch=1, turn=5)


def move_of(side: Side, vm: Vm, **changes: object) -> VolumeMove:
    move = VolumeMove(
        volume_id=vm.volume.volume_id,
        source_pool=side.shared_pool,
        target_pool=side.local_pool,
        source_format=DiskFormat.QCOW2,
        target_format=DiskFormat.QCOW2,
        size_bytes=vm.volume.size_bytes,
        vm_id=vm.id,
        keeps_running=True,
        takes_state_files=True,
    )
    return replace(move, **changes)  # type: ignore[arg-type]


def going(side: Side, vm: Vm) -> DomainSpec:
    """The vm's spec while its disk moves: whoever defines it finds the side that is whole."""
    (disk,) = vm.spec.disks
    moving = replace(disk, move_pool_id=side.local_pool.pool_id, move_format=DiskFormat.QCOW2)
    return replace(vm.spec, disks=(moving,), pools=(side.shared_pool, side.local_pool))


def there(side: Side, vm: Vm) -> tuple[bool, bool]:
    """Whether the volume's file is in the (former, new) pool."""
    observe = side.hypervisor.observe_volume
    former, new = observe(vm.volume.volume_id, side.shared_pool), observe(vm.volume.volume_id, side.local_pool)
    return former.is_present, new.is_present


def test_a_running_guest_goes_over_and_nothing_is_left_behind(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    starts = power(side, vm, PowerAction.START).starts
    for _twice in range(2):
        side.hypervisor.move_volume(move_of(side, vm), going(side, vm), STAMP, Control())
        assert there(side, vm) == (False, True)
    for _twice in range(2):
        assert side.hypervisor.settle_move(move_of(side, vm), going(side, vm), STAMP, is_recorded=False)
    seen = side.hypervisor.observe_domain(vm.id)
    assert (seen.state, seen.starts) == (DomainState.RUNNING, starts)
    # The definition followed, and a spec that still names both places leads to the one that is left.
    power(side, vm, PowerAction.FORCE_OFF)
    assert power(side, vm, PowerAction.START).state is DomainState.RUNNING
    power(side, vm, PowerAction.FORCE_OFF)
    side.hypervisor.define_domain(going(side, vm), STAMP)
    assert power(side, vm, PowerAction.START).state is DomainState.RUNNING
    finish(side, vm)


def test_a_raw_disk_that_begins_like_an_image_goes_over_as_its_bytes(hosts: Hosts, name: str) -> None:
    side = hosts.first
    made, header = with_evil_disk(hosts, side, name)
    (disk,) = made.spec.disks
    raw = {"source_format": DiskFormat.RAW, "target_format": DiskFormat.RAW}
    move = move_of(side, made, source_pool=side.local_pool, target_pool=side.shared_pool, **raw)
    moving = replace(disk, move_pool_id=side.shared_pool.pool_id, move_format=DiskFormat.RAW)
    spec = replace(made.spec, disks=(moving,), pools=(side.local_pool, side.shared_pool))
    try:
        power(side, made, PowerAction.START)
        side.hypervisor.move_volume(move, spec, STAMP, Control())
        assert side.hypervisor.settle_move(move, spec, STAMP, is_recorded=False)
        there = side.hypervisor.observe_volume(made.volume.volume_id, side.shared_pool)
        assert (there.is_present, there.size_bytes) == (True, made.volume.size_bytes)
        assert hosts.read(side, made.volume, side.shared_pool, len(header)) == header
    finally:
        side.hypervisor.undefine_domain(
            made.id, (side.local_pool, side.shared_pool), kill_if_running=True, keep_state_files=False
        )
        for pool in (side.local_pool, side.shared_pool):
            side.hypervisor.delete_volume(made.volume.volume_id, pool)


def finish(side: Side, vm: Vm) -> None:
    """End a vm whose disk has gone to the local pool, so that the fixture finds nothing of it."""
    pools = (side.shared_pool, side.local_pool)
    side.hypervisor.undefine_domain(vm.id, pools, kill_if_running=True, keep_state_files=False)
    side.hypervisor.delete_volume(vm.volume.volume_id, side.local_pool)


def test_a_stopped_vms_volume_is_copied_and_stays_until_the_record_says_where_it_is(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    for _twice in range(2):
        side.hypervisor.move_volume(move_of(side, vm), going(side, vm), STAMP, Control())
        assert there(side, vm) == (True, True)
    assert power(side, vm, PowerAction.START).state is DomainState.RUNNING, "what it starts from is the former side"
    power(side, vm, PowerAction.FORCE_OFF)
    recorded = replace(vm.spec, disks=(replace(vm.spec.disks[0], pool_id=side.local_pool.pool_id),), pools=(side.local_pool,))
    for _twice in range(2):
        assert side.hypervisor.settle_move(move_of(side, vm), recorded, STAMP, is_recorded=True)
    assert there(side, vm) == (False, True)
    assert power(side, vm, PowerAction.START).state is DomainState.RUNNING
    finish(side, vm)


def test_a_move_that_is_called_off_leaves_the_guest_where_it_was(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    starts = power(side, vm, PowerAction.START).starts
    control = Control()
    control.cancelled.set()
    slow = move_of(side, vm, bandwidth_bytes_s=MIB)
    assert refusal(lambda: side.hypervisor.move_volume(slow, going(side, vm), STAMP, control)) == (Conflict, "job-cancelled")
    for _twice in range(2):
        assert not side.hypervisor.settle_move(slow, going(side, vm), STAMP, is_recorded=False)
    assert there(side, vm) == (True, False)
    seen = side.hypervisor.observe_domain(vm.id)
    assert (seen.state, seen.starts) == (DomainState.RUNNING, starts)


def test_a_volume_that_another_guest_has_open_is_not_copied(hosts: Hosts, vm: Vm) -> None:
    power(hosts.first, vm, PowerAction.START)
    other = move_of(hosts.second, vm, vm_id="")
    assert refusal(lambda: hosts.second.hypervisor.move_volume(other, None, STAMP, Control())) == (Conflict, "image-locked")


def test_a_move_of_what_is_nowhere_is_refused(hosts: Hosts, vm: Vm) -> None:
    nowhere = replace(move_of(hosts.first, vm), volume_id="vol-nowhere", vm_id="")
    settle = hosts.first.hypervisor.settle_move
    assert refusal(lambda: settle(nowhere, None, STAMP, is_recorded=False))[0] is NotFound


def test_a_volume_apart_becomes_raw_on_the_way(hosts: Hosts) -> None:
    side = hosts.first
    volume = VolumeSpec(volume_id="vol-apart", pool_id=side.shared_pool.pool_id, format=DiskFormat.QCOW2, size_bytes=4 * MIB)
    side.hypervisor.ensure_volume(volume, side.shared_pool)
    move = VolumeMove(
        volume_id=volume.volume_id,
        source_pool=side.shared_pool,
        target_pool=side.local_pool,
        source_format=DiskFormat.QCOW2,
        target_format=DiskFormat.RAW,
        size_bytes=volume.size_bytes,
    )
    side.hypervisor.move_volume(move, None, STAMP, Control())
    assert side.hypervisor.settle_move(move, None, STAMP, is_recorded=True)
    seen = side.hypervisor.observe_volume(volume.volume_id, side.local_pool)
    assert (seen.is_present, seen.size_bytes) == (True, 4 * MIB)
    side.hypervisor.delete_volume(volume.volume_id, side.local_pool)
