"""What becomes of a vm's shape when it is asked to change: now in the running guest, or at its next stop. Pure.

A vm has a shape (what it runs with, or is going to be started with) and may have a *next* shape, which waits for its next stop:
because that was asked for, or because the guest did not give back what it has. The project is charged for the greater of both, so
that no start can fail for want of quota.
"""

from dataclasses import dataclass
from enum import StrEnum

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Vm

OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


class When(StrEnum):
    """When a new shape shall hold."""

    # In the running guest as far as it goes, the rest at its next stop.
    AUTO = "auto"
    # In the running guest, all of it, or not at all.
    LIVE = "live"
    NEXT_STOP = "next-stop"


@dataclass(frozen=True, slots=True)
class Shape:
    vcpus: int
    memory_mib: int

    @property
    def is_nothing(self) -> bool:
        return not (self.vcpus or self.memory_mib)

    def at_least(self, other: "Shape") -> "Shape":
        return Shape(max(self.vcpus, other.vcpus), max(self.memory_mib, other.memory_mib))

    def minus(self, other: "Shape") -> "Shape":
        return Shape(self.vcpus - other.vcpus, self.memory_mib - other.memory_mib)

    def as_json(self) -> dict[str, int]:
        return {"vcpus": self.vcpus, "memory_mib": self.memory_mib}


NOTHING = Shape(0, 0)


def shape_of(vm: Vm) -> Shape:
    return Shape(vm.vcpus, vm.memory_mib)


def next_of(vm: Vm) -> Shape:
    """Return what waits for the next stop; 0 where nothing does."""
    return Shape(vm.next_vcpus, vm.next_memory_mib)


def charged_for(vm: Vm) -> Shape:
    """Return what the vm's project is charged for."""
    return shape_of(vm).at_least(next_of(vm))


def wanted_of(vm: Vm, *, vcpus: int, memory_mib: int) -> Shape:
    """Return the shape that is wanted: what is not named (0) stays as it was last wished."""
    waiting = next_of(vm)
    return Shape(vcpus or waiting.vcpus or vm.vcpus, memory_mib or waiting.memory_mib or vm.memory_mib)


def left_of(wanted: Shape, has: Shape) -> Shape:
    """Return what of the wish is still to come; 0 for what is so already."""
    return Shape(
        wanted.vcpus if wanted.vcpus != has.vcpus else 0,
        wanted.memory_mib if wanted.memory_mib != has.memory_mib else 0,
    )


@dataclass(frozen=True, slots=True)
class Beyond:
    """A running guest cannot be given this much: the field, what was asked for, and its bound."""

    field: str
    asked: int
    bound: int


def beyond_of(vm: Vm, wanted: Shape) -> Beyond | None:
    """Return what of the shape goes beyond what a running guest can be given; None where nothing does."""
    if wanted.vcpus > vm.vcpus_max:
        return Beyond("vcpus", wanted.vcpus, vm.vcpus_max)
    if wanted.memory_mib > vm.memory_max_mib:
        return Beyond("memory_mib", wanted.memory_mib, vm.memory_max_mib)
    return None
