"""A recovery whose driver dies at each of its points, while something else happens to the hosts that it concerns.

The leader is killed between an act and its record; another leads, and meanwhile the new home dies, or restarts, or the old one comes
back. Whatever the order: the guest runs once in the end, ran in one place at any time, and nothing is left half done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests.operations.emptied import empty
from tests.operations.failover_kit import AtOnce, Story, story_of
from tests.operations.kit import FleetStory
from tests.operations.wire import FOR_EVER_S, Workshop
from trimtab_controller.core.lifecycle import ENDED_STATES, HostConnectivity
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.failover import FailoverLoop
from trimtab_controller.operations.engine import Engine
from trimtab_controller.store import hosts
from trimtab_controller.store.database import Database

ROUNDS = 240
POINTS = ("recorded:place", "after:define", "after:power_on")


class Killed(BaseException):
    """SIGKILL: nobody catches it."""


@dataclass(frozen=True, slots=True)
class Mortal(Engine):
    """A driver that dies at its point of a recovery."""

    dies_at: str = ""

    def _crash_point(self, name: str) -> None:
        if name == self.dies_at:
            raise Killed


def mortal(engine: Engine, dies_at: str) -> Mortal:
    return Mortal(**{one.name: getattr(engine, one.name) for one in fields(Engine)}, dies_at=dies_at)


@dataclass
class Fate:
    """What happens to the hosts as the leader dies."""

    story: Story
    vm: Vm

    @property
    def new_home(self) -> str:
        return self.story.fleet.vm(self.vm.id).host_id

    def nothing(self) -> None:
        """Only the leader dies."""

    def new_home_dies(self) -> None:
        self._lose(self.new_home)

    def new_home_is_cut_off_and_its_warden_does_its_work(self) -> None:
        home = self.new_home
        if self.vm.id in self.story.fleet.running_on_host(home):
            self.story.fleet.hypervisor(home).stop_by_hand(self.vm.id)
        self._lose(home)

    def new_home_restarts(self) -> None:
        self._restart(self.new_home)

    def old_home_returns(self) -> None:
        self._restart(self.vm.host_id)

    def old_home_returns_and_new_home_dies(self) -> None:
        self.old_home_returns()
        self.new_home_dies()

    def _restart(self, host_id: str) -> None:
        """It boots, and its agent opens a session with what it finds."""
        fleet = self.story.fleet
        fleet.reboots(host_id)
        agent = fleet.agents.restart(host_id)
        fleet.db.write(
            lambda session: hosts.open_session(
                session,
                host_id,
                incarnation=agent.incarnation,
                boot_id=fleet.hypervisor(host_id).boot_id,
                agent_address=agent.address,
                now=fleet.clock.now(),
            )
        )
        lease_number = fleet.db.read(lambda session: hosts.get(session, host_id).lease_number)
        agent.grant_lease(number=lease_number, ttl_s=FOR_EVER_S)
        self.story.return_of(host_id)

    def _lose(self, host_id: str) -> None:
        self.story.power_cut(host_id)
        self.story.silence(host_id, HostConnectivity.SUSPECT)
        self.then = lambda: self.story.silence(host_id, HostConnectivity.LOST)

    then: Callable[[], None] = lambda: None


FATES = (
    "nothing",
    "new_home_dies",
    "new_home_is_cut_off_and_its_warden_does_its_work",
    "new_home_restarts",
    "old_home_returns",
    "old_home_returns_and_new_home_dies",
)


@pytest.fixture
def story(workshop: Workshop, socket_directory: Path, matrix_database: Database) -> Iterator[Story]:
    """A fleet of which two hosts may be lost at once."""
    empty(matrix_database)
    fleet = FleetStory(matrix_database, workshop, socket_directory, host_count=10)
    yield from story_of(fleet)
    fleet.close()


def lead(story: Story, engine: Engine) -> None:
    story.loop.close()
    story.loop = FailoverLoop(engine=engine, clock=story.fleet.clock, fencer=story.device, askers=AtOnce(), drivers=AtOnce())


def overlaps(story: Story, vm_id: str) -> list[str]:
    """Return each start of the guest while another process of it ran."""
    running, found = set[str](), list[str]()
    for entry in [one for one in story.fleet.fleet.oracle if one.vm_id == vm_id]:
        if entry.event == "start":
            found += [f"started on {entry.host_id} while it ran on {other}" for other in running - {entry.host_id}]
            running.add(entry.host_id)
        else:
            running.discard(entry.host_id)
    return found


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("point", POINTS)
def test_a_guest_runs_once_in_the_end_wherever_its_recovery_was_cut(story: Story, point: str, fate: str) -> None:
    vm = story.kept_vm()
    for host_id in story.fleet.host_ids:
        story.arm(host_id)
    lead(story, mortal(story.fleet.new_engine(), point))
    story.power_cut(vm.host_id)
    story.lose(vm.host_id)
    with pytest.raises(Killed):
        story.rounds(ROUNDS)
    happens = Fate(story, vm)
    getattr(happens, fate)()
    lead(story, story.fleet.new_engine())
    story.rounds(3)
    happens.then()
    story.rounds(ROUNDS, until=lambda: is_well(story, vm))
    story.rounds(30)
    assert overlaps(story, vm.id) == []
    assert is_well(story, vm), [(one.kind, one.state.value, one.step, one.error) for one in story.operations(vm.id)]


def is_well(story: Story, vm: Vm) -> bool:
    after = story.fleet.vm(vm.id)
    has_ended = all(one.state in ENDED_STATES for one in story.operations(vm.id))
    return has_ended and story.fleet.running_on(vm.id) == {after.host_id} and after.observed_state.value == "running"
