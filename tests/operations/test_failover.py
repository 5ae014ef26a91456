"""A host dies, and its vms live: the leader's loop on a real store, real engine and real agents over simulated hosts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.failover_kit import ROUNDS, AtOnce, Story, story_of
from tests.operations.kit import FleetStory, claims_of
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_controller.fencing import Power
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, FailoverLoop
from trimtab_controller.services import recovery
from trimtab_controller.store import claims, describe, failover, host_guards, hosts, leases, schema
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=5))


def test_the_vm_of_a_dead_host_runs_elsewhere_after_its_power_was_read_back_off(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.fleet.vm(vm.id).host_id != vm.host_id and bool(story.fleet.running_on(vm.id)))
    after = story.fleet.vm(vm.id)
    assert story.fleet.running_on(vm.id) == {after.host_id} != {vm.host_id}
    assert after.epoch > vm.epoch
    assert claims_of(story.fleet, vm.id) == {after.host_id: "home"}
    record = story.record(vm.host_id)
    assert (record.state, record.proof) == ("fenced", "power_off")
    assert [line["proof"] for line in record.evidence] == ["", "", "power_off"], "suspected, lost, fenced"
    story.rounds(5)
    rows = story.fleet.db.read(lambda session: failover.vms_of(session, record.id))
    assert [(row.vm_id, row.state) for row in rows] == [(vm.id, "running")]
    assert story.fleet.vm(vm.id).observed_state is ObservedState.RUNNING
    assert len(story.device.asked) == 1
    assert story.kinds().count("failover.fenced") == 1


def test_a_device_that_does_not_answer_moves_nothing_until_an_operator_confirms(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.device.answer = Power.UNKNOWN
    story.lose(vm.host_id)
    story.rounds(60)
    assert story.fleet.vm(vm.id).host_id == vm.host_id
    assert story.record(vm.host_id).state == "lost"
    assert "alarm.fence-failed" in story.kinds()
    story.power_cut(vm.host_id)
    host = story.fleet.db.read(lambda session: hosts.get(session, vm.host_id))
    story.fleet.db.write(
        lambda session: recovery.confirm_off(
            session, host, reason="pulled the plug", actor=story.fleet.actor, now=story.fleet.clock.now()
        )
    )
    story.rounds(ROUNDS, until=lambda: bool(story.fleet.running_on(vm.id)))
    assert story.record(vm.host_id).proof == "operator"
    assert story.fleet.running_on(vm.id) == {story.fleet.vm(vm.id).host_id}


def test_nobody_confirms_off_a_host_that_is_heard(story: Story) -> None:
    host = story.fleet.db.read(lambda session: hosts.get(session, story.fleet.host_ids[0]))
    with pytest.raises(Conflict) as refused:
        story.fleet.db.write(
            lambda session: recovery.confirm_off(session, host, reason="I think so", actor=story.fleet.actor, now=host.created_at)
        )
    assert refused.value.code == "host-is-heard"


def test_a_vm_with_ha_none_stays_where_it_is(story: Story) -> None:
    vm = story.fleet.running_vm("web1")
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.rounds(60)
    assert story.fleet.vm(vm.id).host_id == vm.host_id
    assert story.device.asked == [], "nothing is gained by switching it off"


def test_many_hosts_lost_at_once_freeze_failover_until_one_is_released(story: Story) -> None:
    vm = story.kept_vm()
    for host_id in story.fleet.host_ids:
        story.arm(host_id)
    story.rounds(int(LEADERS_WINDOW_S) + 4)
    lost = [vm.host_id, next(host for host in story.fleet.host_ids if host != vm.host_id)]
    for to in (HostConnectivity.SUSPECT, HostConnectivity.LOST):
        for host_id in lost:
            story.silence(host_id, to)
        story.rounds(3)
    story.rounds(30)
    assert story.device.asked == []
    assert "2 of 5 hosts" in story.fleet.db.read(failover.control).frozen
    host = story.fleet.db.read(lambda session: hosts.get(session, vm.host_id))
    story.fleet.db.write(
        lambda session: recovery.release(
            session, host, reason="its rack burnt", actor=story.fleet.actor, now=story.fleet.clock.now()
        )
    )
    story.rounds(ROUNDS, until=lambda: story.fleet.vm(vm.id).host_id != vm.host_id and bool(story.fleet.running_on(vm.id)))
    assert story.device.asked == [f"bmc-{vm.host_id}"]
    assert len(story.fleet.running_on(vm.id)) == 1


def test_paused_by_an_operator_it_does_nothing(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.fleet.db.write(lambda session: recovery.set_paused(session, True, actor=story.fleet.actor, now=story.fleet.clock.now()))
    story.lose(vm.host_id)
    story.rounds(40)
    assert story.device.asked == []


def test_a_leader_that_dies_after_the_fence_is_followed_by_one_that_starts_the_vm_once(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.rounds(
        ROUNDS, until=lambda: story.fleet.db.read(lambda session: hosts.get(session, vm.host_id)).connectivity.value == "fenced"
    )
    second = FailoverLoop(engine=story.fleet.new_engine(), clock=story.fleet.clock, fencer=story.device, askers=AtOnce())
    first, story.loop = story.loop, second
    first.close()
    story.rounds(ROUNDS, until=lambda: bool(story.fleet.running_on(vm.id)))
    story.rounds(20)
    second.close()
    assert len(story.fleet.running_on(vm.id)) == 1
    assert len(story.device.asked) == 1
    starts = [entry for entry in story.fleet.fleet.oracle if entry.event == "start" and entry.vm_id == vm.id]
    assert len(starts) == 2, "its first start, and the one of its recovery"


def test_a_host_that_comes_back_may_renew_again_and_its_loss_is_closed(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.fleet.vm(vm.id).host_id != vm.host_id and bool(story.fleet.running_on(vm.id)))
    record = story.record(vm.host_id)
    assert [one.host_id for one in story.fleet.db.read(leases.revocations)] == [vm.host_id]
    story.fleet.hypervisor(vm.host_id).boot()
    story.silence(vm.host_id, HostConnectivity.UP)
    story.rounds(5)
    assert story.fleet.db.read(leases.revocations) == ()
    closed = story.fleet.db.read(lambda session: failover.get_record(session, record.id))
    assert closed is not None
    assert closed.state == "returned"
    assert story.fleet.running_on(vm.id) == {story.fleet.vm(vm.id).host_id}


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


def begin_move(story: Story) -> tuple[Vm, str, Fault]:
    """Return a vm whose memory is being copied, the target, and what holds the copy."""
    vm = story.kept_vm()
    copying = story.fleet.hold("migrate.copying", Fault(FaultKind.HANG))
    story.fleet.accept_power(vm, "migrate")
    story.fleet.settle(until=copying.met.is_set)
    row = story.fleet.db.read(lambda session: claims.migration_of(session, vm.id))
    assert row is not None
    return vm, row.target_host_id, copying


def test_a_vm_goes_on_at_its_source_when_the_target_of_its_migration_dies(story: Story) -> None:
    vm, target, copying = begin_move(story)
    story.arm(target)
    story.device.cut = lambda host_id: (story.power_cut(host_id), copying.released.set())
    story.lose(target)
    story.rounds(ROUNDS, until=lambda: story.fleet.db.read(lambda session: claims.migration_of(session, vm.id)) is None)
    story.rounds(3)
    after = story.fleet.vm(vm.id)
    assert story.fleet.running_on(vm.id) == {vm.host_id} == {after.host_id}
    assert claims_of(story.fleet, vm.id) == {vm.host_id: "home"}
    assert after.epoch > vm.epoch
    assert [one.state.value for one in story.operations(vm.id) if one.kind == "vm.settle_move"] == ["done"]
    assert len([one for one in story.fleet.fleet.oracle if one.event == "start"]) == 1, "its memory was never lost"


def test_a_vm_starts_anew_when_its_source_dies_after_the_half_copy_is_gone(story: Story) -> None:
    vm, target, copying = begin_move(story)
    story.arm(vm.host_id)
    story.device.cut = lambda host_id: (story.power_cut(host_id), copying.released.set())
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
    assert "its disks lie on" in problem
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
