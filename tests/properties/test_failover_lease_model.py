"""Every order of a small world, searched to its end: 2 hosts, 1 vm, 2 leaders, 2 gateways; messages lost and late, clocks that
drift, gateways that freeze. The decisions are the real core's. In no order do two processes hold the vm's disk.

The model runs in whole seconds with a short lease (T 4, K 1, rho 10 %, d 1). Host h1 may never renew again, renew through either
gateway, hear of it at once, late or never. A gateway may acknowledge a revocation at once, or go on granting until its own lease
has ended. A second leader may take over at any second; it counts every lease from its own start. Here the first one knows that at
once; two leaders at the same time, and one that is frozen in the midst of its writes, are in `test_failover_leaders_model.py`.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest

from trimtab_controller.core.failover import FailoverSettings, step
from trimtab_controller.core.failover.effects import EndGranting, StartVm, WriteIntent
from trimtab_controller.core.failover.events import (
    Event,
    GrantingEnded,
    IntentWritten,
    LeaderStarted,
    Renewed,
    SessionOpened,
    Tick,
)
from trimtab_controller.core.failover.records import NEVER_S, Holder, HostRecord, Seen, State, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity

HORIZON = 18
LAST_SEND = 5
GATEWAY_TTL = 4
SENDS = [(0, 0, 0), (0, 0, -1), (1, 2, 2), (1, 0, -1)]
"""(gateway, how late it arrives, how late its acknowledgement arrives; -1: never)."""


@dataclass(frozen=True)
class SmallSettings(FailoverSettings):
    lease_ttl_s: float = 4.0
    renew_every_s: float = 1.0
    kill_s: float = 1.0
    rate_error: float = 0.1
    extra_s: float = 1.0
    suspect_after_s: float = 1.5
    lost_after_s: float = 2.5
    held_up_s: float = 2.5
    steady_s: float = 0.0


@dataclass(frozen=True)
class WithoutTheWait(SmallSettings):
    """A lease's end is not waited for."""

    def lease_wait_s(self, kill_s: float) -> float:
        return 0.0


@dataclass(frozen=True)
class WithoutDrift(SmallSettings):
    """Both clocks are taken as equal, and the killing as instant."""

    def lease_wait_s(self, kill_s: float) -> float:
        return self.lease_ttl_s


@dataclass(frozen=True)
class Small:
    """One state of the model at second `now`. `acks`: (arrives, sent) of acknowledgements on their way to h1."""

    now: int
    lease_sent: int
    renewals: tuple[tuple[int, int, int, int], ...]
    """(arrives, sent, gateway, how much later the acknowledgement arrives; -1 never)."""
    acks: tuple[tuple[int, int], ...]
    ends: tuple[int, int] | None
    """When each gateway stops granting, once granting is being ended."""
    handled: int
    has_told: bool
    leaders: int
    started_at: int | None


