"""What a manifest comes to in the row of its backup."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def values_of(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a listed backup; `summary` as `backup_steps.summary_json` gives it."""
    disks = summary["disks"]
    reasons = [f"{disk['name']}: {disk['full_reason']}" for disk in disks if disk["full_reason"]]
    return {
        "state": "ready",
        "consistency": summary["consistency"],
        "base_id": summary["base_id"],
        "full_reason": "; ".join(reasons)[:500],
        "downgrade": summary["notes"].get("downgrade", "")[:500],
        "size_bytes": sum(disk["size_bytes"] for disk in disks),
        "dirty_bytes": sum(disk["dirty_bytes"] for disk in disks),
        "read_bytes": sum(disk["read_bytes"] for disk in disks),
        "stored_bytes": sum(disk["stored_bytes"] for disk in disks),
        "taken_at": datetime.fromtimestamp(summary["created_ms"] / 1000, UTC),
        # Its applications were held for the instant, and may be still.
        "problem": summary["notes"].get("hook_thaw", "")[:1000],
        "manifest": {"disks": disks, "notes": summary["notes"], "settings": settings},
    }
