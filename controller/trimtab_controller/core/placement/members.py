"""Where the members of vm groups are, counted by failure domain as they come and go."""

from collections import Counter
from collections.abc import Mapping

from trimtab_controller.core.placement.fleet import FleetSnapshot


class Members:
    """Of all groups. Belongs to one set of books."""

    __slots__ = ("_counts", "_fleet", "_row_of")

    def __init__(self, fleet: FleetSnapshot, row_of: Mapping[str, Mapping[str, int]]) -> None:
        """`row_of`: the row of each vm, by group."""
        self._fleet = fleet
        self._row_of = {group_id: dict(members) for group_id, members in row_of.items()}
        # By group, then by the label that makes the domains; made when first asked for.
        self._counts: dict[str, dict[str, Counter[int]]] = {}

    def put(self, group_id: str, vm_id: str, row: int) -> None:
        """Say that the vm is there now, wherever it was."""
        self.take(group_id, vm_id)
        self._row_of.setdefault(group_id, {})[vm_id] = row
        self._count(group_id, row, 1)

    def take(self, group_id: str, vm_id: str, row: int | None = None) -> None:
        """Say that the vm is nowhere any more; nothing where it is not (on this row)."""
        own = self._row_of.get(group_id, {})
        if vm_id in own and row in (None, own[vm_id]):
            self._count(group_id, own.pop(vm_id), -1)

    def by_domain(self, group_id: str, label: str, *, but: str) -> Counter[int]:
        """Return how many members are in each domain, by its code, not counting the vm `but`. Not to be written."""
        own, known = self._row_of.get(group_id, {}), self._counts.setdefault(group_id, {})
        if label in known and but not in own:
            return known[label]
        codes = self._fleet.domains(label).codes
        if label not in known:
            known[label] = Counter(codes[list(own.values())].tolist())
        if but not in own:
            return known[label]
        return +(known[label] - Counter([int(codes[own[but]])]))

    def copy(self) -> "Members":
        return Members(self._fleet, self._row_of)

    def _count(self, group_id: str, row: int, more: int) -> None:
        for label, counts in self._counts.get(group_id, {}).items():
            code = self._fleet.domains(label).codes.item(row)
            left = counts.get(code, 0) + more
            if left:
                counts[code] = left
            else:
                del counts[code]
