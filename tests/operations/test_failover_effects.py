"""What failover does besides: the dead return, moves break, guests end alone; what its leases are counted on for."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.claim_view import claims_of
from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_controller.fencing import Power
from trimtab_controller.loops.failover import LEADERS_WINDOW_S
from trimtab_controller.loops.fence_readiness import FenceReadiness
from trimtab_controller.store import claims, describe, failover, host_guards, hosts, leases, schema
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=5))


# --- the return of the dead ----------------------------------------------------------------------------------------------------


def test_what_a_moved_vm_left_behind_goes_once_its_new_home_is_seen_to_run_it(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    old = story.fleet.hypervisor(vm.host_id)
    old.boot()
    assert vm.id in old.domains, "the machine came back with the definition"
    story.return_of(vm.host_id)
    story.rounds(ROUNDS, until=lambda: vm.id not in old.domains)
    assert vm.id not in old.domains
    assert story.fleet.running_on(vm.id) == {story.fleet.vm(vm.id).host_id}
    cleaned = [one for one in story.operations(vm.id) if one.kind == "vm.clean_copy"]
    assert [(one.state.value, one.params["kill"]) for one in cleaned] == [("done", False)]


def test_a_copy_that_ran_on_although_an_operator_called_its_host_off_is_destroyed_at_its_return(story: Story) -> None:
    vm = story.kept_vm()
    story.lose(vm.host_id)
    for volume in story.fleet.fleet.store(vm.host_id, describe.pool_spec(story.fleet.shared)).volumes.values():
        volume.writer = None  # storage that knows no locks
    story.confirm_off(vm.host_id)
    story.rounds(ROUNDS, until=lambda: len(story.fleet.running_on(vm.id)) == 2)
    after = story.fleet.vm(vm.id)
    assert after.host_id != vm.host_id, "the operator was wrong"
    story.rounds(5)
    story.return_of(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.fleet.running_on(vm.id) == {after.host_id})
    story.rounds(10)
    assert story.fleet.running_on(vm.id) == {after.host_id}
    assert "alarm.stale-copy" in story.kinds()


@pytest.mark.parametrize("is_lying", [True, False])
def test_a_power_device_that_said_off_of_a_host_that_never_was_is_told_of_at_its_return(story: Story, is_lying: bool) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    if is_lying:
        story.device.cut = lambda _name: None
        for volume in story.fleet.fleet.store(vm.host_id, describe.pool_spec(story.fleet.shared)).volumes.values():
            volume.writer = None  # storage that knows no locks
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.fleet.vm(vm.id).observed_host_id not in {"", vm.host_id})
    if not is_lying:
        story.fleet.reboots(vm.host_id)
    story.return_of(vm.host_id)
    story.rounds(20)
    assert ("alarm.fence-false" in story.kinds()) is is_lying
    assert story.fleet.running_on(vm.id) == {story.fleet.vm(vm.id).host_id}, "the copy that ran on is gone"


def test_a_host_that_was_only_silent_keeps_its_running_vms(story: Story) -> None:
    vm = story.kept_vm()
    story.lose(vm.host_id)
    story.rounds(20)
    story.return_of(vm.host_id)
    story.rounds(60)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]


def test_a_host_that_comes_back_in_the_moment_of_its_fencing_loses_no_vm(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    # The device says off and did nothing, and the host renews before that is recorded.
    story.device.cut = lambda host_id: story.silence(host_id, HostConnectivity.UP)
    story.lose(vm.host_id)
    story.rounds(40)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]


# --- migrations -----------------------------------------------------------------------------------------------------------------


def cut_and_release(story: Story, copying: Fault) -> None:
    """Let the copy go on, and fail, once the power is gone."""

    def cut(host_id: str) -> None:
        story.power_cut(host_id)
        copying.released.set()

    story.device.cut = cut


def begin_move(story: Story, vm: Vm | None = None) -> tuple[Vm, str, Fault]:
    """Return a vm whose memory is being copied, the target, and what holds the copy."""
    vm = vm or story.kept_vm()
    copying = story.fleet.hold("migrate.copying", Fault(FaultKind.HANG))
    story.fleet.accept_power(vm, "migrate")
    story.fleet.settle(until=copying.met.is_set)
    row = story.fleet.db.read(lambda session: claims.migration_of(session, vm.id))
    assert row is not None
    return vm, row.target_host_id, copying


def test_a_vm_goes_on_at_its_source_when_the_target_of_its_migration_dies(story: Story) -> None:
    vm, target, copying = begin_move(story)
    story.arm(target)
    cut_and_release(story, copying)
    story.lose(target)
    story.rounds(ROUNDS, until=lambda: story.fleet.db.read(lambda session: claims.migration_of(session, vm.id)) is None)
    story.rounds(3)
    after = story.fleet.vm(vm.id)
    assert story.fleet.running_on(vm.id) == {vm.host_id} == {after.host_id}
    assert claims_of(story.fleet, vm.id) == {vm.host_id: "home"}
    assert after.epoch > vm.epoch
    assert [one.state.value for one in story.operations(vm.id) if one.kind == "vm.settle_move"] == ["done"]
    assert len([one for one in story.fleet.fleet.oracle if one.event == "start"]) == 1, "its memory was never lost"


@pytest.mark.parametrize("dies", ["source", "target"])
def test_a_move_of_a_vm_that_the_leader_had_its_eyes_on_already_has_two_holders(story: Story, dies: str) -> None:
    vm = story.kept_vm()
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    story.silence(vm.host_id, HostConnectivity.SUSPECT)
    story.rounds(2)
    # It is heard again and a move begins, both between two looks of the leader.
    story.silence(vm.host_id, HostConnectivity.UP)
    vm, target, copying = begin_move(story, vm)
    story.rounds(2)
    assert {one.host for one in story.loop.state.vms[vm.id].holders} == {vm.host_id, target}
    lost = vm.host_id if dies == "source" else target
    story.arm(lost)
    cut_and_release(story, copying)
    story.lose(lost)
    story.rounds(ROUNDS, until=lambda: story.fleet.db.read(lambda session: claims.migration_of(session, vm.id)) is None)
    story.rounds(ROUNDS, until=lambda: len(story.fleet.running_on(vm.id)) == 1)
    after = story.fleet.vm(vm.id)
    assert story.fleet.running_on(vm.id) == {after.host_id}
    assert after.host_id != lost
    assert claims_of(story.fleet, vm.id) == {after.host_id: "home"}


def test_a_vm_starts_anew_when_its_source_dies_after_the_half_copy_is_gone(story: Story) -> None:
    vm, target, copying = begin_move(story)
    story.arm(vm.host_id)
    cut_and_release(story, copying)
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.is_home_again(vm)
    after = story.fleet.vm(vm.id)
    assert claims_of(story.fleet, vm.id) == {after.host_id: "home"}
    assert story.fleet.db.read(lambda session: claims.migration_of(session, vm.id)) is None
    kinds = [one.kind for one in story.operations(vm.id)]
    assert kinds.count("vm.recover") == 1
    if after.host_id != target:
        assert vm.id not in story.fleet.hypervisor(target).domains


def test_a_guest_whose_host_restarted_while_it_was_on_its_way_starts_again(story: Story) -> None:
    vm, _target, copying = begin_move(story)
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    # The host is back before anybody missed it: its move ends undone, and the guest is off, all between two looks of the leader.
    story.fleet.reboots(vm.host_id)
    copying.released.set()
    story.fleet.settle()
    story.hear()
    assert story.fleet.running_on(vm.id) == frozenset()
    assert story.fleet.db.read(lambda session: claims.migration_of(session, vm.id)) is None
    story.rounds(30, until=lambda: bool(story.fleet.running_on(vm.id)))
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)][-1] == "vm.recover"


# --- guests that end alone ------------------------------------------------------------------------------------------------------


def crash(story: Story, vm: Vm) -> None:
    story.fleet.hypervisor(story.fleet.vm(vm.id).host_id).crash_guest(vm.id)
    story.hear()


def test_a_guest_that_crashes_alone_starts_again_on_its_own_host(story: Story) -> None:
    vm = story.kept_vm()
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    crash(story, vm)
    assert story.fleet.running_on(vm.id) == frozenset()
    story.rounds(30, until=lambda: bool(story.fleet.running_on(vm.id)))
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert story.fleet.vm(vm.id).epoch > vm.epoch


def test_a_guest_without_ha_or_ended_on_purpose_stays_off(story: Story) -> None:
    loose, kept = story.fleet.running_vm("loose"), story.kept_vm()
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    story.fleet.hypervisor(loose.host_id).crash_guest(loose.id)
    story.fleet.hypervisor(kept.host_id).stop_by_hand(kept.id)
    story.hear()
    story.rounds(40)
    assert story.fleet.running_on(loose.id) == story.fleet.running_on(kept.id) == frozenset()


def test_a_guest_that_keeps_crashing_is_left_to_its_owner_until_he_starts_it(story: Story) -> None:
    vm = story.kept_vm()
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    for _crash in range(5):
        crash(story, vm)
        story.rounds(60, until=lambda: story.fleet.vm(vm.id).observed_state is ObservedState.RUNNING)
    after = story.fleet.vm(vm.id)
    assert after.attention == "failover"
    assert "crashed 5 times" in after.problem
    assert story.fleet.running_on(vm.id) == frozenset()
    story.rounds(60)
    assert story.fleet.running_on(vm.id) == frozenset()
    story.fleet.accept_power(story.fleet.vm(vm.id), "start")
    story.fleet.settle()
    assert story.fleet.vm(vm.id).attention == ""
    assert len(story.fleet.running_on(vm.id)) == 1


def test_a_vm_whose_image_is_marked_corrupt_is_not_started_again_and_again(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    corrupt = Conflict("image-corrupt", "could not start the domain: a disk's image is marked corrupt")
    for host_id in story.fleet.host_ids:
        story.fleet.fleet.plan_fault("change_power", Fault(FaultKind.FAIL_BEFORE, error=corrupt), host_id=host_id)
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: bool(story.fleet.vm(vm.id).attention))
    assert "marked corrupt" in story.fleet.vm(vm.id).problem
    story.rounds(30)
    assert story.fleet.running_on(vm.id) == frozenset()
    assert [one.kind for one in story.operations(vm.id)].count("vm.recover") == 1


def test_a_vm_on_local_disks_says_what_is_lost_with_its_host(story: Story) -> None:
    vm = story.kept_vm(pool=story.fleet.local)
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.confirm_off(vm.host_id)
    story.rounds(40)
    problem = story.fleet.vm(vm.id).problem
    assert "its disks lie on node" in problem, "by its name, not its id"
    assert "backup restore" in problem
    assert story.fleet.vm(vm.id).host_id == vm.host_id


def test_a_delayed_vm_waits_after_its_host_was_fenced(story: Story) -> None:
    late, early = story.kept_vm("late", start_delay_s=30), story.kept_vm("early")
    story.rounds(1)
    for vm in (late, early):
        story.arm(vm.host_id)
    story.lose(late.host_id)
    story.rounds(ROUNDS, until=lambda: "failover.fenced" in story.kinds())
    fenced_s = story.fleet.clock.boottime_s()
    story.rounds(ROUNDS, until=lambda: story.is_home_again(late))
    assert story.is_home_again(late)
    assert story.fleet.clock.boottime_s() - fenced_s >= 29


def test_a_device_that_says_off_of_a_living_host_is_not_asked_when_the_host_is_lost(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    readiness = FenceReadiness(
        db=story.fleet.db, clock=story.fleet.clock, fencer=story.device, open_secret=lambda sealed, _place: sealed
    )
    story.device.says = Power.OFF
    readiness.run(story.fleet.term)
    (path,) = story.fleet.db.read(failover.fence_paths)
    assert not path.is_ready
    assert "heard from" in path.test_message
    assert "alarm.fence-not-ready" in story.kinds()
    story.lose(vm.host_id)
    story.rounds(40)
    assert story.device.asked == []
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    story.device.says = Power.ON
    story.fleet.clock.advance(120)
    readiness.run(story.fleet.term)
    assert story.fleet.db.read(failover.fence_paths)[0].is_ready
    assert story.kinds()[-1] == "host.fence_ready"


def test_no_vm_is_assigned_anew_while_a_holder_may_run_it_whatever_was_decided(story: Story) -> None:
    """The decision was made on a snapshot; the rows that the assignment changes are asked once more in its own transaction."""
    vm = story.kept_vm()
    story.rounds(2)
    seen = story.loop._read()
    story.loop._hands.carry_out(
        do.StartVm(vm=vm.id, host=vm.host_id, epoch=vm.epoch + 1, is_recovery=True), story.fleet.term, seen
    )
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]
    assert story.fleet.running_on(vm.id) == {vm.host_id}


def by_lease(story: Story, vm: Vm, *, ago_ms: int, guard: HostGuard) -> float:
    """Lose the vm's host without a power device, its gateway saying that it last granted so long ago; return when that was."""
    fleet, gateway_id = story.fleet, "gw-1"

    def prepare(session: Any) -> None:
        table = schema.host
        session.execute(table.update().where(table.c.id == vm.host_id).values(gateway_id=gateway_id))
        number = hosts.get(session, vm.host_id).lease_number
        assert host_guards.write(session, vm.host_id, guard, lease_number=number, now=fleet.clock.now())
        leases.take(
            session, leases.GATEWAY_PREFIX + gateway_id, owner=gateway_id, seen=None, ttl_ms=15_000, now=fleet.clock.now()
        )

    fleet.db.write(prepare)
    story.lose(vm.host_id)
    story.rounds(10, until=lambda: bool(fleet.db.read(leases.revocations)))
    (revocation,) = fleet.db.read(leases.revocations)
    said_s = fleet.clock.boottime_s()
    fleet.db.write(
        lambda session: leases.acknowledge(
            session, vm.host_id, number=revocation.number, gateway_id=gateway_id, granted_ago_ms=ago_ms
        )
    )
    return said_s - ago_ms / 1000


