"""What hosts and vms will use in the next hour, from what they used so far. Pure arithmetic on rollups.

Measured on days of real vms: the mean of the last hour misleads, since a busy hour is often followed by a quiet one, and the mean of
a day is too slow. A mean whose weights halve every hour is closest for the next hour, by a tenth better than the last hour alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_controller.core.placement.fleet import Floats

HALF_LIFE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUse:
    """How a host fared, each as a share 0..1 of the time."""

    cpu: float = 0.0
    steal: float = 0.0
    """Guests were ready to run and did not get a processor."""
    cpu_pressure: float = 0.0
    """Some task waited for a processor (PSI `some`)."""
    memory_pressure: float = 0.0
    """Some task waited for memory (PSI `some`)."""
    memory_withheld_mib: int = 0
    """Claimed by no vm, and not available all the same: others use it, or guests more than they claim. Not a share."""
    memory_mib: int = 0
    """All that it has; 0 where nobody says what of it is used."""
    memory_others_mib: int = 0
    """What is used of it by others than its vms. What these hold is theirs (`VmSnapshot.used_mib`), and goes where they go."""


def predicted(samples: Floats, *, step_s: float, half_life_s: float = HALF_LIFE_S) -> Floats:
    """Return per row the weighted mean of the samples, oldest first, one every `step_s`; NaN samples were not measured.

    A row without any sample is 0: nothing is known about it, and nothing is moved for its sake.
    """
    ages = np.arange(samples.shape[1])[::-1] * step_s
    weights = np.where(np.isnan(samples), 0.0, 0.5 ** (ages / half_life_s))
    total = weights.sum(axis=1)
    means: Floats = np.einsum("vt,vt->v", weights, np.nan_to_num(samples)) / np.maximum(total, 1e-12)
    return means


def wanted_millis(use_millis: Sequence[int], use: HostUse, *, capacity_millis: int) -> list[int]:
    """Return what the vms of a host would use if nothing held them back: on a host that is short, use understates demand.

    What guests waited for is spread over them by their use. Steal counts in full; pressure only where the host is busy, since a
    single short wait is pressure too.
    """
    busy = min(1.0, use.cpu)
    waited_millis = capacity_millis * max(use.steal, use.cpu_pressure * busy * busy)
    total = sum(use_millis)
    if total <= 0 or waited_millis <= 0:
        return list(use_millis)
    return [round(own * (1 + waited_millis / total)) for own in use_millis]
