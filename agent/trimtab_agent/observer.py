"""Figures that heartbeats carry, observed in other threads and cached: a heartbeat never waits for libvirt or storage.

Nothing here runs by itself: the session asks for a refresh after each heartbeat was sent, so that an idle agent has one timer.
A refresh that has not come back (hung storage) is not begun again; the cached figure keeps its age, which the controller sees.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.inventory import InventoryReader, digest_of
from trimtab_agent.workers import WorkerPool
from trimtab_protos.errors import TrimtabError, Unavailable
from trimtab_protos.messages import DomainObservation, HostLoad, Inventory, PoolObservation, PoolSpec

log = structlog.get_logger(__name__)

POOLS_EVERY_S = 10.0
"""Every figure of a pool. Whether it answers is looked at with each heartbeat."""
INVENTORY_EVERY_S = 30.0
INVENTORY_RETRY_S = 1.0
"""After a failure: while libvirt starts, its first inventory is what the controller waits for."""
HUNG_AFTER_S = 30.0
"""Age at which a pool counts as hung although nobody said so: its observation has not come back for three rounds."""


class KnownPools:
    """The pools that this host shall watch. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._specs: dict[str, PoolSpec] = {}

    def replace_all(self, specs: Sequence[PoolSpec]) -> None:
        with self._lock:
            self._specs = {spec.pool_id: spec for spec in specs}

    def add(self, spec: PoolSpec) -> None:
        with self._lock:
            self._specs[spec.pool_id] = spec

    def remove(self, pool_id: str) -> None:
        with self._lock:
            self._specs.pop(pool_id, None)

    def specs(self) -> tuple[PoolSpec, ...]:
        with self._lock:
            return tuple(self._specs.values())


class Observer:
    """The cached figures of one host. Thread-safe; reads never block."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        inventory: InventoryReader,
        known_pools: KnownPools,
        query: WorkerPool,
        watch: WorkerPool,
        clock: Clock,
        is_load_free: bool = False,
        on_domains: Callable[[Sequence[DomainObservation]], None] = lambda _domains: None,
    ) -> None:
        """`watch` is for pools alone, so that a hung one takes no thread that answers questions.

        `is_load_free`: load is a sum in memory (simulated hosts) and not worth a thread's wake-up.
        `on_domains`: told every whole list of domains, in the thread that listed them.
        """
        self._hypervisor = hypervisor
        self._reader = inventory
        self._known_pools = known_pools
        self._query = query
        self._watch = watch
        self._clock = clock
        self._is_load_free = is_load_free
        self._on_domains = on_domains
        self._lock = threading.Lock()
        self._under_way: set[str] = set()
        self._load = HostLoad()
        self._is_up = False
        self._pools: dict[str, tuple[PoolObservation, float]] = {}
        self._inventory: Inventory | None = None
        self._domains: tuple[DomainObservation, ...] = ()
        self._pools_due_s = 0.0
        self._inventory_due_s = 0.0

    @property
    def load(self) -> HostLoad:
        return self._load

    @property
    def is_hypervisor_up(self) -> bool:
        return self._is_up

    @property
    def inventory(self) -> Inventory | None:
        """The last one read; None before the first."""
        return self._inventory

    @property
    def domains(self) -> tuple[DomainObservation, ...]:
        """Every domain as last listed by `refresh_domains`."""
        return self._domains

    def pools(self) -> tuple[PoolObservation, ...]:
        """Return what is known of each watched pool; one whose observation hangs is not responsive, a new one is left out."""
        now_s = self._clock.boottime_s()
        with self._lock:
            seen = dict(self._pools)
        known = (seen.get(spec.pool_id) for spec in self._known_pools.specs())
        return tuple(_aged(*entry, now_s=now_s) for entry in known if entry is not None)

    def refresh(self) -> None:
        """Begin to observe what is due; returns at once."""
        now_s = self._clock.boottime_s()
        if self._is_load_free:
            self._refresh_load()
        else:
            self._begin("load", self._query, self._refresh_load)
        if self._is_load_free:
            self.look_at_bridges()
        else:
            self._begin("bridges", self._query, self.look_at_bridges)
        are_pools_due = now_s >= self._pools_due_s
        if are_pools_due:
            self._pools_due_s = now_s + POOLS_EVERY_S
        if are_pools_due or not self._is_load_free:
            for spec in self._known_pools.specs():
                self._begin(f"pool {spec.pool_id}", self._watch, partial(self._refresh_pool, spec, is_whole=are_pools_due))
        if now_s >= self._inventory_due_s:
            self._inventory_due_s = now_s + INVENTORY_EVERY_S
            self._begin("inventory", self._query, self.refresh_inventory)

    def pools_changed(self) -> None:
        """Observe the pools with the next refresh."""
        self._pools_due_s = 0.0

    def refresh_inventory(self) -> Inventory:
        """Read the inventory anew. Blocks."""
        found = self._reader.read()
        with self._lock:
            self._inventory = found
        return found

    def refresh_domains(self) -> tuple[DomainObservation, ...]:
        """List the domains anew. Blocks; raises where the hypervisor does not answer."""
        self._refresh_load()
        self._domains = self._hypervisor.list_domains()
        self._on_domains(self._domains)
        return self._domains

    def _refresh_load(self) -> None:
        self._is_up = self._hypervisor.is_up()
        self._load = self._hypervisor.load()

    def look_at_bridges(self) -> None:
        """Bring the carrier of bridges up to date in the inventory that is known: a whole one is read rarely, and asks libvirt."""
        known = self._inventory
        if known is None:
            return
        bridges = self._hypervisor.look_at_bridges(known.bridges)
        if bridges == known.bridges:
            return
        changed = replace(known, bridges=bridges)
        with self._lock:
            if self._inventory is known:  # else a newer one was read meanwhile
                self._inventory = replace(changed, digest=digest_of(changed))

    def _refresh_pool(self, spec: PoolSpec, *, is_whole: bool) -> None:
        """`is_whole`: figures that take a look at each volume too; else they are those that were seen last."""
        with self._lock:
            known = None if is_whole else self._pools.get(spec.pool_id, (None,))[0]
        seen = self._hypervisor.observe_pool(spec, known=known)
        with self._lock:
            self._pools[spec.pool_id] = (seen, self._clock.boottime_s())

    def _begin(self, what: str, pool: WorkerPool, call: Callable[[], Any]) -> None:
        with self._lock:
            if what in self._under_way:
                return
            self._under_way.add(what)
        try:
            pool.submit(call).add_done_callback(lambda future: self._finish(what, future))
        except Unavailable:
            with self._lock:
                self._under_way.discard(what)

    def _finish(self, what: str, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(what)
        error = future.exception()
        if error is not None and what == "inventory":
            self._inventory_due_s = self._clock.boottime_s() + INVENTORY_RETRY_S
        if isinstance(error, TrimtabError):
            log.debug("observation failed", what=what, code=error.code)
        elif error is not None:
            log.error("observation broke", what=what, exc_info=error)


def _aged(seen: PoolObservation, at_s: float, *, now_s: float) -> PoolObservation:
    if now_s - at_s > HUNG_AFTER_S and seen.is_responsive:
        return replace(seen, is_responsive=False, is_hung=True, problem="the pool does not answer")
    return seen
