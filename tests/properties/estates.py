"""Estates for property tests: few hosts, often nearly full, so that moves get into each other's way."""

from collections import Counter
from collections.abc import Iterable

from hypothesis import strategies as st

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    Books,
    DiskNeed,
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    GroupSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
    Relation,
)
from trimtab_controller.core.planning.estate import DrainPolicy, Estate, Power, VmSnapshot

LOCAL, SHARED = "pool-local", "pool-shared"
POOL_BYTES = 1000
GROUPS = tuple(
    GroupNeed(group_id=f"grp-{number}", name=f"g{number}", rules=(rule,))
    for number, rule in enumerate(
        (
            GroupRule(relation=Relation.APART),
            GroupRule(relation=Relation.APART, domain="rack", limit=2),
            GroupRule(relation=Relation.TOGETHER, domain="zone"),
        )
    )
)


@st.composite
def vms(draw: st.DrawFn, number: int, host_count: int) -> VmSnapshot:
    host_id = f"host-{draw(st.integers(0, host_count - 1))}"
    is_local = draw(st.integers(0, 7)) == 0
    disk = DiskNeed(
        name="root",
        pool_id=LOCAL if is_local else SHARED,
        size_bytes=draw(st.integers(0, 400)) if is_local else 10,
        host_id=host_id if is_local else "",
        is_claimed=True,
    )
    request = PlacementRequest(
        request_id=f"plan-{number}",
        vm_id=f"vm-{number}",
        vm_name=f"vm{number}",
        project_id="proj-a",
        kind=PlacementKind.MIGRATE,
        vcpus=draw(st.integers(1, 4)),
        memory_mib=draw(st.sampled_from([1, 2, 4])) * 1024,
        disks=(disk,),
        host_selector=draw(st.sampled_from([{}, {}, {}, {"zone": "1"}])),
        priority=draw(st.integers(0, 1)),
        group=draw(st.sampled_from([None, None, None, *GROUPS])),
    )
    return VmSnapshot(
        vm_id=request.vm_id,
        name=request.vm_name,
        host_id=host_id,
        request=request,
        power=draw(st.sampled_from([Power.RUNNING] * 6 + [Power.STOPPED, Power.UNKNOWN])),
        is_protected=draw(st.integers(0, 4)) > 0,
        drain_policy=draw(st.sampled_from([DrainPolicy.MIGRATE] * 4 + [DrainPolicy.RESTART, DrainPolicy.WAIT])),
        devices=draw(st.sampled_from([(), (), (), (), ("gpu0",)])),
        busy_with=draw(st.sampled_from(["", "", "", "", "backup op-1"])),
        load_millis=draw(st.integers(0, 4000)),
    )


@st.composite
def estates(draw: st.DrawFn, host_max: int = 6, vm_max: int = 14) -> Estate:
    """Return an estate whose claims are those of its vms; limits leave between nothing and a little over them."""
    host_count = draw(st.integers(1, host_max))
    own = [draw(vms(number, host_count)) for number in range(draw(st.integers(0, vm_max)))]
    return estate_of(
        own,
        host_count,
        spare=[draw(st.integers(0, 8)) for _ in range(host_count)],
        zones=[draw(st.sampled_from("112")) for _ in range(host_count)],
        racks=[draw(st.sampled_from("12")) for _ in range(host_count)],
        cordoned=[draw(st.integers(0, 7)) == 0 for _ in range(host_count)],
        lost=[draw(st.integers(0, 9)) == 0 for _ in range(host_count)],
    )


def estate_of(
    own: list[VmSnapshot],
    host_count: int,
    *,
    spare: list[int],
    zones: list[str],
    racks: list[str],
    cordoned: list[bool],
    lost: list[bool],
) -> Estate:
    vcpus, memory_mib, space = Counter[str](), Counter[str](), Counter[str]()
    for vm in own:
        if vm.power is not Power.STOPPED:
            vcpus[vm.host_id] += vm.request.vcpus
            memory_mib[vm.host_id] += vm.request.memory_mib
        space[vm.host_id] += sum(disk.size_bytes for disk in vm.request.disks if disk.pool_id == LOCAL)
    hosts = [
        HostSnapshot(
            host_id=f"host-{number}",
            name=f"node{number}",
            vcpus_limit=vcpus[f"host-{number}"] + spare[number],
            memory_limit_mib=memory_mib[f"host-{number}"] + spare[number] * 1024,
            vcpus_claimed=vcpus[f"host-{number}"],
            memory_claimed_mib=memory_mib[f"host-{number}"],
            labels={"zone": zones[number], "rack": racks[number]},
            is_cordoned=cordoned[number],
            connectivity=HostConnectivity.LOST if lost[number] else HostConnectivity.UP,
            pools={LOCAL: True, SHARED: True},
        )
        for number in range(host_count)
    ]
    local = {host.host_id: PoolPlace(POOL_BYTES + space[host.host_id], POOL_BYTES, space[host.host_id]) for host in hosts}
    pools = [
        PoolSnapshot(pool_id=LOCAL, name="local", is_shared=False, places=local),
        PoolSnapshot(pool_id=SHARED, name="shared", is_shared=True, places={"": PoolPlace(POOL_BYTES, POOL_BYTES, 0)}),
    ]
    groups = [
        GroupSnapshot(
            group_id=group.group_id,
            members={vm.vm_id: vm.host_id for vm in own if vm.request.group is group and vm.power is not Power.STOPPED},
        )
        for group in GROUPS
    ]
    return Estate.of(FleetSnapshot.of(hosts, pools, groups=groups), own, cpu_millis={host.host_id: 16_000 for host in hosts})


def nothing_is_overcommitted(books: Books) -> bool:
    return all(bool((column >= 0).all()) for column in books.free.values())


def host_ids(estate: Estate) -> Iterable[str]:
    return [host.host_id for host in estate.fleet.hosts]
