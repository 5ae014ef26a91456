"""Pinned cpus and huge pages from the operator's word to the definition on the host: claimed by cell, never twice, moved with the vm."""

from dataclasses import replace

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_plans import apply, make, set_policy
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Host, Operation, Vm
from trimtab_controller.core.planning import Cause, PlanKind
from trimtab_controller.core.resize import When
from trimtab_controller.operations.estates import read_estate
from trimtab_controller.services import hosts_admin, vm_power, vm_resize
from trimtab_controller.services.hosts_admin import HostChange
from trimtab_controller.store import describe, host_reports, hosts, schema
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import DomainSpec, NumaCell, PciDevice

PINNED = {"is_dedicated": True, "vcpus": 2, "memory_mib": 256}
PAGES = {"hugepages_kib": 2048, "vcpus": 1, "memory_mib": 256}


def host(story: FleetStory, number: int) -> Host:
    return story.db.read(lambda session: hosts.get(session, story.host_ids[number]))


def set_aside(story: FleetStory, number: int, cpus: str) -> None:
    wish = HostChange(dedicated_cpus=cpus)
    story.db.write(
        lambda session: hosts_admin.change(
            session, story.host_ids[number], wish, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )


def give_pages(story: FleetStory, number: int, count: int) -> None:
    inventory = host(story, number).inventory
    assert inventory is not None
    cells = (NumaCell(index=0, memory_mib=inventory.memory_mib, cpus=inventory.numa_cells[0].cpus, huge_pages={2048: count}),)
    told = replace(inventory, numa_cells=cells, digest=f"pages-{number}-{count}")
    story.db.write(lambda session: host_reports.store_inventory(session, story.host_ids[number], told, now=story.clock.now()))


def spec(story: FleetStory, vm: Vm) -> DomainSpec:
    def read(session: object) -> DomainSpec:
        parts = describe.read_vm(session, vm.id)  # type: ignore[arg-type]
        return describe.domain_spec(session, parts, vm.host_id)  # type: ignore[arg-type]

    return story.db.read(read)


def claimed(story: FleetStory) -> dict[tuple[str, str], int]:
    rows = story.db.read(lambda session: session.execute(schema.host_stock.select()).all())
    return {(row.host_id, row.resource): row.claimed for row in rows if row.claimed}


def test_a_pinned_vm_goes_where_cpus_are_kept_and_is_told_which(story: FleetStory) -> None:
    before = host(story, 1)
    set_aside(story, 1, "4-7")
    after = host(story, 1)
    assert after.dedicated_cpus == "4-7"
    assert before.vcpus_limit - after.vcpus_limit == 4 * 4, "four cpus less at four vcpus each"
    vm = story.running_vm("db1", **PINNED)
    assert vm.host_id == story.host_ids[1]
    assert (spec(story, vm).cpuset, spec(story, vm).numa_cells, spec(story, vm).page_kib) == ("4-7", (0,), 0)
    assert claimed(story) == {(vm.host_id, "cell:0:cpus"): 2}
    assert host(story, 1).vcpus_claimed == 0, "cpus of its own are not counted among the shared ones"
    second = story.running_vm("db2", **PINNED)
    assert claimed(story) == {(second.host_id, "cell:0:cpus"): 4}
    _, third = story.accept_create("db3", **PINNED)
    story.settle()
    error = story.operation(third.id).error
    assert error is not None
    assert "cpus for pinning in one NUMA cell" in error.message
    story.accept_power(vm, "stop", force=True)
    story.settle()
    assert claimed(story) == {(second.host_id, "cell:0:cpus"): 2}
    assert audit_invariants(story) == []


def test_huge_pages_are_claimed_where_they_are_and_ordinary_memory_is_left_alone(story: FleetStory) -> None:
    give_pages(story, 2, 200)
    vm = story.running_vm("db1", **PAGES)
    assert vm.host_id == story.host_ids[2]
    assert (spec(story, vm).page_kib, spec(story, vm).numa_cells, spec(story, vm).cpuset) == (2048, (0,), "")
    assert claimed(story) == {(vm.host_id, "cell:0:pages:2048"): 128}
    assert host(story, 2).memory_claimed_mib == 0


def test_a_live_migration_takes_its_cpus_on_the_target_and_gives_them_back_at_the_source(story: FleetStory) -> None:
    set_aside(story, 0, "0-1")
    vm = story.running_vm("db1", **PINNED)
    set_aside(story, 1, "2-5")
    operation = story.accept_power(vm, "migrate")
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    moved = story.vm(vm.id)
    assert moved.host_id == story.host_ids[1]
    assert claimed(story) == {(moved.host_id, "cell:0:cpus"): 2}
    assert spec(story, moved).cpuset == "2-5"
    assert audit_invariants(story) == []


def test_a_vm_on_pinned_cpus_and_huge_pages_alone_counts_as_running_in_plans(story: FleetStory) -> None:
    give_pages(story, 1, 200)
    set_aside(story, 1, "0-1")
    vm = story.running_vm("db1", **{**PINNED, "hugepages_kib": 2048})
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    assert estate.vms[vm.id].power.value == "running"
    assert estate.vms[vm.id].request.held_cells == (0,)


def give_devices(story: FleetStory, number: int, *addresses: str) -> None:
    inventory = host(story, number).inventory
    assert inventory is not None
    gpu = PciDevice(address="", vendor_id="0x10de", product_id="0x20b0", class_id="0x030200", driver="vfio-pci")
    told = replace(inventory, pci_devices=tuple(replace(gpu, address=one) for one in addresses), digest=f"gpus-{number}")
    story.db.write(lambda session: host_reports.store_inventory(session, story.host_ids[number], told, now=story.clock.now()))


def test_each_vm_gets_a_device_of_its_own_and_a_drain_stops_it_only_where_its_owner_allows_it(story: FleetStory) -> None:
    give_devices(story, 0, "0000:41:00.0", "0000:42:00.0")
    first, second = (story.running_vm(f"gpu{number}", devices={"10de-20b0": 1}) for number in range(2))
    assert first.host_id == second.host_id == story.host_ids[0]
    assert {spec(story, first).host_devices, spec(story, second).host_devices} == {("0000:41:00.0",), ("0000:42:00.0",)}
    with pytest.raises(Conflict, match="cannot move while it runs"):
        story.accept_power(first, "migrate")
    blockers = make(story, PlanKind.DRAIN, story.host_ids[0]).plan.blockers
    assert {blocker.vm_id: blocker.cause for blocker in blockers} == {first.id: Cause.DEVICE, second.id: Cause.DEVICE}
    assert "--drain-policy restart" in blockers[0].cure
    give_devices(story, 1, "0000:43:00.0", "0000:44:00.0")
    for vm in (first, second):
        set_policy(story, vm, "restart")
    apply(story, make(story, PlanKind.DRAIN, story.host_ids[0]))
    story.settle()
    assert {story.vm(vm.id).host_id for vm in (first, second)} == {story.host_ids[1]}
    given = {spec(story, story.vm(vm.id)).host_devices for vm in (first, second)}
    assert given == {("0000:43:00.0",), ("0000:44:00.0",)}
    assert audit_invariants(story) == []


def test_cpus_that_vms_hold_or_that_are_not_there_cannot_be_set_aside_or_freed(story: FleetStory) -> None:
    set_aside(story, 0, "0-3")
    story.running_vm("db1", **PINNED)
    with pytest.raises(Conflict, match="vms hold 2 cpus of cell 0"):
        set_aside(story, 0, "0")
    with pytest.raises(InvalidRequest, match="has cpus 0-"):
        set_aside(story, 0, "4000")
    everything = "0-" + str(len(host(story, 0).inventory.numa_cells[0].cpus) - 1)  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="needs one for itself"):
        set_aside(story, 0, everything)


