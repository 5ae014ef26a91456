"""What is counted as free, and how a batch books it."""

from collections.abc import Callable

import pytest

from trimtab_controller.core.placement import (
    Books,
    DiskNeed,
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
)
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, local_space

GIB = 1 << 30
MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]
MakePool = Callable[..., PoolSnapshot]


def test_free_is_the_limit_without_what_is_claimed_and_what_is_unmanaged(make_host: MakeHost) -> None:
    fleet = FleetSnapshot.of([make_host(vcpus_claimed=3, unmanaged_vcpus=2, memory_claimed_mib=72, unmanaged_memory_mib=800)])
    assert (int(fleet.free[VCPUS][0]), int(fleet.free[MEMORY][0])) == (11, 15000)


def test_rows_stand_in_order_of_name_whatever_order_hosts_come_in(make_host: MakeHost) -> None:
    hosts = [make_host(name) for name in ("node3", "node1", "node2")]
    assert [host.name for host in FleetSnapshot.of(hosts).hosts] == ["node1", "node2", "node3"]


@pytest.mark.parametrize(
    ("place", "limit_gib", "free_gib"),
    [
        (PoolPlace(100 * GIB, 100 * GIB, 0), 95, 95),
        (PoolPlace(100 * GIB, 90 * GIB, 40 * GIB), 95, 55),  # sparse: 40 claimed, 10 written
        (PoolPlace(100 * GIB, 20 * GIB, 10 * GIB), 25, 15),  # others fill the file system
        (PoolPlace(100 * GIB, 2 * GIB, 10 * GIB), 7, -3),  # the reserve is eaten: nothing more may come
        # With what its volumes have written told apart: whatever else is taken is others'.
        (PoolPlace(100 * GIB, 90 * GIB, 40 * GIB, 10 * GIB), 95, 55),  # nobody else is there: written is not counted twice
        (PoolPlace(100 * GIB, 50 * GIB, 50 * GIB, 50 * GIB), 95, 45),  # nor where every claim is written
        (PoolPlace(100 * GIB, 50 * GIB, 50 * GIB, 0), 45, -5),  # a stranger's 50, and 50 claimed that will be written yet
        (PoolPlace(100 * GIB, 40 * GIB, 50 * GIB, 10 * GIB), 45, -5),  # the same, 10 of them written
        (PoolPlace(100 * GIB, 30 * GIB, 10 * GIB, 40 * GIB), 35, 25),  # files of volumes that claim nothing are others'
    ],
)
def test_a_pool_keeps_its_reserve_and_believes_the_smaller_of_books_and_disk(
    place: PoolPlace, limit_gib: int, free_gib: int
) -> None:
    pool = PoolSnapshot(pool_id="p", name="p", is_shared=False, reserve_permille=50, places={"host-a": place})
    assert pool.claim_limit_bytes("host-a") == limit_gib * GIB
    assert pool.free_bytes("host-a") == free_gib * GIB


def test_a_pool_has_no_space_where_it_is_not(local_pool: MakePool, shared_pool: MakePool) -> None:
    assert local_pool(node1=5).free_bytes("host-node2") == 0
    assert local_pool(node1=5).claim_limit_bytes("host-node2") == 0
    assert shared_pool(free_gib=7).free_bytes("host-whichever") == 7 * GIB


def test_a_claim_lowers_everything_that_the_request_needs_and_a_release_restores_it(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool, shared_pool: MakePool
) -> None:
    fleet = FleetSnapshot.of([make_host()], [local_pool(node1=50), shared_pool(free_gib=30)])
    books = Books(fleet)
    request = make_request(
        disks=(
            DiskNeed(name="root", pool_id="pool-local", size_bytes=10 * GIB),
            DiskNeed(name="log", pool_id="pool-nfs", size_bytes=20 * GIB),
        )
    )
    books.claim(request, "host-node1")
    assert (books.free[VCPUS][0], books.free[MEMORY][0]) == (14, 13824)
    assert books.free_shares[VCPUS][0] == pytest.approx(14 / 16)
    assert (books.free[local_space("pool-local")][0], books.shared_free_bytes["pool-nfs"]) == (40 * GIB, 10 * GIB)
    books.release(request, "host-node1")
    assert {name: column.tolist() for name, column in books.free.items()} == {
        name: column.tolist() for name, column in fleet.free.items()
    }
    assert books.shared_free_bytes == fleet.shared_free_bytes


def test_the_snapshot_stays_as_it_was_when_books_are_written(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host()])
    Books(fleet).claim(make_request(), "host-node1")
    assert int(fleet.free[VCPUS][0]) == 16
    with pytest.raises(ValueError, match="read-only"):
        fleet.free[VCPUS][0] = 0
    with pytest.raises(ValueError, match="read-only"):
        fleet.where_equal("is_cordoned", False)[0] = False


@pytest.mark.parametrize("changes", [{"vcpus": 17}, {"memory_mib": 16000}], ids=["vcpus", "memory"])
def test_books_refuse_to_overcommit(make_host: MakeHost, make_request: MakeRequest, changes: dict[str, int]) -> None:
    books = Books(FleetSnapshot.of([make_host()]))
    with pytest.raises(ValueError, match="has not enough"):
        books.claim(make_request(**changes), "host-node1")
    assert int(books.free[VCPUS][0]) == 16


def test_books_refuse_to_overcommit_a_shared_pool(make_host: MakeHost, make_request: MakeRequest, shared_pool: MakePool) -> None:
    books = Books(FleetSnapshot.of([make_host()], [shared_pool(free_gib=5)]))
    request = make_request(disks=(DiskNeed(name="log", pool_id="pool-nfs", size_bytes=6 * GIB),))
    with pytest.raises(ValueError, match="pool-nfs"):
        books.claim(request, "host-node1")


def test_a_stopped_vm_that_starts_takes_compute_and_no_space(
    make_host: MakeHost, make_request: MakeRequest, local_pool: MakePool
) -> None:
    books = Books(FleetSnapshot.of([make_host()], [local_pool(node1=0)]))
    bound = DiskNeed(name="root", pool_id="pool-local", size_bytes=10 * GIB, host_id="host-node1", is_claimed=True)
    books.claim(make_request(kind=PlacementKind.START, disks=(bound,)), "host-node1")
    assert (books.free[VCPUS][0], books.free[local_space("pool-local")][0]) == (14, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpus": -1},
        {"memory_mib": -1},
        {"disks": (DiskNeed(name="root", pool_id="p", size_bytes=-1),)},
    ],
)
def test_a_request_for_less_than_nothing_is_refused(make_request: MakeRequest, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        make_request(**changes)
