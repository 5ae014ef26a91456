"""What becomes of a vm's shape when it is asked to change."""

from dataclasses import replace

import pytest

from tests.unit.core.test_drift import a_vm
from trimtab_controller.core.model import Vm
from trimtab_controller.core.resize import NOTHING, Beyond, Shape, beyond_of, charged_for, left_of, next_of, shape_of, wanted_of

VM: Vm = replace(a_vm(), vcpus=2, vcpus_max=4, memory_mib=1024, memory_max_mib=2048)
WAITS = replace(VM, next_vcpus=1)


@pytest.mark.parametrize(
    ("vm", "vcpus", "memory_mib", "wanted"),
    [
        (VM, 4, 0, Shape(4, 1024)),
        (VM, 0, 512, Shape(2, 512)),
        (WAITS, 0, 512, Shape(1, 512)),
        (WAITS, 3, 0, Shape(3, 1024)),
    ],
)
def test_what_is_not_named_stays_as_it_was_last_wished(vm: Vm, vcpus: int, memory_mib: int, wanted: Shape) -> None:
    assert wanted_of(vm, vcpus=vcpus, memory_mib=memory_mib) == wanted


def test_a_project_pays_for_the_greater_of_what_is_and_what_waits() -> None:
    assert charged_for(WAITS) == Shape(2, 1024)
    assert charged_for(replace(VM, next_memory_mib=4096)) == Shape(2, 4096)


def test_only_what_differs_is_left() -> None:
    assert left_of(Shape(4, 1024), shape_of(VM)) == Shape(4, 0)
    assert left_of(Shape(2, 512), shape_of(VM)) == Shape(0, 512)
    assert left_of(shape_of(VM), shape_of(VM)) == NOTHING
    assert next_of(VM).is_nothing
    assert not next_of(WAITS).is_nothing


@pytest.mark.parametrize(
    ("wanted", "beyond"),
    [
        (Shape(4, 2048), None),
        (Shape(5, 4096), Beyond("vcpus", 5, 4)),
        (Shape(1, 2049), Beyond("memory_mib", 2049, 2048)),
    ],
)
def test_a_running_guest_is_given_no_more_than_it_was_started_with_room_for(wanted: Shape, beyond: Beyond | None) -> None:
    assert beyond_of(VM, wanted) == beyond
