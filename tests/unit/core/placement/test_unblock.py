"""The smallest change that would let a refused vm in: one where one is enough, two where it takes two."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from trimtab_controller.core.placement import (
    Books,
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    unblock,
)
from trimtab_controller.core.placement.policies import BEST_FIT

MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]


def told(books: Books, request: PlacementRequest) -> list[str]:
    return [one.sentence() for one in unblock(books, request, policy=BEST_FIT)]


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"vcpus": 32}, "with 16 vcpus instead of 32"),
        ({"memory_mib": 524288}, "with 15872 MiB instead of 524288"),
        ({"vcpus": 32, "memory_mib": 524288}, "with 16 vcpus instead of 32 and with 15872 MiB instead of 524288"),
        ({"vcpus": 32, "host_selector": {"zone": "b"}}, "without asking for zone=b and with 16 vcpus instead of 32"),
        ({"host_selector": {"zone": "b", "rack": "r9"}}, "without asking for zone=b and without asking for rack=r9"),
        ({"vcpus": 32, "resources": {"licence": 1}}, "with 16 vcpus instead of 32 and without licence"),
        ({"devices": {"gpu": 1}, "resources": {"licence": 1}}, "without gpu and without licence"),
        ({"is_dedicated": True, "page_kib": 2048}, "without cpus of its own and without huge pages"),
    ],
)
def test_one_change_or_two_are_found_where_they_are_enough(
    make_host: MakeHost, make_request: MakeRequest, wishes: dict[str, object], sentence: str
) -> None:
    books = Books(FleetSnapshot.of([make_host("node1")], []))
    assert told(books, make_request(**wishes)) == [f"it would fit on node1 {sentence}"]


def test_two_sizes_are_lessened_on_the_host_where_the_least_is_given_up(make_host: MakeHost, make_request: MakeRequest) -> None:
    many_cpus = make_host("node1", vcpus_limit=30, memory_limit_mib=1024)
    much_memory = make_host("node2", vcpus_limit=1, memory_limit_mib=60_000)
    even = make_host("node3", vcpus_limit=16, memory_limit_mib=32_768)
    books = Books(FleetSnapshot.of([many_cpus, much_memory, even], []))
    (sentence,) = told(books, make_request(vcpus=32, memory_mib=65_536))
    assert sentence == "it would fit on node3 with 16 vcpus instead of 32 and with 32768 MiB instead of 65536"


def test_a_change_and_a_move_are_found_together(make_host: MakeHost, make_request: MakeRequest) -> None:
    able = make_host("node1", vcpus_limit=4, cpu_features=frozenset({"avx512"}))
    books = Books(FleetSnapshot.of([able, make_host("node2")], []))
    staying = make_request(request_id="op-a", vm_id="vm-a", vm_name="a", vcpus=3)
    moving = make_request(request_id="op-b", vm_id="vm-b", vm_name="b", vcpus=1)
    for vm in (staying, moving):
        books.claim(vm, "host-node1")
    on_host = {"host-node1": [replace(moving, kind=PlacementKind.MIGRATE)]}
    asked = make_request(vcpus=1, cpu_features=("avx512",), host_selector={"zone": "c"})
    (found,) = unblock(books, asked, policy=BEST_FIT, movable_on=lambda host_id: on_host.get(host_id, []))
    assert found.sentence() == "it would fit on node1 without asking for zone=c and after moving b to node2"


def test_a_vm_that_need_not_move_is_not_moved_with_those_that_must(make_host: MakeHost, make_request: MakeRequest) -> None:
    """One has the vcpus, one the memory; the one between them in size has neither."""
    books = Books(FleetSnapshot.of([make_host("node1", vcpus_limit=6, memory_limit_mib=11_264), make_host("node2")], []))
    sizes = {"cpus": (4, 1024), "little": (1, 2048), "memory": (1, 8192)}
    vms = [
        make_request(request_id=f"op-{name}", vm_id=name, vm_name=name, vcpus=vcpus, memory_mib=memory_mib)
        for name, (vcpus, memory_mib) in sizes.items()
    ]
    for vm in vms:
        books.claim(vm, "host-node1")
    on_host = {"host-node1": [replace(vm, kind=PlacementKind.MIGRATE) for vm in vms]}
    asked = make_request(vcpus=5, memory_mib=9216, required_host_id="host-node1")
    moving = [
        one for one in unblock(books, asked, policy=BEST_FIT, movable_on=lambda host_id: on_host.get(host_id, [])) if one.moves
    ]
    assert [sorted(move.vm_id for move in one.moves) for one in moving] == [["cpus", "memory"]]
