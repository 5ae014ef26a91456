"""What a scorer is: 0..1 for each host, higher is better. A wish, never a rule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.fleet import Floats, Rows

Scores = Callable[[Trial, Rows], Floats | None]
# Of many hosts, or of one.
Figure = TypeVar("Figure", Floats, float)


@dataclass(frozen=True, slots=True)
class Extents:
    """Between which figures the hosts of some sets lie, by resource (vcpus and memory); one figure for each set."""

    least_shares: Mapping[str, Floats]
    """Free / limit."""
    most_shares: Mapping[str, Floats]
    least_inverse: Mapping[str, Floats | float]
    """1 / limit; a single figure where all hosts of the fleet have it."""
    most_inverse: Mapping[str, Floats | float]


Bounds = Callable[[Trial, Extents], Floats]


class OfLeft(Protocol):
    """A figure made of the shares of vcpus and memory that stay free, of many hosts (in place: the shares are lost) or of one."""

    def __call__(self, vcpus: Figure, memory: Figure, /) -> Figure: ...


@dataclass(frozen=True, slots=True)
class Scorer:
    name: str
    scores: Scores
    """One figure for each of these rows; None where it has nothing to say about this request. Figures of rows that do not fit
    are never read, so they need not mean anything, but they must be finite."""
    reads: Reads
    """What a figure depends on besides the request. Of rows by themselves: `bounds` may say how good any of a set can be."""
    bounds: Bounds | None = None
    """For each set of hosts a figure that no host of it exceeds which the request fits on, to the last digit, and that is the
    hosts' own where they are alike: by the same operations in the same order, since rounding keeps order. None: nobody can say."""
    of_left: OfLeft | None = None
    """Makes the same figures of `packing.share_left`, where they depend on nothing else."""
