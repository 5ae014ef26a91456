"""Single decisions of plans that properties meet too seldom."""

import pytest

from trimtab_controller.core.placement import FleetSnapshot, HostSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.planning import Estate, Rates, StepKind, VmSnapshot
from trimtab_controller.core.planning.what_if import WhatIf


def vm(name: str, host: str, vcpus: int) -> VmSnapshot:
    request = PlacementRequest(
        request_id=name,
        vm_id=name,
        vm_name=name,
        project_id="p",
        kind=PlacementKind.MIGRATE,
        vcpus=vcpus,
        memory_mib=1024,
    )
    return VmSnapshot(vm_id=name, name=name, host_id=host, request=request)


def estate(limits: dict[str, int], *vms: VmSnapshot) -> Estate:
    hosts = [
        HostSnapshot(
            host_id=name,
            name=name,
            vcpus_limit=limit,
            memory_limit_mib=65536,
            vcpus_claimed=sum(one.request.vcpus for one in vms if one.host_id == name),
        )
        for name, limit in limits.items()
    ]
    return Estate.of(FleetSnapshot.of(hosts), vms)


def test_a_move_waits_for_the_one_that_makes_its_room_and_so_does_every_later_move_to_that_host() -> None:
    first, second, third = vm("a", "one", 3), vm("b", "two", 2), vm("c", "two", 1)
    what_if = WhatIf(estate({"one": 3, "two": 3, "three": 8}, first, second, third))
    assert what_if.move(first, StepKind.MIGRATE, "three").after == ()
    assert what_if.move(second, StepKind.MIGRATE, "one").after == (0,)
    assert what_if.move(third, StepKind.MIGRATE, "one").after == (0,), "the room that is left is that of the first, too"


def test_a_move_that_has_room_as_things_are_waits_for_nothing() -> None:
    first, second = vm("a", "one", 2), vm("b", "two", 2)
    what_if = WhatIf(estate({"one": 4, "two": 4, "three": 4}, first, second))
    what_if.move(first, StepKind.MIGRATE, "three")
    assert what_if.move(second, StepKind.MIGRATE, "one").after == ()


def test_a_second_move_of_a_vm_waits_for_its_first() -> None:
    only = vm("a", "one", 1)
    what_if = WhatIf(estate({"one": 2, "two": 2, "three": 2}, only))
    what_if.move(only, StepKind.MIGRATE, "two")
    assert what_if.move(only, StepKind.MIGRATE, "three").after == (0,)


def test_a_move_without_room_is_refused_and_books_nothing() -> None:
    first, second = vm("a", "one", 2), vm("b", "two", 2)
    what_if = WhatIf(estate({"one": 2, "two": 2}, first, second))
    with pytest.raises(ValueError, match="vcpus"):
        what_if.move(first, StepKind.MIGRATE, "two")
    assert what_if.host_of["a"] == "one"
    assert what_if.steps == []


def test_rates_are_those_that_were_measured_and_defaults_until_three_were() -> None:
    assert not Rates.measured([(1 << 30, 10.0)]).is_measured
    measured = Rates.measured([(1 << 30, 11.0), (2 << 30, 21.0), (4 << 30, 41.0)])
    assert measured.is_measured
    assert measured.overhead_s == 5.0
