"""How long vms live, learned from those that ended, and how much longer a host stays in use for one more vm. Pure.

A host is given back when its last vm ends, so a short vm is best put where others stay anyway, and long ones together. What is
known of a vm is a chance: for each span of ages the share of its kind that ended there (Kaplan and Meier, 1958: who still lives
counts as one that lived so long). A kind is a family, what one owner names or asks for together, and a size; where few of a kind
have ended it is shrunk towards all vms of that size, and that towards all vms.

The seconds by which a vm makes a host's use longer are those of its life in which no other vm of the host is expected to live:
the integral over time of S_vm(t) * product of (1 - S_other(t)). Lifetime-aware packing as such is Google's (NILAS and LAVA, MLSys
2025), which compare expected ends; the integral takes the spread of the guess into account, which here is wide.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from trimtab_controller.core.placement.fleet import Floats, Rows

# Ends of the spans of ages, in seconds.
_AGE_ENDS = (
    *(300, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200, 10_800, 14_400, 21_600, 28_800, 43_200),
    *(64_800, 86_400, 129_600, 172_800, 259_200, 518_400, 1_036_800, 2_592_000),
)
_ENDS = np.array(_AGE_ENDS, dtype=np.float64)
_SPANS = len(_AGE_ENDS)
# Spans of time from now on, over which use is summed: begin, width and middle in seconds. Beyond the last nothing is told apart.
_BEGINS = np.array([0, 600, 1800, 3600, 7200, 14_400, 28_800, 57_600, 115_200, 230_400, 460_800], dtype=np.float64)
_WIDTHS = np.diff(np.append(_BEGINS, 921_600.0))
_MIDDLES = _BEGINS + _WIDTHS / 2
# Ages for which the chances are worked out: newborn, and the middle of each span.
_AGES = np.concatenate([[0.0], (np.append(0.0, _ENDS[:-1]) + _ENDS) / 2])
# So many vms of the wider kind stand beside those of the narrower.
_SHRINKAGE = 8.0
# What was worked out for a kind is used so long, unless a third more of it ended.
_KEPT_S = 3600.0
# Hosts are looked at again after so long: their vms grew older.
_REFRESHED_S = 1800.0
_REFRESHED_TOGETHER = 2
_KINDS_MAX = 100_000


class Kind(NamedTuple):
    """Vms that are expected to live alike."""

    family: str
    vcpus: int
    memory_mib: int


def family_of(project_id: str, vm_name: str) -> str:
    """Return the family of a vm by its name: web-1 and web-2 of one project are expected to live alike."""
    return f"{project_id}/{vm_name.rstrip('0123456789').rstrip('-_.')}"


class _Tally:
    """Of one kind: how many ended in each span of ages, of how many that lived into it."""

    __slots__ = ("at_risk", "ended")

    def __init__(self) -> None:
        self.ended = np.zeros(_SPANS)
        self.at_risk = np.zeros(_SPANS)


class Lifetimes:
    """What is known of how long vms live. Grows with every vm that ends or grows older."""

    __slots__ = ("_all", "_chances", "_families", "_sizes")

    def __init__(self) -> None:
        self._all = _Tally()
        self._sizes: dict[tuple[int, int], _Tally] = {}
        self._families: dict[Kind, _Tally] = {}
        # By kind: the table, when it was made, and of how many vms of the kind.
        self._chances: dict[Kind, tuple[Floats, float, float]] = {}

    def lived(self, kind: Kind, from_span: int, to_span: int) -> None:
        """Count that a vm lived through the spans of ages `from_span`..`to_span` - 1."""
        for tally in self._tallies(kind):
            tally.at_risk[from_span:to_span] += 1

    def ended(self, kind: Kind, age_s: float, from_span: int = 0) -> None:
        """Count the end of a vm; `from_span`: what came before it was counted by `lived`."""
        span = span_of(age_s)
        for tally in self._tallies(kind):
            tally.at_risk[from_span : span + 1] += 1
            tally.ended[span] += 1

    def chances(self, kind: Kind, age_s: float, now_s: float) -> Floats:
        """Return the chance that a vm of this age still lives in the middle of each span of time from now on. Not to be written."""
        known = self._chances.get(kind)
        own = self._families.get(kind)
        count = float(own.at_risk[0]) if own is not None else 0.0
        if known is None or now_s - known[1] >= _KEPT_S or count > known[2] * 4 / 3 + 0.5:
            if len(self._chances) >= _KINDS_MAX:
                self._chances.clear()
            known = self._chances[kind] = (self._table(kind), now_s, count)
        row: Floats = known[0][span_of(age_s) + 1 if age_s > 0 else 0]
        return row

    def _table(self, kind: Kind) -> Floats:
        rates = (self._all.ended + 0.5) / (self._all.at_risk + 8.0)
        for tally in (self._sizes.get(kind[1:]), self._families.get(kind)):
            if tally is not None:
                rates = (tally.ended + _SHRINKAGE * rates) / (tally.at_risk + _SHRINKAGE)
        logs = np.append(0.0, np.cumsum(np.log1p(-np.minimum(rates, 0.999))))
        ages = np.append(0.0, _ENDS)

        def log_alive(age: Floats) -> Floats:
            beyond = np.maximum(age - ages[-1], 0.0) * (logs[-1] - logs[-3]) / (ages[-1] - ages[-3])
            return np.asarray(np.interp(age, ages, logs) + beyond)

        return np.asarray(np.exp(log_alive(_AGES[:, None] + _MIDDLES) - log_alive(_AGES)[:, None]))

    def _tallies(self, kind: Kind) -> tuple[_Tally, _Tally, _Tally]:
        if len(self._families) >= _KINDS_MAX and kind not in self._families:
            self._families.clear()
        size = self._sizes.setdefault(kind[1:], _Tally())
        return self._all, size, self._families.setdefault(kind, _Tally())


def span_of(age_s: float) -> int:
    """Return the number of the span of ages that this age lies in."""
    return min(bisect_left(_AGE_ENDS, age_s), _SPANS - 1)


class _Lodger:
    __slots__ = ("born_s", "counted", "kind")

    def __init__(self, kind: Kind, born_s: float, counted: int) -> None:
        self.kind, self.born_s, self.counted = kind, born_s, counted


class Occupancy:
    """Which vms are on which host, and how long each host will be in use because of them. Belongs to one set of books."""

    __slots__ = ("_alive", "_at_s", "_lifetimes", "_lodgers", "_next", "_now_s")

    def __init__(self, row_count: int, lifetimes: Lifetimes) -> None:
        self._lifetimes = lifetimes
        self._lodgers: list[dict[str, _Lodger]] = [{} for _ in range(row_count)]
        # The chance that some vm of the host lives in the middle of each span.
        self._alive = np.zeros((row_count, _WIDTHS.size))
        self._at_s = np.zeros(row_count)
        self._now_s, self._next = 0.0, 0

    def pass_time(self, now_s: float) -> None:
        """Say what time it is; a few of the hosts are looked at again, those that were not for long."""
        self._now_s = now_s
        for _ in range(min(_REFRESHED_TOGETHER, len(self._lodgers))):
            row, self._next = self._next, (self._next + 1) % len(self._lodgers)
            if self._lodgers[row] and now_s - self._at_s[row] >= _REFRESHED_S:
                self._look(row)

    def put(self, row: int, vm_id: str, kind: Kind, *, born_s: float | None = None) -> None:
        """Say that the vm is there; `born_s`: None for now. What it lived before is not counted."""
        born = self._now_s if born_s is None else born_s
        age_s = max(0.0, self._now_s - born)
        self._lodgers[row][vm_id] = _Lodger(kind, born, span_of(age_s) if age_s > 0 else 0)
        self._alive[row] = 1 - (1 - self._alive[row]) * (1 - self._lifetimes.chances(kind, age_s, self._now_s))

    def take(self, row: int, vm_id: str, *, is_end: bool) -> None:
        """Say that the vm is not there any more; `is_end`: since it ended, which is learned from."""
        lodger = self._lodgers[row].pop(vm_id, None)
        if lodger is None:
            return
        if is_end:
            self._lifetimes.ended(lodger.kind, self._now_s - lodger.born_s, lodger.counted)
        self._look(row)

    def longer_s(self, kind: Kind, rows: Rows) -> Floats:
        """Return the seconds by which a new vm of this kind is expected to make the use of each of these hosts longer."""
        weighted = self._lifetimes.chances(kind, 0.0, self._now_s) * _WIDTHS
        longer: Floats = weighted.sum() - self._alive[rows] @ weighted
        return longer

    def _look(self, row: int) -> None:
        none_lives = np.ones(_WIDTHS.size)
        for lodger in self._lodgers[row].values():
            age_s = max(0.0, self._now_s - lodger.born_s)
            span = span_of(age_s)
            if span > lodger.counted:
                self._lifetimes.lived(lodger.kind, lodger.counted, span)
                lodger.counted = span
            none_lives *= 1 - self._lifetimes.chances(lodger.kind, age_s, self._now_s)
        self._alive[row] = 1 - none_lives
        self._at_s[row] = self._now_s
