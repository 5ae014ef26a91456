"""Vms that are backed up at one instant: each is held still by its host until the controller has heard that all of them are.

    hold: (none) ── held ── released      everybody was still at that moment: one instant
                         └─ expired       the bound came first: the guest goes on, and the group has no common instant
    release before hold: abandoned        somebody else failed already, so this guest is not held at all

Whether a release came in time is decided here, under one lock: what was told as released was still at the moment of the release. So no
clock of any host has a say in whether the group is consistent, and no guest waits longer than its bound, whoever dies.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from trimtab_agent.clock import Clock
from trimtab_protos.errors import InvalidRequest

HOLD_MAX_S = 30.0
_KEPT = 512
_POLL_S = 0.25
"""A cancel of the job ends a hold after this long at most."""


class HoldState(StrEnum):
    NONE = "none"
    HELD = "held"
    RELEASED = "released"
    EXPIRED = "expired"
    ABANDONED = "abandoned"


@dataclass(slots=True)
class _Hold:
    state: HoldState = HoldState.NONE
    taken_ms: int = 0
    held_ms: int = 0


@dataclass(frozen=True, slots=True)
class HoldReport:
    state: HoldState
    taken_ms: int
    """When the host fixed the vm's instant, by its own clock; 0: not yet."""
    held_ms: int
    """How long the guest stood still; 0 while it does."""


@dataclass(slots=True)
class Holds:
    """The holds of one host. Thread-safe."""

    clock: Clock
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _known: OrderedDict[tuple[str, str], _Hold] = field(default_factory=OrderedDict)

    def hold(self, instant_id: str, vm_id: str, *, bound_s: float, is_cancelled: Callable[[], bool]) -> HoldReport:
        """Block the caller, whose guest stands still, until the release or the bound. Once for each vm of an instant."""
        if not 0 < bound_s <= HOLD_MAX_S:
            raise InvalidRequest(
                "hold-too-long", f"hold_max_ms: a guest is held for at most {HOLD_MAX_S:.0f} s", field="hold_max_ms"
            )
        began_s = self.clock.boottime_s()
        with self._changed:
            hold, taken_ms = self._of(instant_id, vm_id), self.clock.now_ms()
            if hold.state is not HoldState.NONE:
                # A job that is run again fixes another instant than the one that was held.
                state = hold.state if hold.state is HoldState.ABANDONED else HoldState.EXPIRED
                return HoldReport(state, taken_ms, 0)
            hold.state, hold.taken_ms = HoldState.HELD, taken_ms
            self._changed.notify_all()
            left_s = bound_s
            while hold.state is HoldState.HELD and left_s > 0 and not is_cancelled():
                self._changed.wait(min(left_s, _POLL_S))
                left_s = bound_s - (self.clock.boottime_s() - began_s)
            if hold.state is HoldState.HELD:
                hold.state = HoldState.EXPIRED
            hold.held_ms = int((self.clock.boottime_s() - began_s) * 1000)
            self._changed.notify_all()
            return self._report(hold)

    def wait_for(self, instant_id: str, vm_id: str, *, timeout_s: float) -> HoldReport:
        """Return how the vm's hold is once it has begun, or after the time."""
        with self._changed:
            hold = self._of(instant_id, vm_id)
            self._changed.wait_for(lambda: hold.state is not HoldState.NONE, timeout_s)
            return self._report(hold)

    def release(self, instant_id: str, vm_id: str) -> HoldReport:
        """Let the guest go on; `released` where it was still held, also when asked again."""
        with self._changed:
            hold = self._of(instant_id, vm_id)
            if hold.state in {HoldState.HELD, HoldState.NONE}:
                hold.state = HoldState.RELEASED if hold.state is HoldState.HELD else HoldState.ABANDONED
                self._changed.notify_all()
            return self._report(hold)

    def _of(self, instant_id: str, vm_id: str) -> _Hold:
        hold = self._known.setdefault((instant_id, vm_id), _Hold())
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return hold

    @staticmethod
    def _report(hold: _Hold) -> HoldReport:
        return HoldReport(hold.state, hold.taken_ms, hold.held_ms)
