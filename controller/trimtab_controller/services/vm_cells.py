"""Which shapes vms with cpus or pages of their own can have: both come from NUMA cells in equal shares, and are fixed while a vm runs."""

from trimtab_controller.core.guest_resources import NO_BALLOON, may_balloon
from trimtab_controller.core.model import Vm
from trimtab_controller.core.resize import OFF, Shape, When
from trimtab_protos.errors import InvalidRequest


def check_shape(shape: Shape, *, is_dedicated: bool, hugepages_kib: int, numa_cells: int) -> None:
    """Refuse a shape that does not divide into the cells."""
    if numa_cells != 1 and not (is_dedicated or hugepages_kib):
        raise InvalidRequest("cells-alone", "numa_cells: is for dedicated cpus or huge pages; leave it out", field="numa_cells")
    if is_dedicated and shape.vcpus % numa_cells:
        message = f"vcpus: {shape.vcpus} dedicated cpus do not divide into {numa_cells} cells"
        raise InvalidRequest("cells-uneven", message, field="vcpus")
    if hugepages_kib and (shape.memory_mib * 1024) % (hugepages_kib * numa_cells):
        step_mib = max(1, hugepages_kib * numa_cells // 1024)
        raise InvalidRequest("pages-uneven", f"memory_mib: a multiple of {step_mib} with these huge pages", field="memory_mib")


def check_resize(vm: Vm, wanted: Shape, when: When) -> None:
    """Refuse another shape of such a vm while it runs, and one that does not divide. Of other vms: nothing."""
    wishes = vm.wishes
    is_dedicated, hugepages_kib = bool(wishes.get("dedicated")), int(wishes.get("hugepages_kib", 0))
    if not is_dedicated and not hugepages_kib:
        return
    if vm.observed_state not in OFF and when is not When.NEXT_STOP:
        raise InvalidRequest(
            "cells-fixed",
            f"when: cpus and pages of its own are fixed while vm {vm.name} runs; `trimtab vm resize {vm.name} --at next-stop`",
            field="when",
        )
    cells = int(wishes.get("numa_cells", 1))
    check_shape(wanted, is_dedicated=is_dedicated, hugepages_kib=hugepages_kib, numa_cells=cells)


def check_balloon(balloon_min_mib: int, *, memory_mib: int, memory_max_mib: int, has_pinned_pages: bool) -> None:
    """InvalidRequest where a guest of this kind cannot give memory back, or was promised less than the floor."""
    if balloon_min_mib > memory_mib:
        raise InvalidRequest(
            "balloon-above-memory",
            f"balloon_min_mib: at most its memory ({memory_mib} MiB), not {balloon_min_mib} MiB",
            field="balloon_min_mib",
            bound=memory_mib,
        )
    if not may_balloon(memory_mib=memory_mib, memory_max_mib=memory_max_mib, has_pinned_pages=has_pinned_pages):
        raise InvalidRequest(
            "balloon-impossible",
            f"balloon_min_mib: a vm with {NO_BALLOON} cannot give memory back; leave the one or the other out",
            field="balloon_min_mib",
        )
