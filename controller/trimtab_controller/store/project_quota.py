"""The used figures of projects, raised only within their quotas."""

from collections.abc import Mapping
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Project
from trimtab_controller.store import schema
from trimtab_controller.store.rows import build, columns_of

_table = schema.project


def raise_used(session: Session, project_id: str, more: Mapping[str, int]) -> bool:
    """Add to the used figures by resource; False, and nothing is added, where a quota does not allow it all.

    One conditional UPDATE decides, so that two requests cannot both take the last of it.
    """
    amounts = {f"more_{resource}": amount for resource, amount in more.items()}
    changed = session.execute(_raise(tuple(more)), {"project_id": project_id, **amounts})
    return getattr(changed, "rowcount", 0) == 1


def lower_used(session: Session, project_id: str, less: Mapping[str, int]) -> None:
    """Take from the used figures by resource, whatever the quotas are by now."""
    values = {f"{resource}_used": _table.c[f"{resource}_used"] - amount for resource, amount in less.items() if amount}
    if values:
        session.execute(_table.update().where(_table.c.id == project_id).values(values))


@cache
def _raise(resources: tuple[str, ...]) -> sa.Update:
    """Return the UPDATE for these resources: `more_<resource>` on top of each, unless one goes beyond its quota."""
    values, conditions = {}, [_table.c.id == sa.bindparam("project_id")]
    for resource in resources:
        used, quota = _table.c[f"{resource}_used"], _table.c[f"{resource}_quota"]
        after = used + sa.bindparam(f"more_{resource}", type_=used.type)
        values[f"{resource}_used"] = after
        conditions.append(sa.or_(quota.is_(None), after <= quota))
    return _table.update().where(*conditions).values(**values)


def get(session: Session, project_id: str) -> Project:
    """Return the project with its figures as they are now."""
    query = sa.select(*columns_of(_table, Project)).where(_table.c.id == project_id)
    return build(Project, session.execute(query).one())
