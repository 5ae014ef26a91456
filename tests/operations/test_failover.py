"""A host dies, and its vms live: the leader's loop on a real store, real engine and real agents over simulated hosts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.operations.kit import FleetStory, claims_of
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_controller.fencing import FencePath, Power, PowerAnswer
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, FailoverLoop
from trimtab_controller.services import recovery
from trimtab_controller.store import events, failover, host_guards, hosts, leases, schema
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict

ROUNDS = 120


@dataclass
class Device:
    """A power device at the seam: what it does to the simulated host is the test's to say."""

    answer: Power = Power.OFF
    cut: Callable[[str], None] = lambda _name: None
    asked: list[str] = field(default_factory=list)

    def status(self, path: FencePath) -> PowerAnswer:
        return PowerAnswer(power=Power.ON)

    def switch_off(self, path: FencePath, *, timeout_s: float, may_still: Callable[[], bool]) -> PowerAnswer:
        if not may_still():
            return PowerAnswer(power=Power.UNKNOWN, message="not switched off")
        self.asked.append(path.name)
        if self.answer is Power.OFF:
            self.cut(path.options["plug"])
        return PowerAnswer(power=self.answer, message="" if self.answer is Power.OFF else "no answer")


@dataclass
class Story:
    fleet: FleetStory
    device: Device
    loop: FailoverLoop

    def kept_vm(self, name: str = "db", **wishes: object) -> Vm:
        return self.fleet.running_vm(name, ha="restart", **wishes)

    def arm(self, host_id: str) -> None:
        """Give the host a power device."""

        def work(session: object) -> None:
            host = hosts.get(session, host_id)  # type: ignore[arg-type]
            path = FencePath(name=f"bmc-{host_id}", agent="fence_redfish", options={"plug": host_id})
            recovery.configure_fence(session, host, [path], actor=self.fleet.actor, now=self.fleet.clock.now())  # type: ignore[arg-type]

        self.fleet.db.write(work)

    def silence(self, host_id: str, to: HostConnectivity) -> None:
        """Write what a gateway writes of a host that it does not hear."""
        self.fleet.db.write(
            lambda session: session.execute(schema.host.update().where(schema.host.c.id == host_id).values(connectivity=to.value))
        )

    def lose(self, host_id: str) -> None:
        self.rounds(int(LEADERS_WINDOW_S) + 4)
        self.silence(host_id, HostConnectivity.SUSPECT)
        self.rounds(2)
        self.silence(host_id, HostConnectivity.LOST)

    def rounds(self, count: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let the leader look once a second, as its lane does."""
        for _round in range(count):
            if until():
                return
            self.loop.run(self.fleet.term)
            self.fleet.placement.run(self.fleet.term)
            self.fleet.clock.advance(1.0)

    def power_cut(self, host_id: str) -> None:
        self.fleet.hypervisor(host_id).crash()

    def record(self, host_id: str) -> failover.FailoverRow:
        row = self.fleet.db.read(lambda session: failover.open_record(session, host_id))
        assert row is not None
        return row

    def kinds(self) -> list[str]:
        return [one.kind for one in self.fleet.db.read(lambda session: events.page_after(session, 0, limit=1000))]


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    fleet = new_story(host_count=5)
    device = Device()
    loop = FailoverLoop(engine=fleet.engine, clock=fleet.clock, fencer=device)
    made = Story(fleet, device, loop)
    device.cut = made.power_cut
    yield made
    loop.close()


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
    assert [line["proof"] for line in record.evidence] == ["", "power_off"]
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
    second = FailoverLoop(engine=story.fleet.new_engine(), clock=story.fleet.clock, fencer=story.device)
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
