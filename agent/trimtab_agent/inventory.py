"""What the host is, as the controller gets it: the hypervisor's part, completed with what only the agent knows, and a digest."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.version import agent_version
from trimtab_protos.messages import Certificate, Inventory, PoolObservation

_CHANGES_ALWAYS = ("available_bytes", "promised_bytes", "written_bytes", "observed_at_ms")
"""Fields of a pool that say how full it is; they travel with each heartbeat and do not make an inventory another one."""


class InventoryReader:
    """Reads the inventory of one host; blocks like the hypervisor's own."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        pools: Callable[[], Sequence[PoolObservation]],
        certificates: Callable[[], Sequence[Certificate]],
        migration_address: str,
    ) -> None:
        self._hypervisor = hypervisor
        self._pools = pools
        self._certificates = certificates
        self._migration_address = migration_address

    def read(self, *, only_fitness: bool = False) -> Inventory:
        """Return the inventory; `only_fitness`: see `Hypervisor.inventory`."""
        found = replace(self._hypervisor.inventory(only_fitness=only_fitness), agent_version=agent_version())
        if only_fitness:
            return found
        complete = replace(
            found,
            pools=tuple(sorted(self._pools(), key=lambda pool: pool.pool_id)),
            certificates=tuple(self._certificates()),
            migration_address=found.migration_address or self._migration_address,
        )
        return replace(complete, digest=digest_of(complete))


def digest_of(inventory: Inventory) -> str:
    """Return a hash over everything but the pools' free space."""
    content = asdict(replace(inventory, digest=""))
    for pool in content["pools"]:
        for name in _CHANGES_ALWAYS:
            del pool[name]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
