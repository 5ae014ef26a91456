"""Where less has to be moved: base images that are there, the host on which a stopped vm is defined."""

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.fleet import Floats, Rows
from trimtab_controller.core.placement.scorers.base import Scorer


def _image_locality(trial: Trial, rows: Rows) -> Floats | None:
    """The share of the images that are present: each one saves a copy."""
    wanted = sorted(set(trial.request.image_ids))
    if not wanted:
        return None
    present = np.zeros(len(trial.fleet))[rows]
    for image_id in wanted:
        present += trial.fleet.where_contains("image_ids", image_id)[rows]
    present /= len(wanted)
    return present


def _home(trial: Trial, rows: Rows) -> Floats | None:
    preferred = trial.request.preferred_host_id
    return trial.fleet.only([preferred])[rows].astype(np.float64) if preferred else None


IMAGE_LOCALITY = Scorer("image-locality", _image_locality, Reads.FLEET)
HOME = Scorer("home", _home, Reads.NAMES)
