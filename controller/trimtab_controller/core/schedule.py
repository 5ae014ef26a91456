"""When a policy is due: cron expressions in a time zone, with jitter that is the same for one vm each time. Pure."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from trimtab_protos.errors import InvalidRequest

EXAMPLE = "`0 2 * * *` is every day at 02:00; the fields are minute, hour, day of month, month, day of week"
JITTER_MAX_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Schedule:
    """Use `parse_schedule`, which checks the fields."""

    expression: str
    zone: str
    jitter_s: int
    """Each vm begins up to so many seconds later, spread evenly, so that a fleet does not begin at once."""

    def next_after(self, after: datetime, *, subject_id: str) -> datetime:
        """Return the first instant later than `after` at which it is due for this subject, in UTC.

        An hour that a clock change skips or repeats is met once, as cron does.
        """
        delay = timedelta(seconds=spread(subject_id, self.jitter_s))
        due = next(CronSim(self.expression, (after - delay).astimezone(ZoneInfo(self.zone))))
        return due.astimezone(UTC) + delay


def parse_schedule(expression: str, *, zone: str = "UTC", jitter_s: int = 0, field: str = "schedule") -> Schedule:
    """Return the schedule. InvalidRequest `schedule-malformed` names what is wrong and shows one that is right."""
    text = " ".join(expression.split())
    if len(text.split(" ")) != 5:
        raise InvalidRequest("schedule-malformed", f"{field} has {len(text.split())} of 5 fields; {EXAMPLE}", field=field)
    try:
        where = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidRequest(
            "zone-unknown", f"the time zone {zone!r} is not known; one is `Europe/Berlin`", field="zone"
        ) from error
    if not 0 <= jitter_s <= JITTER_MAX_S:
        raise InvalidRequest(
            "jitter-out-of-range", f"jitter_s is {jitter_s}; it lies between 0 and {JITTER_MAX_S}", field="jitter_s"
        )
    try:
        next(CronSim(text, datetime(2024, 1, 1, tzinfo=where)))
    except (CronSimError, StopIteration) as error:
        raise InvalidRequest("schedule-malformed", f"{field} cannot be parsed: {error}; {EXAMPLE}", field=field) from error
    return Schedule(text, zone, jitter_s)


def spread(subject_id: str, within_s: int) -> int:
    """Return a number of seconds from 0 to `within_s`, the same for one subject each time."""
    digest = hashlib.sha256(subject_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (within_s + 1)