def is_fenced(story: Story, vm: Vm) -> bool:
    return story.fleet.db.read(lambda session: hosts.get(session, vm.host_id)).connectivity is HostConnectivity.FENCED


def test_the_lease_of_an_armed_host_is_counted_from_its_last_granted_renewal_and_then_its_vm_starts_elsewhere(
    story: Story,
) -> None:
    vm = story.kept_vm()
    granted_s = by_lease(story, vm, ago_ms=12_000, guard=HostGuard(is_armed=True))
    story.rounds(60, until=lambda: is_fenced(story, vm))
    assert is_fenced(story, vm)
    took_s = story.fleet.clock.boottime_s() - granted_s
    wait_s = story.loop.state.settings.lease_wait_s(3.0)
    assert wait_s <= took_s <= wait_s + 3.0
    assert story.record(vm.host_id).proof == "lease_bound"
    story.power_cut(vm.host_id)  # as its warden did, long before
    story.rounds(ROUNDS, until=lambda: bool(story.fleet.running_on(vm.id)))
    assert story.fleet.running_on(vm.id) == {story.fleet.vm(vm.id).host_id} != {vm.host_id}


def test_a_gateway_that_died_long_ago_holds_no_recovery_up(story: Story) -> None:
    def die(session: Any) -> None:
        leases.take(session, leases.GATEWAY_PREFIX + "gw-0", owner="gw-0", seen=None, ttl_ms=15_000, now=story.fleet.clock.now())

    vm = story.kept_vm()
    story.fleet.db.write(die)
    granted_s = by_lease(story, vm, ago_ms=12_000, guard=HostGuard(is_armed=True))
    story.rounds(60, until=lambda: is_fenced(story, vm))
    wait_s = story.loop.state.settings.lease_wait_s(3.0)
    assert wait_s <= story.fleet.clock.boottime_s() - granted_s <= wait_s + 3.0


