"""A leader's failover loop on a real store, real engine and real agents over simulated hosts, with power devices at the seam."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.operations.kit import FleetStory
from trimtab_controller.api.context import NoSecrets
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Operation, Pool, Vm
from trimtab_controller.core.model.failover import FailoverRow
from trimtab_controller.fencing import FencePath, Power, PowerAnswer
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, FailoverLoop
from trimtab_controller.services import fencing, observations, recovery
from trimtab_controller.store import (
    describe,
    events,
    failover,
    host_reports,
    host_troubles,
    hosts,
    leases,
    operations,
    schema,
)

ROUNDS = 120


@dataclass
class Device:
    """A power device at the seam: what it does to the simulated host is the test's to say."""

    answer: Power = Power.OFF
    says: Power = Power.ON
    cut: Callable[[str], None] = lambda _name: None
    asked: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    """Names of devices that do not answer."""

    def status(self, path: FencePath) -> PowerAnswer:
        return PowerAnswer(power=self.says)

    def switch_off(self, path: FencePath, *, timeout_s: float, may_still: Callable[[], bool]) -> PowerAnswer:
        if not may_still():
            return PowerAnswer(power=Power.UNKNOWN, message="not switched off")
        self.asked.append(path.name)
        if path.name in self.dead:
            return PowerAnswer(power=Power.UNKNOWN, message="no answer")
        if self.answer is Power.OFF:
            self.cut(path.options["plug"])
        return PowerAnswer(power=self.answer, message="" if self.answer is Power.OFF else "no answer")


class AtOnce(Executor):
    """Asks agents in the loop's own thread: in virtual time an answer must not come rounds later."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Later(Executor):
    """Keeps what it is given until the test has it done: a thread that a host holds up."""

    def __init__(self) -> None:
        self.left: list[Callable[[], Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.left.append(partial(fn, *args, **kwargs))
        return Future()

    def do(self) -> None:
        """Do all of it."""
        while self.left:
            self.left.pop(0)()


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
            fencing.configure(session, host, [path], box=NoSecrets(), actor=self.fleet.actor, now=self.fleet.clock.now())  # type: ignore[arg-type]

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

    def is_home_again(self, vm: Vm) -> bool:
        """Tell whether the vm runs, on another host than it did."""
        after = self.fleet.vm(vm.id)
        is_elsewhere = after.host_id != vm.host_id and self.fleet.running_on(vm.id) == {after.host_id}
        return is_elsewhere and after.observed_state is ObservedState.RUNNING

    def hear(self) -> None:
        """Let every host that answers say what it holds, as its agent's events would."""

        def work(session: Any) -> None:
            for host_id, hypervisor in self.fleet.fleet.hosts.items():
                if hypervisor.is_up():
                    seen = hypervisor.list_domains()
                    observations.record_all(session, host_id, seen, self.fleet.clock.now(), is_complete=True)

        self.fleet.db.write(work)

    def report(self) -> None:
        """Let every host that answers say what it is and how its pools are, as its heartbeats would."""
        fleet = self.fleet

        def work(session: Any) -> None:
            now = fleet.clock.now()
            for host_id, hypervisor in fleet.fleet.hosts.items():
                if not hypervisor.is_up():
                    continue
                observer = fleet.agents.agent(host_id).observer
                if observer.inventory is None:
                    observer.refresh_inventory()
                observer.refresh()
                assert observer.inventory is not None
                host_reports.store_inventory(session, host_id, observer.inventory, now=now)
                seen = [hypervisor.observe_pool(spec) for spec in host_reports.pool_specs_of(session, host_id)]
                host_reports.store_pools(session, [host_reports.PoolReport(host_id, one) for one in seen], now=now)

        fleet.db.write(work)

    def heartbeats(self, count: int) -> None:
        """As `rounds`, with what hosts report every ten seconds."""
        for number in range(count):
            if number % 10 == 0:
                self.report()
            self.rounds(1)

    def pull_uplink(self, host_id: str, bridge: str = "br0", *, is_out: bool = True) -> None:
        without = self.fleet.hypervisor(host_id).without_carrier
        (without.add if is_out else without.discard)(bridge)

    def cut_storage(self, *host_ids: str, pool: Pool | None = None) -> None:
        """Let these hosts alone not reach the pool any more; none: all do again."""
        world = self.fleet.fleet
        world.observe_hang_s = 0.01
        store = world.store(self.fleet.host_ids[0], describe.pool_spec(pool or self.fleet.shared))
        with world.changed:
            store.hung_on = set(host_ids)
            world.changed.notify_all()

    def troubles(self) -> dict[str, list[str]]:
        """Return what anybody who asks is told of hosts, by host."""
        now = self.fleet.clock.now()
        found = self.fleet.db.read(lambda session: host_troubles.read(session, now=now))
        return {host_id: [f"{one.kind.value}: {one.message}" for one in troubles] for host_id, troubles in found.items()}

    def new_leader(self) -> FailoverLoop:
        """Another process takes the lease over; close what it gives."""
        fleet = self.fleet

        def work(session: Any) -> int:
            seen = leases.read(session, leases.ENGINE)
            assert seen is not None
            taken = leases.take(session, leases.ENGINE, owner="other", seen=seen, ttl_ms=15_000, now=fleet.clock.now())
            assert taken is not None
            return taken.term

        fleet.term = fleet.db.write(work)
        self.loop.close()
        self.loop = FailoverLoop(engine=fleet.engine, clock=fleet.clock, fencer=self.device, askers=AtOnce(), drivers=AtOnce())
        return self.loop

    def return_of(self, host_id: str) -> None:
        """The host opens a session again."""
        self.hear()
        self.silence(host_id, HostConnectivity.UP)

    def confirm_off(self, host_id: str) -> None:
        def work(session: Any) -> None:
            host, now = hosts.get(session, host_id), self.fleet.clock.now()
            recovery.confirm_off(session, host, reason="pulled the plug", actor=self.fleet.actor, now=now)

        self.fleet.db.write(work)

    def record(self, host_id: str) -> FailoverRow:
        row = self.fleet.db.read(lambda session: failover.open_record(session, host_id))
        assert row is not None
        return row

    def operations(self, vm_id: str) -> list[Operation]:
        """Return all operations on the vm, oldest first."""
        return list(reversed(self.fleet.db.read(lambda session: operations.page(session, limit=100, subject_id=vm_id))))

    def kinds(self) -> list[str]:
        return [one.kind for one in self.fleet.db.read(lambda session: events.page_after(session, 0, limit=1000))]


def story_of(fleet: FleetStory) -> Iterator[Story]:
    """Yield the story of a fleet with a leader's loop and power devices."""
    device = Device()
    loop = FailoverLoop(engine=fleet.engine, clock=fleet.clock, fencer=device, askers=AtOnce(), drivers=AtOnce())
    made = Story(fleet, device, loop)
    device.cut = made.power_cut
    yield made
    made.loop.close()
