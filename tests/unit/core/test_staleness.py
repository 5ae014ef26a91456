"""A plan is refused where what it read changed in a way that matters, and applied where it changed otherwise."""

import re
from dataclasses import replace
from typing import Any

import pytest

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    Stock,
    Taint,
)
from trimtab_controller.core.planning import Estate, Plan, VmSnapshot, plan_drain
from trimtab_controller.core.planning.drain import Terms
from trimtab_controller.core.planning.estate import DrainPolicy
from trimtab_controller.core.planning.staleness import changes

ON_ONE = PlacementRequest(
    request_id="a",
    vm_id="vm-a",
    vm_name="a",
    project_id="p",
    kind=PlacementKind.MIGRATE,
    vcpus=2,
    memory_mib=1024,
    host_selector={"rack": "r1"},
)


def estate(target: dict[str, Any], vm: dict[str, Any], *, version: int) -> Estate:
    one, two = (
        HostSnapshot(
            host_id=name,
            name=name,
            vcpus_limit=4,
            memory_limit_mib=8192,
            labels={"rack": "r1"},
            resources={"licence": Stock(4)},
        )
        for name in ("one", "two")
    )
    hosts = [replace(one, vcpus_claimed=2, memory_claimed_mib=1024), replace(two, **target)]
    guest = replace(VmSnapshot(vm_id="vm-a", name="a", host_id="one", request=ON_ONE, version=version), **vm)
    return Estate.of(FleetSnapshot.of(hosts), [guest], host_versions={"one": version, "two": version})


def plan() -> Plan:
    made = plan_drain(estate({}, {}, version=1), ["one"], Terms())
    assert [step.target_host_id for step in made.moves] == ["two"]
    return made


@pytest.mark.parametrize(
    ("target", "vm"),
    [
        ({}, {}),
        ({"name": "renamed"}, {"name": "renamed"}),
        ({"labels": {"rack": "r1", "owner": "ops"}}, {}),
        ({"vcpus_claimed": 2, "memory_claimed_mib": 1024}, {}),
        ({"resources": {"licence": Stock(4, 4)}}, {}),
        ({"unmanaged_vcpus": 2, "unmanaged_memory_mib": 512}, {}),
        ({"generation": 9, "image_ids": frozenset({"img-1"})}, {}),
        ({}, {"load_millis": 900}),
    ],
)
def test_a_plan_is_applied_after_changes_that_do_not_matter_to_it(target: dict[str, Any], vm: dict[str, Any]) -> None:
    assert changes(plan(), estate(target, vm, version=2)) == ()


@pytest.mark.parametrize(
    ("target", "vm", "told"),
    [
        ({"labels": {"rack": "r2"}}, {}, "a has no place any more: .*rack is r2"),
        ({"vcpus_claimed": 3}, {}, "a has no place any more"),
        ({"unmanaged_vcpus": 3}, {}, "a has no place any more"),
        ({"is_cordoned": True}, {}, "a has no place any more: .*cordoned"),
        ({"connectivity": HostConnectivity.LOST}, {}, "host two was changed"),
        ({"taints": frozenset({Taint("gpu")})}, {}, "host two was changed"),
        ({"exclusive_project_id": "q"}, {}, "host two was changed"),
        ({}, {"request": replace(ON_ONE, vcpus=3)}, "vm a was changed"),
        ({}, {"drain_policy": DrainPolicy.WAIT}, "vm a was changed"),
        ({}, {"devices": ("10de-20b0",)}, "vm a was changed"),
    ],
)
def test_a_plan_is_refused_after_changes_that_matter_to_it(target: dict[str, Any], vm: dict[str, Any], told: str) -> None:
    (change,) = changes(plan(), estate(target, vm, version=2))
    assert re.search(told, change.message), change.message
