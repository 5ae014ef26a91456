"""What a scorer is: 0..1 for each host, higher is better. A wish, never a rule."""

from collections.abc import Callable
from dataclasses import dataclass

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import Floats, Rows

Scores = Callable[[Trial, Rows], Floats | None]


@dataclass(frozen=True, slots=True)
class Scorer:
    name: str
    scores: Scores
    """One figure for each of these rows; None where it has nothing to say about this request. Figures of rows that do not fit
    are never read, so they need not mean anything, but they must be finite."""
