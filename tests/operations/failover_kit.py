"""A leader's failover loop on a real store, real engine and real agents over simulated hosts, with power devices at the seam."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.operations.kit import FleetStory
from trimtab_controller.api.context import NoSecrets
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.core.model.failover import FailoverRow
from trimtab_controller.fencing import FencePath, Power, PowerAnswer
from trimtab_controller.loops.failover import LEADERS_WINDOW_S, FailoverLoop
from trimtab_controller.services import fencing, observations, recovery
from trimtab_controller.store import events, failover, hosts, operations, schema

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
    loop.close()