def test_a_host_that_kills_slowly_is_waited_for_longer(story: Story) -> None:
    vm = story.kept_vm()
    granted_s = by_lease(story, vm, ago_ms=12_000, guard=HostGuard(is_armed=True, kill_ms=20_000))
    story.rounds(60, until=lambda: is_fenced(story, vm))
    assert story.fleet.clock.boottime_s() - granted_s >= 35.0 * 1.02


@pytest.mark.parametrize(
    "guard", [HostGuard(is_armed=False), HostGuard(is_armed=True, beacon_pool_id="pool-a")], ids=["not-armed", "has-a-beacon"]
)
def test_nothing_follows_from_a_lease_that_no_warden_ends_or_that_a_beacon_may_renew(story: Story, guard: HostGuard) -> None:
    vm = story.kept_vm()
    by_lease(story, vm, ago_ms=12_000, guard=guard)
    story.rounds(120)
    assert not is_fenced(story, vm)
    assert story.fleet.vm(vm.id).host_id == vm.host_id


def test_where_the_gateway_of_the_session_did_not_say_when_it_granted_the_lease_is_counted_from_the_end_of_granting(
    story: Story,
) -> None:
    vm = story.kept_vm()
    by_lease(story, vm, ago_ms=-1, guard=HostGuard(is_armed=True))
    said_s = story.fleet.clock.boottime_s()
    story.rounds(60, until=lambda: is_fenced(story, vm))
    assert story.fleet.clock.boottime_s() - said_s >= story.loop.state.settings.lease_wait_s(3.0)
