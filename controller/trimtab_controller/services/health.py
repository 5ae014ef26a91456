"""What SQL tells of the control plane's own processes."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.store import leases

# Renewed at least three times within a ttl; twice that is dead, whatever small difference the clocks have.
STALE_AFTER_TTLS = 2


def processes(session: Session, now: datetime) -> dict[str, str]:
    """Return the state of engine and gateway by their leases: `ok`, or since when nobody was heard of."""
    found = {}
    for component in ("engine", "gateway"):
        held = [one for one in leases.named(session, component) if one.owner]
        if not held:
            found[component] = "never seen"
            continue
        newest = max(held, key=lambda lease: lease.renewed_at)
        is_alive = now - newest.renewed_at <= timedelta(milliseconds=STALE_AFTER_TTLS * newest.ttl_ms)
        found[component] = "ok" if is_alive else f"not heard of since {newest.renewed_at:%Y-%m-%d %H:%M:%S} UTC"
    return found


def verdict(components: Mapping[str, str]) -> str:
    """Return ok, degraded (work waits) or failed (work is not even taken)."""
    if components.get("database") != "ok":
        return "failed"
    return "ok" if all(state in {"ok", "unknown"} for state in components.values()) else "degraded"
