"""Where the vm leaves the fleet in the best shape, by the shares of vcpus and memory that stay free on the host.

On real traces packing by both resources at once holds the fewest hosts over time; spreading costs up to a third more.
"""

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Floats, Rows, at_rows
from trimtab_controller.core.placement.scorers.base import Scorer


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


def _best_fit(trial: Trial, rows: Rows) -> Floats:
    """1 for a host that becomes exactly full. The square of the length of what is left: the root would not change the order."""
    vcpus, memory = _shares_left(trial, rows)
    vcpus *= vcpus
    memory *= memory
    vcpus += memory
    vcpus *= -0.5
    vcpus += 1.0
    return vcpus


def _spread(trial: Trial, rows: Rows) -> Floats:
    """1 for an empty host, 0 for a full one."""
    vcpus, memory = _shares_left(trial, rows)
    vcpus += memory
    vcpus *= 0.5
    return vcpus


def _balanced(trial: Trial, rows: Rows) -> Floats:
    """1 where vcpus and memory would be used to the same degree, so that neither is stranded."""
    vcpus, memory = _shares_left(trial, rows)
    vcpus -= memory
    np.abs(vcpus, out=vcpus)
    np.subtract(1.0, vcpus, out=vcpus)
    return vcpus


BEST_FIT = Scorer("best-fit", _best_fit)
SPREAD = Scorer("spread", _spread)
BALANCED = Scorer("balanced", _balanced)
