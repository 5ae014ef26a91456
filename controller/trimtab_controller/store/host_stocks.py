"""What is counted on hosts besides vcpus, memory and space: how much there is. Claims of it: `claims.take_stock`."""

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.placement.columns import resource_named
from trimtab_controller.store import schema
from trimtab_protos.errors import Conflict

_table = schema.host_stock


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
