"""The hard constraints, in the order in which reasons are told: what no change of the fleet cures comes first.

The order does not change which hosts fit. A new constraint is one `Filter` in the file of its noun, and nothing else.
"""

from trimtab_controller.core.placement.filters import capacity, compatibility, groups, intent, reach, scarce
from trimtab_controller.core.placement.filters.base import Filter, Reads

FILTERS: tuple[Filter, ...] = (
    *intent.FILTERS,
    *compatibility.FILTERS,
    *reach.FILTERS,
    *groups.FILTERS,
    *scarce.FILTERS,
    *capacity.FILTERS,
)

__all__ = ["FILTERS", "Filter", "Reads"]
