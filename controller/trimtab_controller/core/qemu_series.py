"""Which QEMU a guest runs on and which one a host would give it: a live migration goes to the same series or a newer one.

A machine type promises that a newer QEMU takes the state of an older one's guest; nobody promises the other way, and libvirt does
not ask. Updates within a series (7.2.17 to 7.2.22) change no state, so they go both ways.
"""

import re

from trimtab_protos.messages import Inventory

_SERIES = re.compile(r"(\d+)\.(\d+)")

Series = tuple[int, ...]
"""Major and minor; () where it is not known."""


def series_of(version: str) -> Series:
    """Return the series of what a QEMU says of itself, such as `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`."""
    said = _SERIES.match(version)
    return (int(said[1]), int(said[2])) if said else ()


def installed(inventory: Inventory | None) -> Series:
    """Return the series that guests which come to the host get."""
    return series_of(inventory.qemu_build or inventory.qemu_version) if inventory is not None else ()


def running(inventory: Inventory | None, vm_id: str) -> Series:
    """Return the series on which a guest of the host runs: an upgrade replaces the program, never a process."""
    of_its_own = [one.build for one in inventory.guest_qemus if one.vm_id == vm_id] if inventory is not None else []
    return series_of(of_its_own[0]) if of_its_own else installed(inventory)


def is_older(target: Series, guest: Series) -> bool:
    """Tell whether a QEMU of series `target` may not take a guest's state; not where either is not known."""
    return bool(target and guest) and target < guest


def as_text(series: Series) -> str:
    return ".".join(map(str, series))
