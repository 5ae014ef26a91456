"""What is counted on hosts besides vcpus, memory and space: how much there is. Claims of it: `claims.take_stock`."""

from collections import Counter
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.placement.columns import cell_cpus, cell_pages, device_row, devices_of, resource_named
from trimtab_controller.store import schema
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import Inventory

_table = schema.host_stock
# A device is offered once its host set it aside; whatever else is bound to a driver of the host's own is the host's.
_SET_ASIDE_DRIVER = "vfio-pci"


def set_resources(session: Session, host_id: str, amounts: Mapping[str, int]) -> None:
    """Say how much a host has of what operators count; 0 takes it away. Conflict(`resource-in-use`) below what vms hold."""
    for name, amount in sorted(amounts.items()):
        where = (_table.c.host_id == host_id, _table.c.resource == resource_named(name))
        if amount == 0:
            session.execute(_table.delete().where(*where, _table.c.claimed == 0))
        else:
            session.execute(_table.update().where(*where, _table.c.claimed <= amount).values(capacity=amount))
        row = session.execute(sa.select(_table.c.capacity, _table.c.claimed).where(*where)).one_or_none()
        if row is None and amount:
            values = {"host_id": host_id, "resource": resource_named(name), "capacity": amount}
            session.execute(_table.insert(), values)
        elif row is not None and row.capacity != amount:
            raise Conflict(
                "resource-in-use", f"resources: vms hold {row.claimed} of {name} there; give at least that", field="resources"
            )


def reported(inventory: Inventory) -> dict[str, int]:
    """Return what a host says it has for single vms: huge pages by cell and size, devices set aside by kind (`10de-20b0`)."""
    pages = {
        cell_pages(cell.index, size): count for cell in inventory.numa_cells for size, count in cell.huge_pages.items() if count
    }
    devices = [
        (f"{_hex(one.vendor_id)}-{_hex(one.product_id)}", one.address)
        for one in inventory.pci_devices
        if one.driver == _SET_ASIDE_DRIVER
    ]
    kinds = Counter(kind for kind, _ in devices)
    each = {device_row(kind, address): 1 for kind, address in devices}
    return pages | each | {devices_of(kind): count for kind, count in kinds.items()}


def _hex(text: str) -> str:
    return text.lower().removeprefix("0x")


def set_reported(session: Session, host_id: str, inventory: Inventory) -> None:
    """Let the host's rows be what it reports, never below what vms hold: what they have does not vanish with a report."""
    has = reported(inventory)
    owned = sa.or_(_table.c.resource.like("cell:%:pages:%"), _table.c.resource.like("device:%"), _table.c.resource.like("pci:%"))
    known = set(session.scalars(sa.select(_table.c.resource).where(_table.c.host_id == host_id, owned)))
    for resource in sorted(known):
        amount = has.get(resource, 0)
        row = (_table.c.host_id == host_id, _table.c.resource == resource)
        capacity = sa.case((_table.c.claimed > amount, _table.c.claimed), else_=amount)
        session.execute(_table.update().where(*row).values(capacity=capacity))
    session.execute(_table.delete().where(_table.c.host_id == host_id, owned, _table.c.capacity == 0))
    fresh = [{"host_id": host_id, "resource": resource, "capacity": has[resource]} for resource in sorted(has.keys() - known)]
    if fresh:
        session.execute(_table.insert(), fresh)


def set_dedicated_cpus(session: Session, host_id: str, cpus: frozenset[int], inventory: Inventory) -> None:
    """Say which cpus are kept for vms that are pinned, by cell. Conflict(`cpus-in-use`) below what vms hold of a cell."""
    for cell in inventory.numa_cells:
        amount = len(cpus.intersection(cell.cpus))
        where = (_table.c.host_id == host_id, _table.c.resource == cell_cpus(cell.index))
        row = session.execute(sa.select(_table.c.claimed).where(*where)).one_or_none()
        if row is None and amount:
            session.execute(_table.insert(), {"host_id": host_id, "resource": cell_cpus(cell.index), "capacity": amount})
        elif row is not None:
            changed = session.execute(_table.update().where(*where, _table.c.claimed <= amount).values(capacity=amount))
            if getattr(changed, "rowcount", 0) != 1:
                raise Conflict(
                    "cpus-in-use",
                    f"dedicated_cpus: vms hold {row.claimed} cpus of cell {cell.index}, {amount} would be left",
                    field="dedicated_cpus",
                )
    session.execute(
        _table.delete().where(_table.c.host_id == host_id, _table.c.resource.like("cell:%:cpus"), _table.c.capacity == 0)
    )
