"""Short vms where others stay anyway, long ones together: the less longer a host stays in use because of the vm, the better."""

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.fleet import Floats, Rows
from trimtab_controller.core.placement.scorers.base import Scorer

# A vm that makes the use of its host two days longer than it would be is as bad as one that does so for months.
_WORST_S = 2 * 86_400.0


def _lifetime(trial: Trial, rows: Rows) -> Floats | None:
    """1 where the host is in use for longer than the vm will live; nothing to say where nobody keeps along who is where."""
    occupancy = trial.books.occupancy
    if occupancy is None:
        return None
    longer = occupancy.longer_s(trial.request.life_kind, rows)
    longer /= -_WORST_S
    longer += 1.0
    np.maximum(longer, 0.0, out=longer)
    return longer


LIFETIME = Scorer("lifetime", _lifetime, Reads.BOOKS)
