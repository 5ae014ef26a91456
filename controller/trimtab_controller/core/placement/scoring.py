"""Weighs the wishes of a policy over the hosts that fit, and keeps the best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, FleetSnapshot, Floats, RowIndex, Rows
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.scorers.base import Figure, OfLeft
from trimtab_controller.core.placement.scorers.packing import share_left
from trimtab_controller.core.placement.sieve import Sieve
from trimtab_controller.core.placement.verdict import Columns, HostVerdict, Shortlist

# Whether a scorer has anything to say, it tells without a host.
_NO_ROWS = slice(0, 0)


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of some rows, in their order."""

    totals: Floats
    parts: dict[str, Floats]
    """By scorer, unweighted."""

    @classmethod
    def of(cls, trial: Trial, rows: Rows, policy: Policy, *, scorers: Iterable[str] = ()) -> "Scores":
        """`scorers`: those that have something to say, in the policy's order, where that is known already."""
        parts: dict[str, Floats] = {}
        for name in scorers or policy.weights:
            scores = SCORERS[name].scores(trial, rows)
            if scores is not None:
                parts[name] = scores
        return cls(weighted_mean(parts, policy) if parts else np.zeros(len(trial.fleet))[rows], parts)

    def joined(self, others: "Scores") -> "Scores":
        """Return the figures of both, these first."""
        parts = {name: np.concatenate((scores, others.parts[name])) for name, scores in self.parts.items()}
        return Scores(next(iter(parts.values())) if len(parts) == 1 else np.concatenate((self.totals, others.totals)), parts)


@dataclass(frozen=True, slots=True)
class SingleScores:
    """The scores of one row at a time, for requests of one shape, in plain figures: the same as of many, to the last digit."""

    policy: Policy
    makers: Mapping[str, OfLeft]
    """By scorer that has something to say."""

    @classmethod
    def of(cls, trial: Trial, policy: Policy) -> "SingleScores | None":
        """Return the scores; None where a scorer looks at more than what stays free of vcpus and memory."""
        speaking = [SCORERS[name] for name in policy.weights if SCORERS[name].scores(trial, _NO_ROWS) is not None]
        makers = {scorer.name: scorer.of_left for scorer in speaking if scorer.of_left is not None}
        return cls(policy, makers) if makers and len(makers) == len(speaking) else None

    def at(self, trial: Trial, row: int) -> tuple[float, list[float]]:
        """Return the total and its parts."""
        left = share_left(trial, VCPUS, row), share_left(trial, MEMORY, row)
        parts = {name: make(*left) for name, make in self.makers.items()}
        return weighted_mean(parts, self.policy), [*parts.values()]


def weighted_mean(parts: dict[str, Figure], policy: Policy) -> Figure:
    """Return the scores by policy. Of one scorer they are its own: nobody writes in them."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    weight_sum = sum(policy.weights[name] for name in parts)
    weighted = (scores * (policy.weights[name] / weight_sum) for name, scores in parts.items())
    totals = next(weighted)
    for scores in weighted:
        totals += scores
    return totals


def shortlist(trial: Trial, sieve: Sieve, policy: Policy, *, count: int) -> Shortlist:
    """Return up to `count` of the hosts that fit, the best first, equal ones by name."""
    count = min(count, sieve.fit_count)
    if count == 0:
        return Shortlist()
    # Gathering the rows that fit costs less than to score all hosts and mark those that do not, also where most do.
    rows = sieve.fits.nonzero()[0]
    scores = Scores.of(trial, rows, policy)
    positions = best_positions(scores.totals, count=count)
    return shortlist_of(trial, scores, rows=rows[positions], positions=positions)


def scored_verdict(trial: Trial, row: int, policy: Policy) -> HostVerdict:
    """Return the verdict on one host that fits."""
    rows = np.array([row])
    return shortlist_of(trial, Scores.of(trial, rows, policy), rows=rows, positions=np.array([0])).verdict(0)


def shortlist_of(trial: Trial, scores: Scores, *, rows: npt.NDArray[np.intp], positions: npt.NDArray[np.intp]) -> Shortlist:
    """Return the hosts of `rows`, whose scores stand at `positions`."""
    fleet, names, totals = trial.fleet, tuple(scores.parts), scores.totals[positions]
    # One scorer's figure is the total.
    parts = [totals] if len(names) == 1 else [values[positions] for values in scores.parts.values()]
    return Shortlist.kept(
        rows.size, fleet.hosts[rows[0]].host_id, lambda: _columns(fleet, rows, totals, dict(zip(names, parts, strict=True)))
    )


def _columns(fleet: FleetSnapshot, rows: RowIndex, totals: Floats, parts: Mapping[str, Floats]) -> Columns:
    shown_totals, *shown = _six_digits_each([totals, *parts.values()])
    return Columns(*fleet.names_at(rows), shown_totals, dict(zip(parts, shown, strict=True)))


def _six_digits_each(columns: Sequence[Floats]) -> list[tuple[float, ...]]:
    """Return the figures of several columns of one length: to round them all costs hardly more than to round one."""
    size = columns[0].size
    shown = six_digits(np.concatenate(columns))
    return [shown[start : start + size] for start in range(0, size * len(columns), size)]


def six_digits(values: Floats) -> tuple[float, ...]:
    """Return the figures that are shown and stored: more digits say nothing and fill the journal."""
    return tuple(values.round(6).tolist())


def six_digits_of(value: float) -> float:
    """Return one such figure, as numpy rounds: what Python's own rounding says differs from it in the last digit."""
    return round(value * 1e6) / 1e6
