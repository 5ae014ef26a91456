"""All filters over all hosts: who fits, how many each filter refused, and the reasons for the hosts that are asked about."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters import FILTERS, Filter
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.verdict import HostVerdict, Refusal


@dataclass(frozen=True, slots=True)
class Sieve:
    """The outcome of every filter. Valid until the books change."""

    fits: Mask
    fit_count: int
    refused_by: Mapping[str, int]
    """Hosts that each filter refused; filters that refused none are left out."""
    passed: tuple[tuple[Filter, Mask], ...]
    """Those filters, and who passed them."""

    @classmethod
    def of(cls, trial: Trial) -> "Sieve":
        size = len(trial.fleet)
        passed: list[tuple[Filter, Mask]] = []
        refused_by: dict[str, int] = {}
        for each in FILTERS:
            mask = each.fitting(trial)
            if mask is None:
                continue
            count = int(np.count_nonzero(mask))
            if count < size:
                passed.append((each, mask))
                refused_by[each.name] = size - count
        fits = np.ones(size, dtype=np.bool_)
        for _, mask in passed:
            fits &= mask
        return cls(fits, int(np.count_nonzero(fits)), refused_by, tuple(passed))

    def refused_verdicts(self, trial: Trial, *, count: int) -> tuple[HostVerdict, ...]:
        """Return the verdicts on up to `count` hosts that do not fit, those with the fewest filters against them first."""
        misses = np.zeros(self.fits.size, dtype=np.int64)
        for _, mask in self.passed:
            misses += ~mask
        refused = np.flatnonzero(misses)
        rows = refused[np.argsort(misses[refused], kind="stable")[:count]]
        reasons: dict[int, list[Refusal]] = {row: [] for row in rows.tolist()}
        for each, mask in self.passed:
            for row in rows[~mask[rows]].tolist():
                reasons[row] += each.refusals(trial, row)
        return tuple(_verdict(trial, row, tuple(refusals)) for row, refusals in reasons.items())


def refused_verdict(trial: Trial, row: int) -> HostVerdict | None:
    """Return the verdict on one host with every reason against it; None where it fits."""
    refusals = tuple(refusal for each in FILTERS for refusal in each.refusals(trial, row))
    return _verdict(trial, row, refusals) if refusals else None


def _verdict(trial: Trial, row: int, refusals: tuple[Refusal, ...]) -> HostVerdict:
    host = trial.fleet.hosts[row]
    return HostVerdict(host.host_id, host.name, refusals)
