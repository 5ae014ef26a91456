"""What the observer keeps current between two whole inventories."""

from collections.abc import Iterator

import pytest

from tests.unit.agent.manual_clock import ManualClock
from tests.unit.agent.waiting import until_now
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.inventory import InventoryReader, digest_of
from trimtab_agent.observer import INVENTORY_EVERY_S, KnownPools, Observer
from trimtab_agent.workers import WorkerPool
from trimtab_protos.messages import PoolKind, PoolSpec


@pytest.fixture
def hypervisor() -> SimulatedHypervisor:
    return SimulatedHypervisor(SimulatedFleet(), SimulatedHost(host_id="host-1"))


@pytest.fixture
def observer(hypervisor: SimulatedHypervisor) -> Iterator[Observer]:
    query, watch = WorkerPool("query", threads=1), WorkerPool("watch", threads=1)
    reader = InventoryReader(hypervisor, pools=tuple, certificates=tuple, migration_address="192.0.2.1")
    pools = KnownPools()
    yield Observer(
        hypervisor, inventory=reader, known_pools=pools, query=query, watch=watch, clock=ManualClock(), is_load_free=True
    )
    query.close()
    watch.close()


def test_a_lost_carrier_makes_another_inventory_at_the_next_heartbeat(
    observer: Observer, hypervisor: SimulatedHypervisor
) -> None:
    first = observer.refresh_inventory()
    hypervisor.without_carrier.add("br0")
    observer.look_at_bridges()
    lost = observer.inventory
    assert lost is not None
    assert [(one.name, one.has_carrier) for one in lost.bridges] == [("br0", False)]
    assert lost.digest == digest_of(lost) != first.digest, "it travels with the next heartbeat"
    observer.look_at_bridges()
    assert observer.inventory is lost, "what did not change does not travel"
    assert INVENTORY_EVERY_S > 10, "a whole one is too rare to tell of it"
    hypervisor.without_carrier.clear()
    observer.look_at_bridges()
    assert observer.inventory is not None
    assert observer.inventory.digest == first.digest


def test_carriers_are_read_while_the_hypervisor_does_not_answer(observer: Observer, hypervisor: SimulatedHypervisor) -> None:
    observer.refresh_inventory()
    hypervisor.stop_answering()
    hypervisor.without_carrier.add("br0")
    observer.look_at_bridges()
    assert observer.inventory is not None
    assert not observer.inventory.bridges[0].has_carrier


def test_before_the_first_inventory_there_is_nothing_to_look_at(observer: Observer) -> None:
    observer.look_at_bridges()
    assert observer.inventory is None


SHARED = PoolSpec(pool_id="pool-shared", kind=PoolKind.DIR, path="/srv/shared", is_shared=True)


def test_a_pool_that_does_not_answer_any_more_is_found_by_the_next_heartbeats_look(hypervisor: SimulatedHypervisor) -> None:
    clock, pools = ManualClock(), KnownPools()
    query, watch = WorkerPool("query", threads=1), WorkerPool("watch", threads=1)
    hypervisor.fleet.observe_hang_s = 0.01
    hypervisor.ensure_pool(SHARED)
    pools.add(SHARED)
    reader = InventoryReader(hypervisor, pools=tuple, certificates=tuple, migration_address="192.0.2.1")
    observer = Observer(hypervisor, inventory=reader, known_pools=pools, query=query, watch=watch, clock=clock)
    store = hypervisor.fleet.store("host-1", SHARED)
    try:
        observer.refresh()
        until_now(lambda: [one.is_responsive for one in observer.pools()] == [True], what="its first figures")
        for hung in (True, False):
            with hypervisor.fleet.changed:
                store.is_hung = hung
                hypervisor.fleet.changed.notify_all()
            observer.refresh()  # no time has passed: a whole look is not due
            until_now(lambda hung=hung: [one.is_hung for one in observer.pools()] == [hung], what="the look")  # type: ignore[misc]
    finally:
        query.close()
        watch.close()
