"""What SQL tells of the control plane's own processes."""

from collections.abc import Mapping
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

# Renewed at least three times within a ttl; twice that is dead, whatever small difference the clocks have.
STALE_AFTER_TTLS = 2


def leases(session: Session, now: datetime) -> dict[str, str]:
    """Return the state of engine and gateway: `ok`, or since when nobody was heard of."""
    table = schema.lease
    newest: dict[str, tuple[datetime, int]] = {}
    for row in session.execute(sa.select(table.c.name, table.c.renewed_at, table.c.ttl_ms)):
        component = row.name.partition("/")[0]
        if component not in newest or row.renewed_at > newest[component][0]:
            newest[component] = (row.renewed_at, row.ttl_ms)
    found = {}
    for component in ("engine", "gateway"):
        if component not in newest:
            found[component] = "never seen"
            continue
        renewed_at, ttl_ms = newest[component]
        is_alive = now - renewed_at <= timedelta(milliseconds=STALE_AFTER_TTLS * ttl_ms)
        found[component] = "ok" if is_alive else f"not heard of since {renewed_at:%Y-%m-%d %H:%M:%S} UTC"
    return found


def verdict(components: Mapping[str, str]) -> str:
    """Return ok, degraded (work waits) or failed (work is not even taken)."""
    if components.get("database") != "ok":
        return "failed"
    return "ok" if all(state in {"ok", "unknown"} for state in components.values()) else "degraded"
