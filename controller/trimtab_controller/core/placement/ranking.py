"""The best few of many scores, exactly and without sorting them all."""

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.fleet import Floats

_BLOCK = 64


def best_positions(scores: Floats, *, count: int) -> npt.NDArray[np.intp]:
    """Return the positions of the `count` highest scores, highest first, equal ones in order of position."""
    if scores.size > 4 * _BLOCK * count:
        positions = _best_blocks(scores, count=count)
        return positions[_best_few(scores[positions], count=count)]
    return _best_few(scores, count=count)


def _best_blocks(scores: Floats, *, count: int) -> npt.NDArray[np.intp]:
    """Return all positions in the `count` blocks with the highest maxima, ascending.

    The best `count` scores are all in there: outside stands only what `count` other blocks' maxima beat, by score or by position.
    """
    maxima = np.maximum.reduceat(scores, np.arange(0, scores.size, _BLOCK))
    blocks = np.sort(np.argsort(-maxima, kind="stable")[:count])
    positions = (blocks[:, np.newaxis] * _BLOCK + np.arange(_BLOCK)).ravel()
    return positions[positions < scores.size]


def _best_few(scores: Floats, *, count: int) -> npt.NDArray[np.intp]:
    if scores.size > count:
        threshold = np.partition(scores, scores.size - count)[scores.size - count]
        candidates = np.flatnonzero(scores >= threshold)
    else:
        candidates = np.arange(scores.size)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
