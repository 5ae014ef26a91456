"""What `capacity get` tells: totals, what is claimed, used, free, stranded, and the largest vm that still fits."""

from dataclasses import replace

import pytest

from trimtab_controller.core.placement import (
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
    Taint,
    TaintEffect,
)
from trimtab_controller.core.planning import Estate, VmSnapshot
from trimtab_controller.core.planning.capacity import Shape, figures


def estate() -> Estate:
    """Free: 8 vcpus and 4 GiB on the first host, 1 vcpu and 32 GiB on the second, nothing that counts on the third."""
    request = PlacementRequest(
        request_id="a", vm_id="a", vm_name="a", project_id="p", kind=PlacementKind.MIGRATE, vcpus=2, memory_mib=2048
    )
    sizes = {"one": (10, 6144, "z1"), "two": (1, 32_768, "z1"), "three": (64, 65_536, "z2")}
    hosts = [
        HostSnapshot(
            host_id=name,
            name=name,
            vcpus_limit=vcpus,
            memory_limit_mib=memory_mib,
            vcpus_claimed=2 if name == "one" else 0,
            memory_claimed_mib=2048 if name == "one" else 0,
            labels={"zone": zone},
            is_cordoned=name == "three",
        )
        for name, (vcpus, memory_mib, zone) in sizes.items()
    ]
    return Estate.of(FleetSnapshot.of(hosts), [VmSnapshot(vm_id="a", name="a", host_id="one", request=request, load_millis=700)])


def test_what_no_usual_vm_can_use_is_stranded_and_a_shut_host_counts_as_nothing_free() -> None:
    (fleet,) = figures(estate())
    assert (fleet.host_count, fleet.open_count, fleet.vm_count, fleet.used_millis) == (3, 2, 1, 700)
    assert (fleet.vcpus_limit, fleet.vcpus_claimed, fleet.vcpus_free) == (75, 2, 9)
    assert (fleet.memory_limit_mib, fleet.memory_claimed_mib, fleet.memory_free_mib) == (104_448, 2048, 36_864)
    assert fleet.reference == Shape(2, 2048)
    # Two more like it fit on the first host: four of its vcpus are left without memory, all of the second without vcpus.
    assert (fleet.stranded_vcpus, fleet.stranded_memory_mib) == (4 + 1, 32_768)


def test_the_largest_vm_is_told_by_either_size_with_what_is_beside_it() -> None:
    (fleet,) = figures(estate())
    assert (fleet.largest_by_vcpus, fleet.largest_by_memory) == (Shape(8, 4096), Shape(1, 32_768))


def test_figures_by_a_label_are_those_of_its_hosts() -> None:
    first, second = figures(estate(), by="zone")
    assert [(one.name, one.host_count, one.vcpus_free) for one in (first, second)] == [("z1", 2, 9), ("z2", 1, 0)]
    assert second.largest_by_vcpus == Shape(0, 0)


def of_two(large: HostSnapshot, *, pools: list[PoolSnapshot] | None = None) -> Shape:
    """Return the largest vm of a fleet that has this host and a small one, which takes every plain vm."""
    small = HostSnapshot(host_id="small", name="small", vcpus_limit=4, memory_limit_mib=4096, pools={"local": True})
    (fleet,) = figures(Estate.of(FleetSnapshot.of([large, small], pools or []), []))
    assert fleet.vcpus_free == 68, "what is free is counted all the same"
    return fleet.largest_by_vcpus


LARGE = HostSnapshot(host_id="large", name="large", vcpus_limit=64, memory_limit_mib=65_536, pools={"local": True})


@pytest.mark.parametrize(
    ("of_its_own", "largest"),
    [
        ({}, Shape(64, 65_536)),
        ({"taints": frozenset({Taint("gpu")})}, Shape(4, 4096)),
        ({"taints": frozenset({Taint("old", effect=TaintEffect.AVOID)})}, Shape(64, 65_536)),
        ({"exclusive_project_id": "proj-1"}, Shape(4, 4096)),
    ],
)
def test_the_largest_vm_is_one_that_tolerates_no_taint_and_has_no_hosts_of_its_own(
    of_its_own: dict[str, object], largest: Shape
) -> None:
    assert of_two(replace(LARGE, **of_its_own)) == largest


@pytest.mark.parametrize(
    ("is_ready", "left_bytes", "largest"), [(True, 1, Shape(64, 65_536)), (True, 0, Shape(4, 4096)), (False, 1, Shape(4, 4096))]
)
def test_the_largest_vm_has_its_disk_on_a_pool_that_is_ready_and_not_full(
    is_ready: bool, left_bytes: int, largest: Shape
) -> None:
    places = {"large": PoolPlace(100, 100, 100 - left_bytes), "small": PoolPlace(100, 100, 0)}
    pool = PoolSnapshot(pool_id="local", name="local", is_shared=False, places=places)
    assert of_two(replace(LARGE, pools={"local": is_ready}), pools=[pool]) == largest


def test_a_shared_pool_that_is_not_proven_holds_no_disk_of_the_largest_vm() -> None:
    local = PoolSnapshot(pool_id="local", name="local", is_shared=False, places={"small": PoolPlace(100, 100, 0)})
    shared = PoolSnapshot(pool_id="nfs", name="nfs", is_shared=True, places={"": PoolPlace(100, 100, 0)})
    host = replace(LARGE, pools={"nfs": True})
    assert of_two(host, pools=[local, shared]) == Shape(64, 65_536)
    assert of_two(host, pools=[local, replace(shared, is_sharing_proven=False)]) == Shape(4, 4096)
