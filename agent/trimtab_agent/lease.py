"""The host's lease: the right to start guests, counted from when the acknowledged heartbeat was *sent*. Pure: no clock, no I/O.

The controller counts from when it handled the heartbeat, which is later, so the agent's lease always ends first. Times are
CLOCK_BOOTTIME seconds of this host; the wall clock has no say.
"""

from collections import OrderedDict
from dataclasses import dataclass

_REMEMBERED_BEATS = 64
"""Heartbeats whose sending time is kept. An ack for an older one would grant a lease that has ended anyway."""


@dataclass(frozen=True, slots=True)
class LeaseState:
    """The lease at one instant."""

    number: int
    """0 before the first grant."""
    expires_at_boottime: float
    is_live: bool

    def allows(self, number: int) -> bool:
        """Tell whether a command that was decided under lease `number` may act now."""
        return self.is_live and number != 0 and number == self.number


class Lease:
    """Keeps the lease of one host. Not thread-safe: one thread writes; readers on other threads see the old or the new pair."""

    def __init__(self) -> None:
        # One tuple, replaced at once, so that readers never see the number of one lease with the end of another.
        self._held: tuple[int, float] = (0, 0.0)
        self._sent: OrderedDict[int, float] = OrderedDict()

    def sent(self, sequence: int, *, at_boottime: float) -> None:
        """Record that heartbeat `sequence` is about to leave; call before writing it, never after."""
        self._sent[sequence] = at_boottime
        while len(self._sent) > _REMEMBERED_BEATS:
            self._sent.popitem(last=False)

    def sent_at(self, sequence: int) -> float | None:
        """Return when an unacknowledged heartbeat was sent."""
        return self._sent.get(sequence)

    def acknowledged(self, sequence: int, *, number: int, is_granted: bool, ttl_s: float) -> bool:
        """Extend the lease by the ack of heartbeat `sequence`; return whether it did.

        An unknown sequence, a refused grant and a lower lease number change nothing: a lease that was granted runs to its end.
        """
        sent_at = self._sent.pop(sequence, None)
        held_number, held_until = self._held
        if sent_at is None or not is_granted or number < held_number or number == 0:
            return False
        until = sent_at + ttl_s
        self._held = (number, max(held_until, until) if number == held_number else until)
        return True

    def forget_sent(self) -> None:
        """Forget unacknowledged heartbeats, when a session ends: sequences of the next one may repeat."""
        self._sent.clear()

    def current(self, *, now: float) -> LeaseState:
        number, until = self._held
        return LeaseState(number, until, is_live=now < until)
