"""The fleet as a decision sees it: frozen snapshots in, numpy columns for what is compared, one row per host.

Rows are in order of host name, so that nothing depends on the order in which the database gave them. What changes while a batch
is decided (free capacity) is in `books.py`; this module holds what does not. Static properties are answered as masks: `where`
groups the hosts by the property's value, asks the question once per distinct value, and remembers the answer. A fleet has few
distinct sets of CPU models or machine types, however many hosts.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.lifecycle import HostConnectivity

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp] | slice

VCPUS = "vcpus"
MEMORY = "memory_mib"


def local_space(pool_id: str) -> str:
    """Return the name of the resource "bytes of this local pool"."""
    return f"space:{pool_id}"


@dataclass(frozen=True, slots=True)
class NetworkReach:
    """How one host reaches one network."""

    is_ready: bool
    mtu: int = 0
    """0: not known; then it does not refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSnapshot:
    """One host. Free = limit - claimed - unmanaged; limits have overcommit and reserve applied already."""

    host_id: str
    name: str
    vcpus_limit: int
    memory_limit_mib: int
    vcpus_claimed: int = 0
    memory_claimed_mib: int = 0
    unmanaged_vcpus: int = 0
    unmanaged_memory_mib: int = 0
    memory_reserve_mib: int = 0
    """Kept for the host itself, and not part of the limit; only told in reasons."""
    labels: Mapping[str, str] = field(default_factory=dict)
    host_class: str = ""
    class_cpu_model: str = ""
    """What a vm gets here that names no CPU model; '' while the class has none."""
    class_machine: str = ""
    is_cordoned: bool = False
    connectivity: HostConnectivity = HostConnectivity.UP
    arch: str = ""
    accelerator: str = ""
    usable_cpu_models: frozenset[str] = frozenset()
    cpu_features: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    has_uefi: bool = False
    capabilities: frozenset[str] = frozenset()
    pools: Mapping[str, bool] = field(default_factory=dict)
    """Pools set up on this host, and whether they are ready."""
    networks: Mapping[str, NetworkReach] = field(default_factory=dict)
    image_ids: frozenset[str] = frozenset()
    """Images with a replica on a local pool here."""
    generation: int = 0
    """Of the claims, when they were read."""

    @property
    def runs_class_cpu_model(self) -> bool:
        return not self.class_cpu_model or self.class_cpu_model in self.usable_cpu_models

    @property
    def runs_class_machine(self) -> bool:
        return not self.class_machine or self.class_machine in self.machines


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """Space at one place: a whole shared pool, or a local pool on one host."""

    capacity_bytes: int
    available_bytes: int
    claimed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    pool_id: str
    name: str
    is_shared: bool
    is_sharing_proven: bool = True
    """False until each host has read what another wrote; no new volumes before that."""
    reserve_permille: int = 0
    places: Mapping[str, PoolPlace] = field(default_factory=dict)
    """By host id; '' for a shared pool."""

    def claim_limit_bytes(self, host_id: str = "") -> int:
        """Return the most that may be claimed at a place in all: the bound of the conditional UPDATE that takes the space.

        Claims count the full size of sparse files, so capacity bounds them; where others fill the file system, what is available
        now bounds what can be added.
        """
        place = self.places.get("" if self.is_shared else host_id)
        if place is None:
            return 0
        reserve_bytes = place.capacity_bytes * self.reserve_permille // 1000
        return min(place.capacity_bytes, place.claimed_bytes + place.available_bytes) - reserve_bytes

    def free_bytes(self, host_id: str = "") -> int:
        place = self.places.get("" if self.is_shared else host_id)
        return 0 if place is None else self.claim_limit_bytes(host_id) - place.claimed_bytes


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
    _groups: dict[str, tuple[npt.NDArray[np.intp], list[Any]]] = field(default_factory=dict)
    _masks: dict[tuple[str, Hashable], Mask] = field(default_factory=dict)

    @classmethod
    def of(cls, hosts: Iterable[HostSnapshot], pools: Iterable[PoolSnapshot] = ()) -> "FleetSnapshot":
        """Return the snapshot of these hosts and pools, in any order."""
        ordered = tuple(sorted(hosts, key=lambda host: (host.name, host.host_id)))
        by_id = {pool.pool_id: pool for pool in sorted(pools, key=lambda pool: pool.pool_id)}
        limits = {
            VCPUS: _column(host.vcpus_limit for host in ordered),
            MEMORY: _column(host.memory_limit_mib for host in ordered),
        }
        free = {
            VCPUS: _column(host.vcpus_limit - host.vcpus_claimed - host.unmanaged_vcpus for host in ordered),
            MEMORY: _column(host.memory_limit_mib - host.memory_claimed_mib - host.unmanaged_memory_mib for host in ordered),
        }
        inverse = {name: 1.0 / np.maximum(limit, 1) for name, limit in limits.items()}
        for pool in by_id.values():
            if not pool.is_shared:
                free[local_space(pool.pool_id)] = _column(pool.free_bytes(host.host_id) for host in ordered)
        return cls(
            hosts=ordered,
            pools=by_id,
            row_of={host.host_id: row for row, host in enumerate(ordered)},
            limits=limits,
            free=free,
            inverse_limits=inverse,
            shared_free_bytes={pool.pool_id: pool.free_bytes() for pool in by_id.values() if pool.is_shared},
        )

    def __len__(self) -> int:
        return len(self.hosts)

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

    def _grouped(self, attribute: str) -> tuple[npt.NDArray[np.intp], list[Any]]:
        """Return each host's group and the groups' values."""
        known = self._groups.get(attribute)
        if known is None:
            group_of: dict[Any, int] = {}
            own = (getattr(host, attribute) for host in self.hosts)
            values = (frozenset(value.items()) if isinstance(value, Mapping) else value for value in own)
            codes = np.fromiter((group_of.setdefault(value, len(group_of)) for value in values), np.intp, len(self.hosts))
            known = self._groups[attribute] = (codes, list(group_of))
        return known


def _column(values: Iterable[int]) -> Integers:
    column = np.array(list(values), dtype=np.int64)
    column.setflags(write=False)
    return column
