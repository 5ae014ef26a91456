"""A host dies, and its vms live: the leader's loop on a real store, real engine and real agents over simulated hosts."""

from collections.abc import Callable, Iterator

import pytest

from tests.operations.claim_view import claims_of
from tests.operations.failover_kit import ROUNDS, AtOnce, Later, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.fencing import Power
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, URGENT_FOR_S, FailoverLoop
from trimtab_controller.loops.failover_effects import DRIVES_AT_ONCE
from trimtab_controller.services import recovery
from trimtab_controller.store import failover, hosts, leases
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
    second = FailoverLoop(
        engine=story.fleet.new_engine(), clock=story.fleet.clock, fencer=story.device, askers=AtOnce(), drivers=AtOnce()
    )
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


# --- the return of the dead ----------------------------------------------------------------------------------------------------


@pytest.fixture
def large(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    """A fleet of which two hosts may be lost at once."""
    yield from story_of(new_story(host_count=10))


def test_a_recovery_that_hangs_on_its_new_host_delays_the_recovery_of_no_other_host(large: Story) -> None:
    held_up, fleet = Later(), large.fleet
    large.loop.close()
    large.loop = FailoverLoop(engine=fleet.engine, clock=fleet.clock, fencer=large.device, askers=AtOnce(), drivers=held_up)
    first = large.kept_vm("first")
    second = large.kept_vm("second", to_host_id=next(one for one in fleet.host_ids if one != first.host_id))
    for vm in (first, second):
        large.arm(vm.host_id)
        large.lose(vm.host_id)
        large.rounds(ROUNDS, until=lambda vm_id=vm.id: vm_id in large.loop._hands.restarts)  # type: ignore[misc]
    assert large.device.asked == [f"bmc-{first.host_id}", f"bmc-{second.host_id}"]
    assert not fleet.running_on(first.id), "it is still being driven"
    assert len(held_up.left) <= DRIVES_AT_ONCE, "a storm does not take a thread for each round"
    large.rounds(20, until=lambda: not held_up.do() and large.is_home_again(first) and large.is_home_again(second))
    assert large.is_home_again(first)
    assert large.is_home_again(second)


def test_a_recovery_to_a_host_that_dies_too_is_begun_again_by_the_next_leader(large: Story) -> None:
    fleet, held_up, vm = large.fleet, Later(), large.kept_vm()
    large.loop.close()
    large.loop = FailoverLoop(engine=fleet.engine, clock=fleet.clock, fencer=large.device, askers=AtOnce(), drivers=held_up)
    large.arm(vm.host_id)
    large.lose(vm.host_id)
    large.rounds(ROUNDS, until=lambda: not held_up.do() and fleet.vm(vm.id).host_id != vm.host_id)
    second_home = fleet.vm(vm.id).host_id
    # It dies as the guest is being started on it, and the leader once it has recorded that that host is off, too.
    large.power_cut(second_home)
    held_up.do()
    large.silence(second_home, HostConnectivity.FENCED)
    large.loop.close()
    large.loop = FailoverLoop(
        engine=fleet.new_engine(), clock=fleet.clock, fencer=large.device, askers=AtOnce(), drivers=AtOnce()
    )
    large.rounds(ROUNDS, until=lambda: large.is_home_again(vm))
    assert large.is_home_again(vm)
    assert fleet.vm(vm.id).host_id != second_home


def test_a_round_comes_sooner_while_a_lost_host_is_not_proven_off_and_not_for_ever(story: Story) -> None:
    vm = story.kept_vm()
    story.rounds(2)
    assert not story.loop.is_urgent()
    story.lose(vm.host_id)
    story.rounds(5)
    assert story.loop.state.hosts[vm.host_id].standing is HostConnectivity.LOST
    assert story.loop.is_urgent()
    story.rounds(int(URGENT_FOR_S) + 5)
    assert not story.loop.is_urgent(), "nobody can prove it off; once a second is enough"
