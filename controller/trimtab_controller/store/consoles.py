"""Sessions at guests' consoles: a token is used once, by a conditional UPDATE."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build
from trimtab_protos.console_messages import ConsoleKind

_table = schema.console


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """One session, or the token that may open it while `opened_at` is None."""

    id: str
    project_id: str
    vm_id: str
    # The API token with which it was asked for; the session ends with it.
    token_id: str
    actor: str
    kind: ConsoleKind
    host_id: str
    epoch: int
    secret_sha256: str
    expires_at: datetime
    opened_at: datetime | None
    closed_at: datetime | None
    created_at: datetime


def insert(
    session: Session,
    *,
    console_id: str,
    vm: "tuple[str, str, str, int]",
    token_id: str,
    actor: str,
    kind: ConsoleKind,
    secret_sha256: str,
    expires_at: datetime,
    now: datetime,
) -> Console:
    """Insert a token's row; `vm` is its (id, project, host, epoch)."""
    vm_id, project_id, host_id, epoch = vm
    row = {
        "id": console_id,
        "project_id": project_id,
        "vm_id": vm_id,
        "token_id": token_id,
        "actor": actor,
        "kind": kind.value,
        "host_id": host_id,
        "epoch": epoch,
        "secret_sha256": secret_sha256,
        "expires_at": expires_at,
        "created_at": now,
    }
    session.execute(_table.insert().values(row))
    return build(Console, {**row, "opened_at": None, "closed_at": None})


def find(session: Session, console_id: str) -> Console | None:
    row = session.execute(sa.select(_table).where(_table.c.id == console_id)).one_or_none()
    return build(Console, row) if row else None


def use_up(session: Session, console_id: str, *, now: datetime) -> bool:
    """Mark the token used; False where somebody was faster or it expired meanwhile."""
    changed = session.execute(
        _table.update()
        .where(_table.c.id == console_id, _table.c.opened_at.is_(None), _table.c.expires_at > now)
        .values(opened_at=now)
    )
    return getattr(changed, "rowcount", 0) == 1


def close(session: Session, console_id: str, *, cause: str, now: datetime) -> None:
    session.execute(_table.update().where(_table.c.id == console_id).values(closed_at=now, cause=cause))


def delete_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` rows made before `at`, and return how many: the audit trail keeps who was where."""
    old = sa.select(_table.c.id).where(_table.c.created_at < at).limit(limit)
    changed = session.execute(_table.delete().where(_table.c.id.in_(old)))
    return int(getattr(changed, "rowcount", 0))
