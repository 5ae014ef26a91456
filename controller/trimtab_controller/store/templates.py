"""Templates in SQL: a vm's settings and an image, in revisions under one name."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Template
from trimtab_controller.core.placement.needs import Relation
from trimtab_controller.store import lookup, schema
from trimtab_controller.store.rows import build, columns_of

_table = schema.template
_columns = columns_of(_table, Template)


def insert(session: Session, *, template_id: str, now: datetime, **values: Any) -> Template:
    return lookup.insert_named(session, _table, Template, "template", id=template_id, created_at=now, **values)


def get(session: Session, template_id: str) -> Template:
    """Return the template, deleted ones too."""
    return build(Template, session.execute(sa.select(*_columns).where(_table.c.id == template_id)).one())


def find(session: Session, project_id: str, name_or_id: str, *, revision: int = 0) -> Template | None:
    """Return the revision, 0 for the newest, of the live template of this name; an id names one revision."""
    query = sa.select(*_columns).where(
        _table.c.project_id == project_id,
        _table.c.deleted_at.is_(None),
        sa.or_(_table.c.name == name_or_id, _table.c.id == name_or_id),
    )
    if revision:
        query = query.where(_table.c.revision == revision)
    row = session.execute(query.order_by(_table.c.revision.desc()).limit(1)).one_or_none()
    return build(Template, row) if row else None


def next_revision(session: Session, project_id: str, name: str) -> int:
    """Return a number that no revision of this name ever had."""
    query = sa.select(sa.func.max(_table.c.revision)).where(_table.c.project_id == project_id, _table.c.name == name)
    return int(session.scalar(query) or 0) + 1


def of_project(session: Session, project_id: str) -> tuple[Template, ...]:
    """Return the live revisions by name, the newest first."""
    query = sa.select(*_columns).where(_table.c.project_id == project_id, _table.c.deleted_at.is_(None))
    return tuple(build(Template, row) for row in session.execute(query.order_by(_table.c.name, _table.c.revision.desc())))


def spread(session: Session, template: Template, vm_ids: Sequence[str], *, group_id: str, now: datetime) -> None:
    """Wish these vms onto different hosts: as a group with one soft rule, which the placement policy weighs."""
    rule = {"relation": Relation.APART.value, "domain": "host", "is_must": False, "limit": 1}
    group, member = schema.vm_group, schema.vm_group_member
    session.execute(
        group.insert().values(
            id=group_id,
            project_id=template.project_id,
            name=f"{template.name[:40]}-{group_id[-12:]}",
            rule={"rules": [rule]},
            created_at=now,
        )
    )
    session.execute(member.insert(), [{"vm_group_id": group_id, "vm_id": vm_id} for vm_id in vm_ids])


def of_image(session: Session, image_id: str) -> Template | None:
    """Return the live template that the image belongs to."""
    row = session.execute(sa.select(*_columns).where(_table.c.image_id == image_id, _table.c.deleted_at.is_(None))).first()
    return build(Template, row) if row else None


def hide(session: Session, template_id: str, *, now: datetime) -> None:
    session.execute(_table.update().where(_table.c.id == template_id, _table.c.deleted_at.is_(None)).values(deleted_at=now))
