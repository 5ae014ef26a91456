"""Which backups of one vm stay and why. Pure: the same backups, policy and instant give the same answer, for a simulator as well.

Periods are filled from the newest backup backwards, in the order last, hourly, daily, weekly, monthly, yearly: each keeps the newest
backup of so many periods that no kept backup lies in yet. A damaged backup fills no period, and where a policy asks for proof neither
does an unproven one. Never removed: what is under a hold, the last backup of which it is known that it is whole, and what is damaged
but may become whole again by the vm's next backup.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from enum import StrEnum

from trimtab_protos.errors import InvalidRequest

KEEP_MAX = 10_000


class Proof(StrEnum):
    """What is known of a backup."""

    NONE = "none"
    VERIFIED = "verified"
    """Every chunk was read and is what was written, or more: restored, booted."""
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Candidate:
    backup_id: str
    created_at: datetime
    proof: Proof = Proof.NONE
    held_until: datetime | None = None
    """Legal hold; `datetime.max` in UTC for one without an end."""
    may_be_repaired: bool = False
    """Of a damaged one: nobody knows yet whether a later backup stored anew what it lacks."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many to keep; all 0 keeps everything."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    """ISO weeks, from Monday."""
    monthly: int = 0
    yearly: int = 0
    needs_proof: bool = False
    """Whether only verified backups fill a period."""

    def __post_init__(self) -> None:
        for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
            count = getattr(self, name)
            if not 0 <= count <= KEEP_MAX:
                raise InvalidRequest(
                    "retention-out-of-range", f"keep_{name} is {count}; it lies between 0 and {KEEP_MAX}", field=f"keep_{name}"
                )

    @property
    def keeps_everything(self) -> bool:
        return not any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly))


@dataclass(frozen=True, slots=True)
class Verdict:
    backup_id: str
    is_kept: bool
    reason: str
    """For people: `keep-daily 3 of 7`, `superseded: …`."""


Period = Callable[[datetime], tuple[int, ...] | str]

_PERIODS: Sequence[tuple[str, Period]] = (
    ("hourly", lambda at: (at.year, at.month, at.day, at.hour)),
    ("daily", lambda at: (at.year, at.month, at.day)),
    ("weekly", lambda at: tuple(at.isocalendar()[:2])),
    ("monthly", lambda at: (at.year, at.month)),
    ("yearly", lambda at: (at.year,)),
)


def judge(candidates: Sequence[Candidate], policy: Retention, *, now: datetime, zone: tzinfo = UTC) -> Sequence[Verdict]:
    """Return a verdict for each backup of one vm, newest first. `zone` says when a day begins."""
    newest_first = sorted(candidates, key=lambda found: (found.created_at, found.backup_id), reverse=True)
    kept: dict[str, str] = {}
    if policy.keeps_everything:
        kept = {found.backup_id: "the policy keeps everything" for found in newest_first}
    else:
        counted = [found for found in newest_first if _counts(found, policy)]
        _keep_last(counted, policy.last, kept)
        for name, period in _PERIODS:
            _keep_periods(counted, getattr(policy, name), name, period, zone, kept)
        _keep_what_may_not_go(newest_first, policy, now, kept)
    return [
        Verdict(found.backup_id, found.backup_id in kept, kept.get(found.backup_id) or _why_not(found, policy))
        for found in newest_first
    ]


def _counts(found: Candidate, policy: Retention) -> bool:
    if policy.needs_proof:
        return found.proof is Proof.VERIFIED
    return found.proof is not Proof.DAMAGED


def _keep_last(counted: Sequence[Candidate], count: int, kept: dict[str, str]) -> None:
    for number, found in enumerate(counted[:count], 1):
        kept[found.backup_id] = f"keep-last {number} of {count}"


def _keep_periods(
    counted: Sequence[Candidate], count: int, name: str, period: Period, zone: tzinfo, kept: dict[str, str]
) -> None:
    covered = {period(found.created_at.astimezone(zone)) for found in counted if found.backup_id in kept}
    filled = 0
    for found in counted:
        if filled == count:
            return
        key = period(found.created_at.astimezone(zone))
        if key in covered:
            continue
        covered.add(key)
        filled += 1
        kept[found.backup_id] = f"keep-{name} {filled} of {count}"


def _keep_what_may_not_go(newest_first: Sequence[Candidate], policy: Retention, now: datetime, kept: dict[str, str]) -> None:
    for found in newest_first:
        if found.held_until is not None and found.held_until > now:
            kept.setdefault(found.backup_id, f"held until {found.held_until:%Y-%m-%d}")
        if found.may_be_repaired:
            kept.setdefault(found.backup_id, "damaged; the vm's next backup may repair it")
    verified = next((found for found in newest_first if found.proof is Proof.VERIFIED), None)
    if verified is not None:
        kept.setdefault(verified.backup_id, "the last verified backup of the vm")
    whole = next((found for found in newest_first if found.proof is not Proof.DAMAGED), None)
    if whole is not None:
        kept.setdefault(whole.backup_id, "the newest backup of the vm")
    if policy.needs_proof:
        # Its proof may still come: it is newer than all that count.
        for found in newest_first:
            if found.proof is Proof.VERIFIED:
                break
            if found.proof is Proof.NONE:
                kept.setdefault(found.backup_id, "newer than the last verified backup; not verified yet")
    if not kept:
        kept.update({found.backup_id: "nothing better is left" for found in newest_first})


def _why_not(found: Candidate, policy: Retention) -> str:
    if found.proof is Proof.DAMAGED:
        return "damaged, and a better one is kept"
    if policy.needs_proof and found.proof is Proof.NONE:
        return "never verified, and a verified one is newer"
    return "no period is left for it"
