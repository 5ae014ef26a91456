"""The fleet as a decision sees it: frozen snapshots in, numpy columns for what is compared, one row per host.

Rows are in order of host name, so that nothing depends on the order in which the database gave them. What changes while a batch
is decided (free capacity, where members of groups are) is in `books.py`; this module holds what does not. Static properties are
answered as masks: `where` groups the hosts by the property's value, asks the question once per distinct value, and remembers the
answer. A fleet has few distinct sets of CPU models or machine types, however many hosts.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.columns import MEMORY, VCPUS, Integers, column, free_columns, local_space
from trimtab_controller.core.placement.snapshot import GroupSnapshot, HostSnapshot, NetworkReach, PoolPlace, PoolSnapshot

__all__ = [
    "ALL",
    "HOST",
    "MEMORY",
    "NOWHERE",
    "VCPUS",
    "Domains",
    "FleetSnapshot",
    "Floats",
    "GroupSnapshot",
    "HostSnapshot",
    "Integers",
    "Mask",
    "NetworkReach",
    "PoolPlace",
    "PoolSnapshot",
    "RowIndex",
    "Rows",
    "at_rows",
    "local_space",
]

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
RowIndex = npt.NDArray[np.intp]
Rows = RowIndex | slice

ALL = slice(None)


def at_rows(column: npt.NDArray[Any], rows: Rows) -> npt.NDArray[Any]:
    """Return the column at these rows. `take` gathers in half the time of an index."""
    if rows is ALL:
        return column
    return column[rows] if isinstance(rows, slice) else column.take(rows)


# As a failure domain: each host is one, whatever its labels.
HOST = "host"
# The domain of hosts that lack the label.
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Domains:
    """The failure domains of one label."""

    codes: RowIndex
    """By row; `NOWHERE` for hosts without the label."""
    names: tuple[str, ...]
    """By code."""


@dataclass(frozen=True, slots=True, eq=False)
class FleetSnapshot:
    """The whole fleet at one instant. Build it with `of`; a batch books its claims on a copy of `free` (`books.Books`)."""

    hosts: tuple[HostSnapshot, ...]
    pools: Mapping[str, PoolSnapshot]
    row_of: Mapping[str, int]
    """Row by host id."""
    limits: Mapping[str, Integers]
    """By resource."""
    free: Mapping[str, Integers]
    inverse_limits: Mapping[str, Floats]
    """1 / limit, for shares; of vcpus and memory."""
    shared_free_bytes: Mapping[str, int]
    members: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Where the members of vm groups are: row by vm id, by group id; members elsewhere are left out."""
    _groups: dict[str, tuple[RowIndex, list[Any]]] = field(default_factory=dict)
    _masks: dict[tuple[str, Hashable], Mask] = field(default_factory=dict)
    _remembered: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        hosts: Iterable[HostSnapshot],
        pools: Iterable[PoolSnapshot] = (),
        *,
        groups: Iterable[GroupSnapshot] = (),
    ) -> "FleetSnapshot":
        """Return the snapshot of these hosts, pools and groups, in any order."""
        ordered = tuple(sorted(hosts, key=lambda host: (host.name, host.host_id)))
        by_id = {pool.pool_id: pool for pool in sorted(pools, key=lambda pool: pool.pool_id)}
        limits = {
            VCPUS: column(host.vcpus_limit for host in ordered),
            MEMORY: column(host.memory_limit_mib for host in ordered),
        }
        row_of = {host.host_id: row for row, host in enumerate(ordered)}
        return cls(
            hosts=ordered,
            pools=by_id,
            row_of=row_of,
            limits=limits,
            free=free_columns(ordered, by_id.values()),
            inverse_limits={name: 1.0 / np.maximum(limit, 1) for name, limit in limits.items()},
            shared_free_bytes={pool.pool_id: pool.free_bytes() for pool in by_id.values() if pool.is_shared},
            members={
                group.group_id: {vm_id: row_of[host_id] for vm_id, host_id in group.members.items() if host_id in row_of}
                for group in groups
            },
        )

    @property
    def groups(self) -> tuple[GroupSnapshot, ...]:
        """The vm groups as they were given, less members on hosts that are not here: for a fleet made of this one."""
        return tuple(
            GroupSnapshot(group_id=group_id, members={vm_id: self.hosts[row].host_id for vm_id, row in members.items()})
            for group_id, members in self.members.items()
        )

    def __len__(self) -> int:
        return len(self.hosts)

    def names_at(self, rows: RowIndex) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return ids and names of these hosts, in this order."""
        ids, names = self.remembered(
            "names", lambda: tuple(np.array([getattr(host, name) for host in self.hosts], object) for name in ("host_id", "name"))
        )
        return tuple(ids.take(rows).tolist()), tuple(names.take(rows).tolist())

    def where(self, attribute: str, key: Hashable, holds: Callable[[Any], bool]) -> Mask:
        """Return the hosts whose `attribute` (a field or property of HostSnapshot) satisfies `holds`.

        `key` names the question for the memory: one attribute and key must always come with the same meaning of `holds`.
        Mappings are given to `holds` as frozen sets of their items.
        """
        mask = self._masks.get((attribute, key))
        if mask is None:
            codes, values = self._grouped(attribute)
            answers = np.fromiter((holds(value) for value in values), dtype=np.bool_, count=len(values))
            mask = answers[codes]
            mask.setflags(write=False)
            self._masks[attribute, key] = mask
        return mask

    def only(self, host_ids: Iterable[str]) -> Mask:
        """Return just these hosts; ids that are not in the fleet are ignored. Not remembered: there are as many as hosts."""
        mask = np.zeros(len(self.hosts), dtype=np.bool_)
        mask[[self.row_of[host_id] for host_id in host_ids if host_id in self.row_of]] = True
        return mask

    def where_equal(self, attribute: str, value: Hashable) -> Mask:
        return self.where(attribute, ("equal", value), lambda own: bool(own == value))

    def where_contains(self, attribute: str, value: Hashable) -> Mask:
        return self.where(attribute, ("contains", value), lambda own: value in own)

    def where_empty_or(self, attribute: str, value: str) -> Mask:
        return self.where(attribute, ("empty-or", value), lambda own: own in ("", value))

    def remembered(self, question: Hashable, answer: Callable[[], T]) -> T:
        """Return the answer to a question about what does not change in this fleet; asked for once."""
        found: T | None = self._remembered.get(question)
        if found is None:
            found = self._remembered[question] = answer()
        return found

    def common_inverse(self, resource: str) -> float | None:
        """Return the inverse limit that all hosts have; None where they differ."""
        inverse = self.inverse_limits[resource]
        (found,) = self.remembered(
            ("common-inverse", resource), lambda: [float(inverse[0]) if len(inverse) and (inverse == inverse[0]).all() else None]
        )
        return found

    def domains(self, label: str) -> Domains:
        """Return the failure domains that this label makes; `HOST` makes each host one."""
        return self.remembered(("domains", label), lambda: self._domains(label))

    def outside(self, label: str, codes: Iterable[int]) -> Mask:
        """Return the hosts that are in a domain of the label, but in none of these. A fresh array."""
        mask: Mask = self.remembered(("labelled", label), lambda: self.domains(label).codes != NOWHERE).copy()
        for code in codes:
            mask[self._rows_in(label, code)] = False
        return mask

    def inside(self, label: str, codes: Iterable[int]) -> Mask:
        """Return the hosts that are in one of these domains of the label. A fresh array."""
        mask = np.zeros(len(self.hosts), dtype=np.bool_)
        for code in codes:
            mask[self._rows_in(label, code)] = True
        return mask

    def _rows_in(self, label: str, code: int) -> Rows:
        """Return the rows of one domain: looking up each row's code instead takes longer than all other filters together."""
        if label == HOST:
            return slice(code, code + 1)
        return self.remembered(("rows", label, code), lambda: np.flatnonzero(self.domains(label).codes == code))

    def _domains(self, label: str) -> Domains:
        if label == HOST:
            return Domains(np.arange(len(self.hosts)), tuple(host.name for host in self.hosts))
        code_of: dict[str, int] = {}
        own = (host.labels.get(label) for host in self.hosts)
        codes = (NOWHERE if value is None else code_of.setdefault(value, len(code_of)) for value in own)
        return Domains(np.fromiter(codes, np.intp, len(self.hosts)), tuple(code_of))

    def _grouped(self, attribute: str) -> tuple[RowIndex, list[Any]]:
        """Return each host's group and the groups' values."""
        known = self._groups.get(attribute)
        if known is None:
            group_of: dict[Any, int] = {}
            own = (getattr(host, attribute) for host in self.hosts)
            values = (frozenset(value.items()) if isinstance(value, Mapping) else value for value in own)
            codes = np.fromiter((group_of.setdefault(value, len(group_of)) for value in values), np.intp, len(self.hosts))
            known = self._groups[attribute] = (codes, list(group_of))
        return known
