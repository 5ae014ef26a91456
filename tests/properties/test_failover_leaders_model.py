"""Every order of a small world with two leaders at once: an old one that froze in the midst of a round, or does not know yet that it
leads no more, and a new one; a host that falls silent, comes back and falls silent again. In no order do two hosts run the vm.

`test_failover_lease_model.py` searches the messages of one leader's world in full; here fewer messages, but each leader has a core of
its own, and what they write goes through the rows that the store has: the leader's term, the host's standing, the vm's home. A leader
may freeze before any write of any round, and carries out what is left of it when it thaws. One freeze and one change of leaders in
each order. Without the term in the leader's writes the search finds a double run, although the rows' own conditions are still there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from tests.properties.test_failover_lease_model import SmallSettings
from trimtab_controller.core.failover import FailoverSettings, step
from trimtab_controller.core.failover.effects import EndGranting, ResumeGranting, SetStanding, StartVm, WriteIntent
from trimtab_controller.core.failover.events import (
    Event,
    GrantingEnded,
    IntentWritten,
    LeaderStarted,
    Renewed,
    SessionOpened,
    StartEnded,
    Tick,
)
from trimtab_controller.core.failover.records import NEVER_S, Holder, HostRecord, Phase, Seen, State, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity

HORIZON = 13
GATEWAY_TTL = 4


@dataclass(frozen=True, slots=True)
class World:
    """What is outside of the leaders. `row`, `vm_host`, `epoch`, `is_seen_off`, `ends`, `term`: in the store."""

    lease_sent: int = 0
    """When h1 sent the renewal that its lease runs from."""
    on_h1_from: int | None = 0
    """Since when h1 is to run the vm; it does once it has a lease that it took since. None: it does not."""
    on_h2_from: int | None = None
    handled: int = 0
    heard: int = 0
    acks: tuple[tuple[int, int], ...] = ()
    """(arrives, sent) of acknowledgements on their way to h1."""
    back_at: int | None = None
    row: Literal["up", "lost", "fenced"] = "up"
    vm_host: str = "h1"
    epoch: int = 1
    is_seen_off: bool = False
    ends: tuple[int, int] | None = None
    """When each gateway stops granting, once granting is being ended."""
    term: int = 1

    @property
    def is_on_h1(self) -> bool:
        return self.on_h1_from is not None and self.lease_sent >= self.on_h1_from


@dataclass(frozen=True, slots=True)
class Leader:
    term: int
    core: State
    has_seen: int = 0
    """The last renewal that it knows of."""
    left: tuple[Any, ...] | None = None
    """What it has not written yet of the round in which it froze; None: it is not frozen."""


@dataclass(frozen=True, slots=True)
class Moment:
    world: World
    leaders: tuple[Leader, ...]
    has_frozen: bool = False


class Search:
    """h1's clock is slow and the leaders' are fast, as far as the settings allow for."""

    settings: FailoverSettings = SmallSettings()
    host_rate, leader_rate = 0.9, 1.1

    def __init__(self, *, has_terms: bool = True, changes_at: range = range(3, 11)) -> None:
        """`changes_at`: the seconds at which a second leader may begin."""
        self.has_terms, self.changes_at = has_terms, changes_at
        self.states = self.starts = self.refused = self.thaws = 0

    def run(self) -> str:
        """Return the first double run found, '' if there is none in any order."""
        level = [Moment(World(), (self._leader(World(), 1, 0),))]
        for now in range(1, HORIZON + 1):
            following: dict[Any, Moment] = {}
            for moment in level:
                for after in self._second(moment, now):
                    found = self._violation(after.world)
                    if found:
                        return found
                    if not _is_over(after):
                        following.setdefault(_key(after, now), after)
            self.states += len(following)
            level = list(following.values())
        return ""

    def _dead_at(self, world: World) -> float:
        return world.lease_sent + self.settings.lease_ttl_s / self.host_rate + self.settings.kill_s

    def _violation(self, world: World) -> str:
        if world.on_h2_from is None or not world.is_on_h1 or world.on_h2_from >= self._dead_at(world):
            return ""
        return f"started on h2 at {world.on_h2_from}, and runs on h1 until {self._dead_at(world):.2f}"

    # --- the world -----------------------------------------------------------------------------------------------------------

    def _second(self, moment: Moment, now: int) -> Iterator[Moment]:
        for world in self._worlds(moment.world, now):
            yield from self._rounds(replace(moment, world=world), now, 0)
            if world.term == 1 and now in self.changes_at:
                later = replace(world, term=2)
                leaders = (*moment.leaders, self._leader(later, 2, now))
                yield from self._rounds(replace(moment, world=later, leaders=leaders), now, 0)

    def _worlds(self, world: World, now: int) -> Iterator[World]:
        """What h1, its network and its gateways may do in this second."""
        if world.is_on_h1 and now >= self._dead_at(world):
            world = replace(world, on_h1_from=None)
        for arrives, sent in [one for one in world.acks if one[0] <= now]:
            rest = tuple(one for one in world.acks if one != (arrives, sent))
            world = replace(world, acks=rest, lease_sent=max(world.lease_sent, sent))
        if world.row == "up" and now - world.heard > self.settings.lost_after_s:
            world = replace(world, row="lost")
        yield world
        if world.back_at is not None and now == world.back_at + 1:
            for gateway in (0, 1) if world.ends is not None and world.ends[0] != world.ends[1] else (0,):
                if world.ends is None or now < world.ends[gateway]:
                    granted = replace(world, handled=now, heard=now)
                    yield replace(granted, lease_sent=now)
                    yield replace(granted, acks=(*world.acks, (now + 2, now)))
                    yield granted
        if world.back_at is None and world.row != "up":
            yield replace(world, back_at=now, heard=now, row="up")

    # --- leaders -------------------------------------------------------------------------------------------------------------

    def _leader(self, world: World, term: int, now: int) -> Leader:
        """A leader as it begins: from rows alone."""
        standing = {"up": HostConnectivity.UP, "lost": HostConnectivity.LOST, "fenced": HostConnectivity.FENCED}[world.row]
        hosts = {
            "h1": HostRecord(id="h1", standing=standing, is_armed=True, was_armed_at_loss=True),
            "h2": HostRecord(id="h2", standing=HostConnectivity.UP, is_armed=True),
        }
        core = State(settings=self.settings, hosts=hosts, vms={"v": _vm(world)})
        core = self._feed(core, LeaderStarted(), now)[0]
        listed = {host_id: replace(host, has_listed=True) for host_id, host in core.hosts.items()}
        return Leader(term, replace(core, hosts=listed), has_seen=world.handled)

    def _feed(self, core: State, event: Event, now: int) -> tuple[State, tuple[Any, ...]]:
        return step(core, event, now * self.leader_rate)

    def _rounds(self, moment: Moment, now: int, index: int) -> Iterator[Moment]:
        """The round of each leader in turn, in every way in which it may end."""
        if index == len(moment.leaders):
            yield moment
            return
        leader = moment.leaders[index]
        if leader.left is not None:
            yield from self._rounds(moment, now, index + 1)
            self.thaws += 1
            for after in self._written(moment, index, leader, leader.left, now, may_freeze=False):
                yield from self._rounds(after, now, index + 1 - (len(moment.leaders) - len(after.leaders)))
            return
        leader, effects = self._decided(moment.world, leader, now)
        for after in self._written(moment, index, leader, effects, now, may_freeze=not moment.has_frozen):
            yield from self._rounds(after, now, index + 1 - (len(moment.leaders) - len(after.leaders)))

    def _decided(self, world: World, leader: Leader, now: int) -> tuple[Leader, tuple[Any, ...]]:
        """Read the rows, and decide."""
        core, effects = leader.core, ()
        if (world.epoch, world.vm_host) > (core.vms["v"].epoch, ""):
            core = replace(core, vms={"v": _vm(world)})
        core = self._feed(core, Renewed(host="h2", at_s=now * self.leader_rate, is_armed=True), now)[0]
        if world.handled > leader.has_seen:
            core = self._feed(core, Renewed(host="h1", at_s=world.handled * self.leader_rate, is_armed=True), now)[0]
        h1, came = core.hosts["h1"], ()
        if world.row == "up" and h1.standing in {HostConnectivity.LOST, HostConnectivity.FENCED}:
            listed = (("v", world.epoch if world.vm_host == "h1" else 1, Seen.RUNNING),) if world.is_on_h1 else ()
            core, came = self._feed(core, SessionOpened(host="h1", boot_id="b", domains=listed), now)
        if h1.ends_granting_since_s is not None and not h1.granting_ended and world.ends is not None and now >= max(world.ends):
            core = self._feed(core, GrantingEnded(host="h1", handled_s=world.handled * self.leader_rate), now)[0]
        core, effects = self._feed(core, Tick(), now)
        if any(isinstance(one, WriteIntent) for one in effects):
            core = self._feed(core, IntentWritten(host="h1", at_s=NEVER_S), now)[0]  # it has no beacon: nothing is written
        effects = tuple(one for one in (*came, *effects) if self._is_write(world, one))
        return replace(leader, core=core, has_seen=world.handled), effects

    @staticmethod
    def _is_write(world: World, effect: Any) -> bool:
        match effect:
            case SetStanding():
                return effect.host == "h1" and effect.standing is HostConnectivity.FENCED
            case EndGranting():
                return world.ends is None
            case ResumeGranting() | StartVm():
                return True
            case _:
                return False

    def _written(
        self, moment: Moment, index: int, leader: Leader, effects: tuple[Any, ...], now: int, *, may_freeze: bool
    ) -> Iterator[Moment]:
        """What becomes of a round's writes: each in a transaction of its own; the leader may freeze before any of them."""
        if may_freeze and effects:
            frozen = replace(leader, left=effects)
            yield replace(moment, leaders=_put(moment.leaders, index, frozen), has_frozen=True)
        if not effects:
            yield replace(moment, leaders=_put(moment.leaders, index, replace(leader, left=None)))
            return
        if self.has_terms and leader.term != moment.world.term:
            self.refused += 1
            yield replace(moment, leaders=_put(moment.leaders, index, None))
            return
        for world, core in self._outcomes(moment.world, leader.core, effects[0], now):
            after = replace(moment, world=world)
            yield from self._written(after, index, replace(leader, core=core), effects[1:], now, may_freeze=may_freeze)

    def _outcomes(self, world: World, core: State, effect: Any, now: int) -> Iterator[tuple[World, State]]:
        """The world after one transaction, under the conditions that it has besides the term."""
        match effect:
            case SetStanding(host="h1", standing=HostConnectivity.FENCED):
                yield (replace(world, row="fenced") if world.row == "lost" else world), core
            case EndGranting() if world.ends is None:
                for lag in ((0, 0), (0, GATEWAY_TTL), (GATEWAY_TTL, 0)):
                    yield replace(world, ends=(now + lag[0], now + lag[1])), core
            case ResumeGranting():
                seen_off = world.vm_host == "h1" and not world.is_on_h1
                yield replace(world, ends=None, is_seen_off=world.is_seen_off or seen_off), core
            case StartVm():
                yield self._start(world, core, effect, now)
            case _:
                yield world, core

    def _start(self, world: World, core: State, effect: StartVm, now: int) -> tuple[World, State]:
        is_gone = world.is_seen_off or (world.vm_host == "h1" and world.row == "fenced")
        if not is_gone or (effect.host == "h1" and world.row != "up"):
            return world, replace(core, vms={"v": _vm(world)})
        self.starts += 1
        world = replace(world, vm_host=effect.host, epoch=world.epoch + 1, is_seen_off=False)
        world = replace(world, on_h2_from=now) if effect.host == "h2" else replace(world, on_h1_from=now)
        core = replace(core, vms={"v": replace(core.vms["v"], epoch=world.epoch)})
        return world, self._feed(core, StartEnded(vm="v", host=effect.host, epoch=world.epoch, is_running=True), now)[0]


