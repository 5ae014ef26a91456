"""What is free of everything that is counted, as one column per resource over all hosts.

A resource is named by a string: vcpus, memory, the bytes of one local pool, the devices of one kind, what operators count, and per
NUMA cell the cpus for pinning and the huge pages of each size. So books, claims and filters treat all of them alike.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.snapshot import CellSnapshot, HostSnapshot, PoolSnapshot, Stock

Integers = npt.NDArray[np.int64]

VCPUS = "vcpus"
MEMORY = "memory_mib"


def local_space(pool_id: str) -> str:
    """Return the name of the resource "bytes of this local pool"."""
    return f"space:{pool_id}"


def devices_of(kind: str) -> str:
    """Return the name of the resource "devices of this kind"."""
    return f"device:{kind}"


def resource_named(name: str) -> str:
    """Return the name of a resource that operators count."""
    return f"resource:{name}"


def cell_cpus(cell: int) -> str:
    """Return the name of the resource "cpus for pinning in this cell"."""
    return f"cell:{cell}:cpus"


def cell_pages(cell: int, page_kib: int) -> str:
    """Return the name of the resource "huge pages of this size in this cell"."""
    return f"cell:{cell}:pages:{page_kib}"


def device_row(kind: str, address: str) -> str:
    """Return the name of the row of one device: counted with its kind, and claimed alone, so that no two vms get it."""
    return f"pci:{kind}:{address}"


Scarce = tuple[tuple[CellSnapshot, ...], dict[str, Stock], dict[str, Stock]]


def scarce_of(stocks: Mapping[str, Stock]) -> Scarce:
    """Return cells, devices and resources of a host from its stocks by resource name; the reverse of what the columns are made of."""
    devices, resources = {}, {}
    cpus: dict[int, Stock] = {}
    pages: dict[int, dict[int, Stock]] = {}
    for name, stock in stocks.items():
        match name.split(":"):
            case ["device", kind]:
                devices[kind] = stock
            case ["resource", own]:
                resources[own] = stock
            case ["cell", cell, "cpus"]:
                cpus[int(cell)] = stock
            case ["cell", cell, "pages", page_kib]:
                pages.setdefault(int(cell), {})[int(page_kib)] = stock
            case ["pci", *_]:
                pass  # one device of a kind that is counted: which of them a vm gets is settled when it is claimed
            case _:
                raise ValueError(f"{name} is no resource of a host")
    cells = tuple(_cell(cell, cpus.get(cell, Stock(0)), pages.get(cell, {})) for cell in sorted(cpus.keys() | pages.keys()))
    return cells, devices, resources


def _cell(cell: int, cpus: Stock, pages: Mapping[int, Stock]) -> CellSnapshot:
    return CellSnapshot(cell=cell, cpus_limit=cpus.limit, cpus_claimed=cpus.claimed, pages=pages)


def column(values: Iterable[int]) -> Integers:
    """Return a column that cannot be written."""
    made = np.array(list(values), dtype=np.int64)
    made.setflags(write=False)
    return made


def free_columns(hosts: Sequence[HostSnapshot], pools: Iterable[PoolSnapshot]) -> dict[str, Integers]:
    """Return free amounts by resource; hosts that have none of a resource have 0."""
    free = {
        VCPUS: column(host.vcpus_limit - host.vcpus_claimed - host.unmanaged_vcpus for host in hosts),
        MEMORY: column(host.memory_limit_mib - host.memory_claimed_mib - host.unmanaged_memory_mib for host in hosts),
    }
    for pool in pools:
        if not pool.is_shared:
            free[local_space(pool.pool_id)] = column(pool.free_bytes(host.host_id) for host in hosts)
    return free | _scarce_columns(hosts)


def _scarce_columns(hosts: Sequence[HostSnapshot]) -> dict[str, Integers]:
    """Return the columns of what most hosts have nothing of, written host by host."""
    found: dict[str, Integers] = {}
    for row, host in enumerate(hosts):
        for name, amount in _scarce(host):
            if name not in found:
                found[name] = np.zeros(len(hosts), dtype=np.int64)
            found[name][row] = amount
    for one in found.values():
        one.setflags(write=False)
    return found


def _scarce(host: HostSnapshot) -> Iterable[tuple[str, int]]:
    for kind, stock in host.devices.items():
        yield devices_of(kind), stock.limit - stock.claimed
    for name, stock in host.resources.items():
        yield resource_named(name), stock.limit - stock.claimed
    for cell in host.cells:
        yield cell_cpus(cell.cell), cell.cpus_limit - cell.cpus_claimed
        for page_kib, stock in cell.pages.items():
            yield cell_pages(cell.cell, page_kib), stock.limit - stock.claimed
