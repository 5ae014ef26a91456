"""What each host's lease may be counted on for, as the last granted renewal left it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_table = schema.host_guard
KILL_STEP_MS = 1000
"""K is rounded up to this, so that a figure that wavers is not written at each renewal."""
KILL_FLOOR_MS = 3000
KILL_LIMIT_MS = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGuard:
    """What is true of every renewal of the host that was granted since it was written."""

    is_armed: bool = False
    kill_ms: int = KILL_FLOOR_MS
    beacon_pool_id: str = ""

    @classmethod
    def heard(cls, *, is_armed: bool, kill_ms: int, beacon_pool_id: str) -> "HostGuard":
        """Return what a heartbeat said, within bounds."""
        steps = -(-max(0, min(kill_ms, KILL_LIMIT_MS)) // KILL_STEP_MS)
        return cls(is_armed=is_armed, kill_ms=max(KILL_FLOOR_MS, steps * KILL_STEP_MS), beacon_pool_id=beacon_pool_id[:40])

    def covers(self, heard: "HostGuard") -> bool:
        """Tell whether counting on this one is safe where the host said the other."""
        return (
            (heard.is_armed or not self.is_armed)
            and self.kill_ms >= heard.kill_ms
            and heard.beacon_pool_id in {"", self.beacon_pool_id}
        )


def read(session: Session, host_id: str) -> HostGuard:
    """Return the host's guard; one that is not armed where nothing was ever recorded."""
    return read_all(session).get(host_id, HostGuard())


def read_all(session: Session) -> Mapping[str, HostGuard]:
    columns = (_table.c.host_id, _table.c.is_armed, _table.c.kill_ms, _table.c.beacon_pool_id)
    return {
        row.host_id: HostGuard(is_armed=row.is_armed, kill_ms=row.kill_ms, beacon_pool_id=row.beacon_pool_id)
        for row in session.execute(sa.select(*columns))
    }


def write(session: Session, host_id: str, guard: HostGuard, *, lease_number: int, now: datetime) -> bool:
    """Record what holds from now on; the caller grants nothing that it does not cover before this is committed.

    False where the host has a newer session than that of `lease_number`.
    """
    host = schema.host
    newest = session.execute(sa.select(host.c.lease_number).where(host.c.id == host_id).with_for_update()).scalar_one_or_none()
    if newest != lease_number:
        return False
    values = {
        "is_armed": guard.is_armed,
        "kill_ms": guard.kill_ms,
        "beacon_pool_id": guard.beacon_pool_id,
        "updated_at": now,
    }
    changed = session.execute(_table.update().where(_table.c.host_id == host_id).values(**values))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(_table.insert().values(host_id=host_id, **values))
    return True
