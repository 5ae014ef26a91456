"""The largest vm that capacity tells is one that the scheduler places; one vcpu or one MiB more is one that it refuses."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties.estates import LOCAL, POOL_BYTES, SHARED, estates
from trimtab_controller.core.placement import (
    DiskNeed,
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    Relation,
    Taint,
    TaintEffect,
    Toleration,
    explain,
)
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.capacity import Shape, figures, largest

fewer = settings(max_examples=60)

PLAIN = PlacementRequest(
    request_id="op-new", vm_id="vm-new", vm_name="new", project_id="proj-a", kind=PlacementKind.CREATE, vcpus=1, memory_mib=1
)
WISHES = st.builds(
    lambda **asked: replace(PLAIN, **asked),
    project_id=st.sampled_from(["proj-a", "proj-b"]),
    host_selector=st.sampled_from([{}, {"zone": "1"}, {"zone": "1", "rack": "2"}]),
    tolerations=st.sampled_from([(), (Toleration("gpu"),)]),
    excluded_host_ids=st.sampled_from([(), ("host-0",)]),
    disks=st.sampled_from([(), *((DiskNeed(name="root", pool_id=pool, size_bytes=300),) for pool in (LOCAL, SHARED))]),
    group=st.sampled_from([None, GroupNeed(group_id="grp-0", name="g0", rules=(GroupRule(relation=Relation.APART),))]),
)


@st.composite
def closed_in_part(draw: st.DrawFn) -> Estate:
    """Return an estate some of whose hosts have taints, are a project's own, or have pools that are full or not ready."""
    estate = draw(estates())
    hosts = [
        replace(
            host,
            taints=draw(
                st.sampled_from([frozenset()] * 3 + [frozenset({Taint("gpu")}), frozenset({Taint("old", effect=AVOID)})])
            ),
            exclusive_project_id=draw(st.sampled_from(["", "", "", "proj-b"])),
            pools={LOCAL: draw(st.booleans()), SHARED: draw(st.booleans())},
        )
        for host in estate.fleet.hosts
    ]
    shared = replace(estate.fleet.pools[SHARED], is_sharing_proven=draw(st.booleans()))
    if draw(st.booleans()):
        shared = replace(shared, places={"": PoolPlace(POOL_BYTES, 0, POOL_BYTES)})
    local = estate.fleet.pools[LOCAL]
    places = {
        host_id: draw(st.sampled_from([place, replace(place, available_bytes=0)])) for host_id, place in local.places.items()
    }
    fleet = FleetSnapshot.of(hosts, [replace(local, places=places), shared], groups=estate.fleet.groups)
    return Estate.of(fleet, estate.vms.values(), cpu_millis=estate.cpu_millis)


AVOID = TaintEffect.AVOID


def holds(takes: Callable[[Shape], bool], by_vcpus: Shape, by_memory: Shape) -> None:
    """Both are placed, where there is any, with nothing to add to either size."""
    if by_vcpus.vcpus == 0:
        assert (by_vcpus, by_memory) == (Shape(0, 0), Shape(0, 0))
        assert not takes(Shape(1, 1))
        return
    assert takes(by_vcpus)
    assert takes(by_memory)
    assert not takes(Shape(by_vcpus.vcpus + 1, 1))
    assert not takes(Shape(by_vcpus.vcpus, by_vcpus.memory_mib + 1))
    assert not takes(Shape(1, by_memory.memory_mib + 1))
    assert not takes(Shape(by_memory.vcpus + 1, by_memory.memory_mib))


def sized(request: PlacementRequest, shape: Shape) -> PlacementRequest:
    return replace(request, vcpus=shape.vcpus, memory_mib=shape.memory_mib)


@fewer
@given(closed_in_part(), st.sampled_from(["", "zone"]))
def test_the_largest_plain_vm_of_each_part_is_placed_there_and_nothing_larger_is(estate: Estate, by: str) -> None:
    with_disks = [replace(PLAIN, disks=(DiskNeed(name="root", pool_id=pool, size_bytes=1),)) for pool in (LOCAL, SHARED)]
    for part in figures(estate, by=by):
        selector = {by: part.name} if by else {}

        def takes(shape: Shape, selector: dict[str, str] = selector) -> bool:
            asked = [sized(replace(one, host_selector=selector), shape) for one in with_disks]
            return any(explain(estate.fleet, one).chosen_host_id for one in asked)

        holds(takes, part.largest_by_vcpus, part.largest_by_memory)


@fewer
@given(closed_in_part(), WISHES)
def test_the_largest_vm_of_a_wish_is_placed_and_nothing_larger_is(estate: Estate, wish: PlacementRequest) -> None:
    found = largest(estate, wish)
    holds(lambda shape: bool(explain(estate.fleet, sized(wish, shape)).chosen_host_id), found.by_vcpus, found.by_memory)


def hosts_of(count: int) -> Sequence[HostSnapshot]:
    return [
        HostSnapshot(host_id=f"host-{n}", name=f"node{n}", vcpus_limit=8 * n, memory_limit_mib=1000 * n) for n in range(count)
    ]


def test_the_largest_vm_of_a_wish_by_value() -> None:
    estate = Estate.of(FleetSnapshot.of(hosts_of(4)), [])
    assert largest(estate, PLAIN).by_memory == Shape(24, 3000)
    assert largest(estate, replace(PLAIN, excluded_host_ids=("host-3",))).by_memory == Shape(16, 2000)
    assert largest(estate, replace(PLAIN, required_host_id="host-0")).by_vcpus == Shape(0, 0)
