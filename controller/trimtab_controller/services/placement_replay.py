"""Replays the fleet's own placements under another policy; reads, and changes nothing."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.journal_replay import JournalEvent, in_order
from trimtab_controller.operations import placement_snapshot
from trimtab_controller.store import decision_history, fleet
from trimtab_protos.errors import InvalidRequest

# A replay is in memory: some 3 KiB for each.
DECISIONS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class History:
    fleet: FleetSnapshot
    events: list[JournalEvent]


def read(session: Session, *, since: datetime) -> History:
    """Return the decisions since then on the hosts that there are now. InvalidRequest where there are too many."""
    count = decision_history.count_since(session, since)
    if count > DECISIONS_MAX:
        raise InvalidRequest(
            "since-too-long",
            f"since: {count} decisions were made since then, at most {DECISIONS_MAX} are replayed",
            field="since",
        )
    rows = fleet.read_rows(session)
    ends = decision_history.ended(session)
    ends_of: dict[str, list[datetime]] = defaultdict(list)
    for end in ends:
        ends_of[end.vm_id].append(end.at)
    events = []
    for one in decision_history.decided(session, since=since):
        is_before = one.at < since
        if is_before and (not one.host_id or any(one.at <= at < since for at in ends_of[one.vm_id])):
            continue
        at = max(one.at, since)
        events.append(JournalEvent(at.timestamp(), one.vm_id, one.request, one.host_id, is_before))
    events += [JournalEvent(end.at.timestamp(), end.vm_id, None) for end in ends if end.at >= since]
    snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
    return History(snapshot, in_order(events))
