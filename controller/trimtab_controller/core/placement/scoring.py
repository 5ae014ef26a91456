"""Weighs the wishes of a policy over the hosts that fit, and keeps the best."""

from dataclasses import dataclass

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import Floats, Rows
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.sieve import Sieve
from trimtab_controller.core.placement.verdict import HostVerdict

# Below this share of fitting hosts, gathering their rows costs less than scoring all hosts.
_SPARSE = 4
# Worse than any score: a host that does not fit.
_NEVER = -1.0


@dataclass(frozen=True, slots=True)
class _Scores:
    totals: Floats
    parts: dict[str, Floats]
    """By scorer, unweighted."""

    @classmethod
    def of(cls, trial: Trial, rows: Rows, policy: Policy) -> "_Scores":
        parts: dict[str, Floats] = {}
        for name in policy.weights:
            scores = SCORERS[name].scores(trial, rows)
            if scores is not None:
                parts[name] = scores
        totals = np.zeros(len(trial.fleet))[rows]
        for name, scores in parts.items():
            totals += policy.weights[name] * scores
        totals /= sum(policy.weights[name] for name in parts) or 1.0
        return cls(totals, parts)


def best_verdicts(trial: Trial, sieve: Sieve, policy: Policy, *, count: int) -> tuple[HostVerdict, ...]:
    """Return the verdicts on up to `count` hosts that fit, the best first, equal ones by name."""
    count = min(count, sieve.fit_count)
    if count == 0:
        return ()
    if sieve.fit_count * _SPARSE <= sieve.fits.size:
        rows = np.flatnonzero(sieve.fits)
        scores = _Scores.of(trial, rows, policy)
        positions = best_positions(scores.totals, count=count)
        return _verdicts(trial, scores, rows[positions].tolist(), positions.tolist())
    scores = _Scores.of(trial, slice(None), policy)
    np.putmask(scores.totals, ~sieve.fits, _NEVER)
    chosen = best_positions(scores.totals, count=count).tolist()
    return _verdicts(trial, scores, chosen, chosen)


def scored_verdict(trial: Trial, row: int, policy: Policy) -> HostVerdict:
    """Return the verdict on one host that fits."""
    return _verdicts(trial, _Scores.of(trial, np.array([row]), policy), [row], [0])[0]


def _verdicts(trial: Trial, scores: _Scores, rows: list[int], positions: list[int]) -> tuple[HostVerdict, ...]:
    """Return verdicts on `rows`, whose scores stand at `positions`."""
    hosts = trial.fleet.hosts
    totals = _six_digits(scores.totals, positions)
    parts = {name: _six_digits(values, positions) for name, values in scores.parts.items()}
    return tuple(
        HostVerdict(
            hosts[row].host_id,
            hosts[row].name,
            score=totals[index],
            scores={name: values[index] for name, values in parts.items()},
        )
        for index, row in enumerate(rows)
    )


def _six_digits(values: Floats, positions: list[int]) -> list[float]:
    """Return the figures that are shown and stored: more digits say nothing and fill the journal."""
    rounded: list[float] = np.round(values[positions], 6).tolist()
    return rounded