@pytest.mark.parametrize(
    ("wishes", "field"),
    [
        ({"is_dedicated": True, "vcpus": 3, "numa_cells": 2}, "vcpus"),
        ({"is_dedicated": True, "vcpus": 2, "vcpus_max": 4}, "vcpus_max"),
        ({"hugepages_kib": 1 << 20, "memory_mib": 1500}, "memory_mib"),
        ({"hugepages_kib": 2048, "memory_mib": 256, "memory_max_mib": 512}, "memory_max_mib"),
        ({"numa_cells": 2}, "numa_cells"),
    ],
)
def test_what_does_not_divide_into_cells_or_could_grow_out_of_them_is_refused(
    story: FleetStory, wishes: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        story.accept_create("db1", **wishes)
    assert refused.value.context["field"] == field


def resize(story: FleetStory, vm: Vm, when: When, **shape: int) -> Operation:
    caller = vm_power.Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    wanted = {"vcpus": 0, "memory_mib": 0, **shape}
    return story.db.write(lambda session: vm_resize.resize(session, story.vm(vm.id), caller, when=when, **wanted))


def test_cpus_of_its_own_change_at_the_next_stop_alone_and_are_claimed_anew(story: FleetStory) -> None:
    set_aside(story, 1, "4-7")
    vm = story.running_vm("db1", **PINNED)
    with pytest.raises(InvalidRequest, match="--at next-stop"):
        resize(story, vm, When.AUTO, vcpus=1)
    resize(story, vm, When.NEXT_STOP, vcpus=4)
    story.settle()
    assert claimed(story) == {(vm.host_id, "cell:0:cpus"): 2}
    for verb, wishes in (("stop", {"force": True}), ("start", {})):
        story.accept_power(story.vm(vm.id), verb, **wishes)
        story.settle()
    assert claimed(story) == {(vm.host_id, "cell:0:cpus"): 4}
    assert spec(story, story.vm(vm.id)).vcpus == 4
    assert audit_invariants(story) == []


def test_a_shape_that_does_not_divide_into_its_cells_never_reaches_the_leader(story: FleetStory) -> None:
    give_pages(story, 2, 200)
    vm = story.running_vm("db1", **PAGES)
    with pytest.raises(InvalidRequest, match="multiple of 2"):
        resize(story, vm, When.NEXT_STOP, memory_mib=257)