class Search:
    def __init__(self, settings: FailoverSettings, *, host_rate: float, leader_rate: float) -> None:
        self.settings = settings
        self.host_rate = host_rate
        self.leader_rate = leader_rate
        self.states = 0
        self.starts = 0

    def run(self) -> str:
        """Return the first double run found, '' if there is none in any order."""
        level = self._first()
        for _second in range(HORIZON):
            following: dict[Any, tuple[Small, State]] = {}
            for small, core in level:
                found = self._violation(small)
                if found:
                    return found
                if small.started_at is not None and not small.renewals and not small.acks:
                    continue  # nothing can prolong h1's lease any more
                for after in self._successors(small, core):
                    following.setdefault(_key(*after), after)
            self.states += len(following)
            level = list(following.values())
        return ""

    def _violation(self, small: Small) -> str:
        if small.started_at is None:
            return ""
        dead_at = small.lease_sent + self.settings.lease_ttl_s / self.host_rate + self.settings.kill_s
        if small.started_at < dead_at:
            return f"the copy started at {small.started_at}, h1's guest is dead at {dead_at:.2f}"
        return ""

    def _first(self) -> list[tuple[Small, State]]:
        hosts = {name: HostRecord(id=name) for name in ("h1", "h2")}
        vm = VmRecord(id="v", host="h1", epoch=1, holders=(Holder(host="h1", epoch=1),), seen=Seen.RUNNING)
        core = State(settings=self.settings, hosts=hosts, vms={"v": vm})
        core = self._feed(core, LeaderStarted(), 0)[0]
        for name in ("h1", "h2"):
            listed = (("v", 1, Seen.RUNNING),) if name == "h1" else ()
            core = self._feed(core, Renewed(host=name, at_s=0.0, is_armed=True), 0)[0]
            core = self._feed(core, SessionOpened(host=name, boot_id="b", domains=listed), 0)[0]
        return [(Small(0, 0, (), (), None, 0, False, 1, None), core)]

    def _feed(self, core: State, event: Event, now: int) -> tuple[State, tuple[Any, ...]]:
        return step(core, event, now * self.leader_rate)

    def _successors(self, small: Small, core: State) -> list[tuple[Small, State]]:
        sends: list[tuple[int, int, int] | None] = [None]
        if small.now < LAST_SEND:
            sends += SENDS
        takes_over = [False] + ([True] if small.leaders == 1 and 2 <= small.now <= 10 else [])
        found = []
        for send, is_new_leader in product(sends, takes_over):
            for lag in ((0, 0), (0, GATEWAY_TTL), (GATEWAY_TTL, 0)) if small.ends is None else ((0, 0),):
                found.append(self._advance(small, core, send, is_new_leader=is_new_leader, lag=lag))
                if not self._would_end(found[-1], small):
                    break  # how fast gateways acknowledge matters only in the second in which granting is ended
        return found

    @staticmethod
    def _would_end(after: tuple[Small, State], before: Small) -> bool:
        return before.ends is None and after[0].ends is not None

    def _advance(
        self, small: Small, core: State, send: tuple[int, int, int] | None, *, is_new_leader: bool, lag: tuple[int, int]
    ) -> tuple[Small, State]:
        now = small.now + 1
        renewals, acks, handled, lease_sent = list(small.renewals), list(small.acks), small.handled, small.lease_sent
        if send is not None:
            gateway, delay, ack_delay = send
            renewals.append((now + delay, now, gateway, ack_delay))
        if is_new_leader:
            core = self._feed(core, LeaderStarted(), now)[0]
            for name, listed in (("h1", (("v", 1, Seen.RUNNING),)), ("h2", ())):
                if name == "h2" or renewals:
                    core = self._feed(core, SessionOpened(host=name, boot_id="b", domains=listed), now)[0]
        core = self._feed(core, Renewed(host="h2", at_s=now * self.leader_rate, is_armed=True), now)[0]
        for arrives, sent, gateway, ack_delay in [one for one in renewals if one[0] <= now]:
            renewals.remove((arrives, sent, gateway, ack_delay))
            if small.ends is not None and now >= small.ends[gateway]:
                continue
            handled = max(handled, now)
            core = self._feed(core, Renewed(host="h1", at_s=now * self.leader_rate, is_armed=True), now)[0]
            if ack_delay >= 0:
                acks.append((now + ack_delay, sent))
        for arrives, sent in [one for one in acks if one[0] <= now]:
            acks.remove((arrives, sent))
            lease_sent = max(lease_sent, sent)
        small = replace(small, now=now, renewals=tuple(sorted(renewals)), acks=tuple(sorted(acks)), handled=handled)
        small = replace(small, lease_sent=lease_sent, leaders=small.leaders + is_new_leader)
        return self._decide(small, core, lag)

    def _decide(self, small: Small, core: State, lag: tuple[int, int]) -> tuple[Small, State]:
        now = small.now
        if small.ends is not None and not small.has_told and now >= max(small.ends):
            core = self._feed(core, GrantingEnded(host="h1", handled_s=small.handled * self.leader_rate), now)[0]
            small = replace(small, has_told=True)
        core, effects = self._feed(core, Tick(), now)
        for effect in effects:
            match effect:
                case EndGranting() if small.ends is None:
                    small = replace(small, ends=(now + lag[0], now + lag[1]))
                    if lag == (0, 0):
                        core = self._feed(core, GrantingEnded(host="h1", handled_s=small.handled * self.leader_rate), now)[0]
                        small = replace(small, has_told=True)
                case WriteIntent():
                    core = self._feed(core, IntentWritten(host="h1", at_s=NEVER_S), now)[0]
                case StartVm() if small.started_at is None and effect.host == "h2":
                    self.starts += 1
                    small = replace(small, started_at=now)
        return small, core


def _key(small: Small, core: State) -> Any:
    h1, vm = core.hosts["h1"], core.vms["v"]
    facts = (h1.standing, h1.heard_s, h1.handled_s, h1.granting_ended, h1.ends_granting_since_s, h1.intent_s, h1.proof)
    return (
        small,
        facts,
        h1.has_listed,
        core.judging_from_s,
        core.started_s,
        vm.phase,
        vm.holders,
        core.hosts["h2"].standing is HostConnectivity.UP,
        bool(core.frozen),
    )


RATES = [(1.0, 1.0), (0.9, 1.1), (1.1, 0.9)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("host_rate", "leader_rate"), RATES)
def test_no_order_of_events_runs_a_vm_twice(host_rate: float, leader_rate: float) -> None:
    search = Search(SmallSettings(), host_rate=host_rate, leader_rate=leader_rate)
    assert search.run() == ""
    assert search.states > 1_000
    assert search.starts > 0, "there are orders in which the vm is recovered"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [WithoutTheWait(), WithoutDrift()], ids=lambda one: type(one).__name__)
def test_the_search_finds_the_double_run_of_a_wait_that_is_too_short(settings: FailoverSettings) -> None:
    search = Search(settings, host_rate=0.9, leader_rate=1.1)
    assert search.run().startswith("the copy started at")
