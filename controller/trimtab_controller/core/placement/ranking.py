"""The best few of many scores, exactly and without sorting them all."""

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.fleet import Floats, RowIndex

# Groups per wanted score: enough that the best ones seldom share a group, few enough that choosing among groups is cheap.
_GROUPS_EACH = 8


def best_positions(scores: Floats, *, count: int) -> npt.NDArray[np.intp]:
    """Return the positions of the `count` highest scores, highest first, equal ones in order of position."""
    groups = _GROUPS_EACH * count
    depth = scores.size // groups
    if depth < 2:
        return (-scores).argsort(kind="stable")[:count]
    # `count` groups have a score of at least the count-th highest group maximum, so the best `count` of all are that high.
    maxima = scores[: groups * depth].reshape(depth, groups).max(axis=0)
    maxima.partition(groups - count)
    candidates = (scores >= maxima[groups - count]).nonzero()[0]
    best: npt.NDArray[np.intp] = candidates[(-scores[candidates]).argsort(kind="stable")[:count]]
    return best


def best_of_rows(scores: Floats, rows: RowIndex, *, count: int) -> npt.NDArray[np.intp]:
    """Return the positions of the `count` highest scores, highest first, equal ones in order of their row."""
    if scores.size > 8 * count:
        sorted_in_part = scores.copy()
        sorted_in_part.partition(scores.size - count)
        candidates = (scores >= sorted_in_part[scores.size - count]).nonzero()[0]
        best: npt.NDArray[np.intp] = candidates[np.lexsort((rows[candidates], -scores[candidates]))[:count]]
        return best
    return np.lexsort((rows, -scores))[:count]
