"""Weighs the wishes of a policy over the hosts that fit, and keeps the best."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import Floats, Rows
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.sieve import Sieve
from trimtab_controller.core.placement.verdict import HostVerdict, Shortlist


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of some rows, in their order."""

    totals: Floats
    parts: dict[str, Floats]
    """By scorer, unweighted."""

    @classmethod
    def of(cls, trial: Trial, rows: Rows, policy: Policy) -> "Scores":
        parts: dict[str, Floats] = {}
        for name in policy.weights:
            scores = SCORERS[name].scores(trial, rows)
            if scores is not None:
                parts[name] = scores
        return cls(_weighted_mean(parts, policy) if parts else np.zeros(len(trial.fleet))[rows], parts)


def _weighted_mean(parts: dict[str, Floats], policy: Policy) -> Floats:
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
    return _shortlist(trial, scores, rows=rows[positions], positions=positions)


def scored_verdict(trial: Trial, row: int, policy: Policy) -> HostVerdict:
    """Return the verdict on one host that fits."""
    rows = np.array([row])
    return _shortlist(trial, Scores.of(trial, rows, policy), rows=rows, positions=np.array([0])).verdict(0)


def _shortlist(trial: Trial, scores: Scores, *, rows: npt.NDArray[np.intp], positions: npt.NDArray[np.intp]) -> Shortlist:
    """Return the hosts of `rows`, whose scores stand at `positions`."""
    ids, names = trial.fleet.names_at(rows)
    totals = six_digits(scores.totals[positions])
    # One scorer's figure is the total.
    parts = {name: totals if len(scores.parts) == 1 else six_digits(values[positions]) for name, values in scores.parts.items()}
    return Shortlist(ids, names, totals, parts)


def six_digits(values: Floats) -> tuple[float, ...]:
    """Return the figures that are shown and stored: more digits say nothing and fill the journal."""
    return tuple(values.round(6).tolist())
