"""Is there room of what is given to single vms: devices, resources that operators count, and parts of NUMA cells."""

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.columns import cell_cpus, cell_pages, devices_of, resource_named
from trimtab_controller.core.placement.filters.base import Filter, Reads
from trimtab_controller.core.placement.fleet import ALL, Mask, Rows
from trimtab_controller.core.placement.snapshot import Stock
from trimtab_controller.core.placement.verdict import Refusal


def _has_devices(trial: Trial, rows: Rows = ALL) -> Mask | None:
    return _has_all(trial, {devices_of(kind): count for kind, count in trial.request.devices.items()}, rows)


def _devices(trial: Trial) -> Sequence[str]:
    return [devices_of(kind) for kind in trial.request.devices]


def _lacks_devices(trial: Trial, row: int) -> tuple[Refusal, ...]:
    stocks = trial.fleet.hosts[row].devices
    found = []
    for kind, needed in trial.request.devices.items():
        free = trial.free(devices_of(kind), row)
        if free < needed:
            message = _short(f"devices of kind {kind}", stocks, kind, needed=needed, free=free)
            found.append(Refusal("devices", "devices-short", message, {"device": kind, "needed": needed, "free": free}))
    return tuple(found)


def _has_resources(trial: Trial, rows: Rows = ALL) -> Mask | None:
    return _has_all(trial, {resource_named(name): amount for name, amount in trial.request.resources.items()}, rows)


def _resources(trial: Trial) -> Sequence[str]:
    return [resource_named(name) for name in trial.request.resources]


def _lacks_resources(trial: Trial, row: int) -> tuple[Refusal, ...]:
    stocks = trial.fleet.hosts[row].resources
    found = []
    for name, needed in trial.request.resources.items():
        free = trial.free(resource_named(name), row)
        if free < needed:
            message = _short(f"of resource {name}", stocks, name, needed=needed, free=free)
            found.append(Refusal("resources", "resource-short", message, {"resource": name, "needed": needed, "free": free}))
    return tuple(found)


def _has_all(trial: Trial, amounts: Mapping[str, int], rows: Rows) -> Mask | None:
    fits = None
    for name, amount in amounts.items():
        mask = trial.has(name, amount, rows)
        fits = mask if fits is None else fits & mask
    return fits


def _short(of_what: str, stocks: Mapping[str, Stock], name: str, *, needed: int, free: int) -> str:
    if name not in stocks:
        return f"needs {needed} {of_what}, and it has none"
    return f"needs {needed} {of_what}, {max(0, free)} free of {stocks[name].limit}"


def _has_cells(trial: Trial, rows: Rows = ALL) -> Mask | None:
    need = trial.cells
    if need is None:
        return None
    fitting = np.zeros(len(trial.fleet), dtype=np.int64)[rows]
    for cell in trial.cell_numbers:
        fits = _has_all(trial, need.of_cell(cell), rows)
        fitting += True if fits is None else fits
    enough: Mask = fitting >= need.count
    return enough


def _lacks_cells(trial: Trial, row: int) -> tuple[Refusal, ...]:
    need = trial.cells
    if need is None or trial.cells_on(row):
        return ()
    own = trial.fleet.hosts[row].cells
    asked = [f"{need.cpus} cpus for pinning"] if need.cpus else []
    asked += [f"{need.pages} pages of {need.page_kib} KiB"] if need.pages else []
    where = "in one NUMA cell" if need.count == 1 else f"in each of {need.count} NUMA cells"
    most_cpus = max((trial.free(cell_cpus(cell.cell), row) for cell in own), default=0)
    most_pages = max((trial.free(cell_pages(cell.cell, need.page_kib), row) for cell in own), default=0)
    found = [f"{most_cpus} cpus"] if need.cpus else []
    found += [f"{most_pages} pages"] if need.pages else []
    message = f"needs {' and '.join(asked)} {where}; the most that one has free is {', '.join(found)}"
    if not any(cell.cpus_limit for cell in own) and need.cpus:
        message += "; no cpus are set aside for pinning there"
    context = {"cells": need.count, "cpus": need.cpus, "pages": need.pages, "most_cpus": most_cpus, "most_pages": most_pages}
    return (Refusal("cells", "cells-short", message, context),)


FILTERS = (
    Filter("devices", _has_devices, _lacks_devices, Reads.ROW, _devices),
    Filter("resources", _has_resources, _lacks_resources, Reads.ROW, _resources),
    Filter("cells", _has_cells, _lacks_cells, Reads.ROW),
)