def _is_over(moment: Moment) -> bool:
    """The vm runs on h2, which is never lost, h1 has nothing, and whoever leads knows both: nothing can happen any more."""
    world = moment.world
    knows = len(moment.leaders) == 1 and moment.leaders[0].left is None and moment.leaders[0].core.vms["v"].epoch == world.epoch
    return knows and moment.leaders[0].term == world.term == 2 and world.vm_host == "h2" and world.on_h1_from is None


def _put(leaders: tuple[Leader, ...], index: int, leader: Leader | None) -> tuple[Leader, ...]:
    return (*leaders[:index], *((leader,) if leader is not None else ()), *leaders[index + 1 :])


def _vm(world: World) -> VmRecord:
    """The vm as `loops.failover_reading` makes it of its rows."""
    vm = VmRecord(id="v", host=world.vm_host, epoch=world.epoch, seen=Seen.RUNNING)
    if world.vm_host == "h1" and world.row == "fenced":
        return replace(vm, phase=Phase.RECOVERING)
    return replace(vm, holders=(Holder(host=world.vm_host, epoch=world.epoch),))


def _key(moment: Moment, now: int) -> Any:
    """Two moments with the same key have the same future: how long ago something was matters no more once it is long ago."""
    world, told = moment.world, []
    for leader in moment.leaders:
        core, h1, vm = leader.core, leader.core.hosts["h1"], leader.core.vms["v"]
        intent_s = NEVER_S if h1.intent_s is None else h1.intent_s
        facts = (h1.standing, max(h1.handled_s, intent_s, core.started_s), h1.granting_ended)
        wants = (h1.ends_granting_since_s is None, h1.intent_s is None, bool(core.frozen))
        silence = (min(now * 1.5 - core.judging_from_s, 99), h1.heard_s, core.ticked_s if leader.left is not None else 0)
        told.append((leader.term, leader.has_seen, facts, wants, silence, vm.phase, vm.holders, vm.epoch, _named(leader.left)))
    return world, moment.has_frozen, tuple(told)


def _named(left: tuple[Any, ...] | None) -> Any:
    return None if left is None else tuple((type(one), getattr(one, "standing", ""), one.host) for one in left)


@pytest.mark.timeout(600)
def test_no_order_of_two_leaders_and_a_freeze_runs_a_vm_twice() -> None:
    search = Search()
    assert search.run() == ""
    assert search.states > 10_000
    assert search.starts > 0, "there are orders in which the vm is recovered"
    assert search.thaws > 0, "there are orders in which a leader goes on with what it had decided before it froze"
    assert search.refused > 0, "there are orders in which a leader of the past still wants to write"


@pytest.mark.timeout(600)
def test_the_search_finds_the_double_run_of_leaders_whose_writes_are_not_fenced_by_their_term() -> None:
    assert Search(has_terms=False, changes_at=range(8, 9)).run().startswith("started on h2 at")
