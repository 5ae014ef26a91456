"""Charges a project for what it takes, in the transaction that takes it."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_protos.errors import QuotaExceeded, Unavailable

_table = schema.project


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    vms: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_bytes: int = 0


def charge(session: Session, project_id: str, asked: Charge) -> None:
    """Raise the project's used figures. QuotaExceeded names the first figure that does not allow it.

    One conditional UPDATE decides, so that two requests cannot both take the last of it.
    """
    resources = ("vms", "vcpus", "memory_mib", "disk_bytes")
    values, conditions = {}, [_table.c.id == project_id]
    for resource in resources:
        more = getattr(asked, resource)
        used, quota = _table.c[f"{resource}_used"], _table.c[f"{resource}_quota"]
        if more:
            values[f"{resource}_used"] = used + more
            conditions.append(sa.or_(quota.is_(None), used + more <= quota))
    if not values:
        return
    changed = session.execute(_table.update().where(*conditions).values(**values))
    if getattr(changed, "rowcount", 0) == 1:
        return
    row = session.execute(sa.select(_table).where(_table.c.id == project_id)).one()._mapping
    for resource in resources:
        more, used, quota = getattr(asked, resource), row[f"{resource}_used"], row[f"{resource}_quota"]
        if more and quota is not None and used + more > quota:
            raise QuotaExceeded(
                "quota-exceeded",
                f"project {row['name']}: the quota of {resource} is {quota}, {used} are used, {more} more were asked for",
                resource=resource,
                quota=quota,
                used=used,
                asked=more,
            )
    raise Unavailable("quota-moved", f"the quota of project {row['name']} was changed just now; send the request again")
