"""What a filter is: a yes or no for every host at once, and the reasons for one host on demand."""

from collections.abc import Callable
from dataclasses import dataclass

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.verdict import Refusal

Fitting = Callable[[Trial], Mask | None]
Refusals = Callable[[Trial, int], tuple[Refusal, ...]]


@dataclass(frozen=True, slots=True)
class Filter:
    """Both functions say the same: a host is masked out exactly where there is a reason (a property test holds them together)."""

    name: str
    fitting: Fitting
    """The hosts that fit; None where the request asks nothing of this kind."""
    refusals: Refusals
    """Every reason against the host of one row; empty where it fits."""
