"""All filters over all hosts: who fits, how many each filter refused, and the reasons for the hosts that are asked about."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters import FILTERS
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.verdict import HostVerdict, Refusal


@dataclass(frozen=True, slots=True)
class Sieve:
    """The outcome of every filter. Valid until the books change."""

    fits: Mask
    fit_count: int
    refused_by: Mapping[str, int]
    """Hosts that each filter refused; filters that refused none are left out."""
    refusing: tuple[Mask, ...]
    """Who passed those filters."""

    @classmethod
    def of(cls, trial: Trial) -> "Sieve":
        size = len(trial.fleet)
        refusing, refused_by = [], {}
        for each in FILTERS:
            mask = each.fitting(trial)
            if mask is None:
                continue
            passed = int(np.count_nonzero(mask))
            if passed < size:
                refusing.append(mask)
                refused_by[each.name] = size - passed
        fits = np.ones(size, dtype=np.bool_)
        for mask in refusing:
            fits &= mask
        return cls(fits, int(np.count_nonzero(fits)), refused_by, tuple(refusing))

    def nearest(self, *, count: int) -> list[int]:
        """Return up to `count` rows that do not fit, those with the fewest filters against them first."""
        misses = np.zeros(self.fits.size, dtype=np.int64)
        for mask in self.refusing:
            misses += ~mask
        rows = np.flatnonzero(misses)
        order = np.argsort(misses[rows], kind="stable")[:count]
        nearest: npt.NDArray[np.intp] = rows[order]
        return [int(row) for row in nearest]


def refusals_of(trial: Trial, row: int) -> tuple[Refusal, ...]:
    """Return every reason against one host; empty where it fits."""
    return tuple(refusal for each in FILTERS for refusal in each.refusals(trial, row))


def refused_verdicts(trial: Trial, rows: Iterable[int]) -> tuple[HostVerdict, ...]:
    """Return the verdicts on hosts that do not fit, in the order given."""
    hosts = trial.fleet.hosts
    return tuple(HostVerdict(hosts[row].host_id, hosts[row].name, refusals_of(trial, row)) for row in rows)
