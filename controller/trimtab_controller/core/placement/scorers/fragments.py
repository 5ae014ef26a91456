"""How much of what stays free is still of use: a host with memory but no vcpus left holds nothing more.

After Fragmentation Gradient Descent (Weng et al., ATC'23), for two resources: what is left on a host is held against the shapes
that vms usually have; what the last vm of a shape would leave over is lost to that shape. The host is best where the vm raises
the expected loss least. Half of the shapes are as large as the vm, half are large shares of a host: to a small vm everything that
it leaves is of use to others like it, so by those alone small vms would break up the room of large ones.
"""

from collections.abc import Sequence

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Floats, Integers, Rows
from trimtab_controller.core.placement.scorers.base import Scorer

# Vcpus and memory of shapes, equally likely, as multiples of the vm itself, so that units do not matter: the ratios that clouds sell.
_OF_VM: Sequence[tuple[float, float]] = ((1.0, 1.0), (1.0, 0.5), (1.0, 2.0), (2.0, 2.0))
# And as shares of the largest host.
_OF_HOST = (0.5, 0.25, 0.125)


def _fragmentation(trial: Trial, rows: Rows) -> Floats | None:
    vcpus, memory_mib = trial.request.vcpus, trial.request.memory_mib
    if vcpus == 0 or memory_mib == 0:
        return None
    free_vcpus, free_memory = trial.books.free[VCPUS][rows], trial.books.free[MEMORY][rows]
    taken_vcpus, taken_memory = trial.amounts.get(VCPUS, 0), trial.amounts.get(MEMORY, 0)
    inverse, shapes = trial.fleet.inverse_limits, _shapes(trial)
    lost = np.zeros(free_vcpus.size)
    for shape in shapes:
        after = _lost(free_vcpus - taken_vcpus, free_memory - taken_memory, shape)
        before = _lost(free_vcpus, free_memory, shape)
        lost += (after[0] - before[0]) * inverse[VCPUS][rows]
        lost += (after[1] - before[1]) * inverse[MEMORY][rows]
    # Each of the shapes loses at most one whole host's worth of each resource, and gains as much.
    lost /= 4 * len(shapes)
    np.subtract(0.5, lost, out=lost)
    np.clip(lost, 0.0, 1.0, out=lost)
    return lost


def _shapes(trial: Trial) -> list[tuple[int, int]]:
    vcpus, memory_mib = trial.request.vcpus, trial.request.memory_mib
    limits = trial.fleet.limits
    most_vcpus, most_memory_mib = trial.fleet.remembered(
        "largest-host", lambda: [int(limits[name].max(initial=0)) for name in (VCPUS, MEMORY)]
    )
    shapes = [(vcpus * of_vcpus, memory_mib * of_memory) for of_vcpus, of_memory in _OF_VM]
    shapes += [(most_vcpus * share, most_memory_mib * share) for share in _OF_HOST]
    return [(max(1, int(vcpus)), max(1, int(memory_mib))) for vcpus, memory_mib in shapes]


def _lost(vcpus: Integers, memory_mib: Integers, shape: tuple[int, int]) -> tuple[Integers, Integers]:
    """Return what stays over once as many vms of the shape as fit are there. What is overdrawn counts as it is."""
    count = np.maximum(np.minimum(vcpus // shape[0], memory_mib // shape[1]), 0)
    return vcpus - count * shape[0], memory_mib - count * shape[1]


FRAGMENTATION = Scorer("fragmentation", _fragmentation, Reads.ROW)
