"""Where the vm leaves the fleet in the best shape, by the shares of vcpus and memory that stay free on the host.

On real traces packing by both resources at once holds the fewest hosts over time; spreading costs up to a third more.
"""

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Floats, Rows, at_rows
from trimtab_controller.core.placement.scorers.base import Extents, Figure, Scorer


def _shares_left(trial: Trial, rows: Rows) -> tuple[Floats, Floats]:
    """Return which shares of vcpus and memory stay free with this vm on the host. Fresh arrays: the scorers work in place."""
    return _share_left(trial, VCPUS, rows), _share_left(trial, MEMORY, rows)


def _share_left(trial: Trial, resource: str, rows: Rows) -> Floats:
    taken = trial.amounts.get(resource, 0)
    shares, inverse = at_rows(trial.books.free_shares[resource], rows), trial.fleet.inverse_limits[resource]
    common = trial.fleet.common_inverse(resource)
    # Of alike hosts there is one figure: to gather it for each of them costs as much as the shares themselves.
    left: Floats = shares + (at_rows(inverse, rows) * -taken if common is None else common * -taken)
    if not taken:
        # Who takes none of it, as one on cpus of its own, fits where it is overdrawn, too: there nothing is left.
        np.maximum(left, 0.0, out=left)
    return left


def share_left(trial: Trial, resource: str, row: int) -> float:
    """Return which share stays free with this vm on one host: to the last digit as for many."""
    taken = trial.amounts.get(resource, 0)
    left = trial.books.free_shares[resource].item(row) + trial.fleet.inverse_limits[resource].item(row) * -taken
    return left if taken else max(left, 0.0)


def _least_left(trial: Trial, resource: str, sets: Extents) -> Floats:
    """Return which share at least stays free on any host of each set that the vm fits on. Fresh arrays."""
    return _of_use(sets.least_shares[resource] + sets.most_inverse[resource] * -trial.amounts.get(resource, 0))


def _most_left(trial: Trial, resource: str, sets: Extents) -> Floats:
    """Return which share at most stays free on any host of each set that the vm fits on. Fresh arrays."""
    return _of_use(sets.most_shares[resource] + sets.least_inverse[resource] * -trial.amounts.get(resource, 0))


def _of_use(left: Floats) -> Floats:
    """Return what is left where the vm fits; where it does not, nothing is."""
    np.maximum(left, 0.0, out=left)
    return left


def _best_fit(trial: Trial, rows: Rows) -> Floats:
    """1 for a host that becomes exactly full. The square of the length of what is left: the root would not change the order."""
    return _fullness(*_shares_left(trial, rows))


def _best_fit_at_most(trial: Trial, sets: Extents) -> Floats:
    return _fullness(_least_left(trial, VCPUS, sets), _least_left(trial, MEMORY, sets))


def _fullness(vcpus: Figure, memory: Figure) -> Figure:
    vcpus *= vcpus
    memory *= memory
    vcpus += memory
    vcpus *= -0.5
    vcpus += 1.0
    return vcpus


def _spread(trial: Trial, rows: Rows) -> Floats:
    """1 for an empty host, 0 for a full one."""
    return _emptiness(*_shares_left(trial, rows))


def _spread_at_most(trial: Trial, sets: Extents) -> Floats:
    return _emptiness(_most_left(trial, VCPUS, sets), _most_left(trial, MEMORY, sets))


def _emptiness(vcpus: Figure, memory: Figure) -> Figure:
    vcpus += memory
    vcpus *= 0.5
    return vcpus


def _balanced(trial: Trial, rows: Rows) -> Floats:
    """1 where vcpus and memory would be used to the same degree, so that neither is stranded."""
    return _evenness(*_shares_left(trial, rows))


def _evenness(vcpus: Figure, memory: Figure) -> Figure:
    vcpus -= memory
    apart = abs(vcpus)
    return 1.0 - apart


def _balanced_at_most(trial: Trial, sets: Extents) -> Floats:
    more_vcpus = _least_left(trial, VCPUS, sets) - _most_left(trial, MEMORY, sets)
    more_memory = _least_left(trial, MEMORY, sets) - _most_left(trial, VCPUS, sets)
    apart = np.maximum(more_vcpus, more_memory)
    # Neither is more everywhere: some host may have as much left of the one as of the other.
    np.maximum(apart, 0.0, out=apart)
    bounds: Floats = 1.0 - apart
    return bounds


BEST_FIT = Scorer("best-fit", _best_fit, Reads.ROW, _best_fit_at_most, _fullness)
SPREAD = Scorer("spread", _spread, Reads.ROW, _spread_at_most, _emptiness)
BALANCED = Scorer("balanced", _balanced, Reads.ROW, _balanced_at_most, _evenness)
