"""What a filter is: a yes or no for every host at once, and the reasons for one host on demand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import ALL, Mask, Rows
from trimtab_controller.core.placement.verdict import Refusal

Fitting = Callable[[Trial, Rows], Mask | None]
Refusals = Callable[[Trial, int], tuple[Refusal, ...]]
Resources = Callable[[Trial], Sequence[str]]


class Reads(Enum):
    """What an answer depends on besides the request: this says how long it may be kept."""

    # The fleet: true for the whole batch, and for every request of the same wishes.
    FLEET = auto()
    # The fleet, but hosts are named in the request: hardly ever asked twice.
    NAMES = auto()
    # The books, of the row itself: true until that row is claimed from or given back to.
    ROW = auto()
    # The books, of other rows too.
    BOOKS = auto()


@dataclass(frozen=True, slots=True)
class Filter:
    """Both functions say the same: a host is masked out exactly where there is a reason (a property test holds them together)."""

    name: str
    fitting: Fitting
    """Which of these rows fit; None where the request asks nothing of this kind."""
    refusals: Refusals
    """Every reason against the host of one row; empty where it fits."""
    reads: Reads = Reads.FLEET
    resources: Resources | None = None
    """Where a row fits exactly if it has `Trial.amounts` of these free: those that the request asks for. None for other filters."""


def of_fleet(name: str, fitting: Callable[[Trial], Mask | None], refusals: Refusals, *, reads: Reads = Reads.FLEET) -> Filter:
    """Return a filter whose question is about all hosts or none."""

    def of_rows(trial: Trial, rows: Rows = ALL) -> Mask | None:
        mask = fitting(trial)
        return None if mask is None else mask[rows]

    return Filter(name, of_rows, refusals, reads)
