"""How well a vm is protected: what it would lose now, and whether that is more than its policy allows. Pure."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from trimtab_controller.core.model import Backup


@dataclass(frozen=True, slots=True)
class Protection:
    """Ages count from the instant of a backup's content, not from when it was stored."""

    last_good: Backup | None
    """The newest backup that is not known to be damaged."""
    last_verified: Backup | None
    last_booted: Backup | None
    loss_window_s: float | None
    """What would be lost now; None where everything would."""
    widest_gap_s: float | None
    """The longest time between two backups that are kept: the loss window that was achieved."""
    problem: str
    """Why it is not protected as its policy says; '' where it is."""


def judge(backups: Sequence[Backup], *, max_age_s: int, has_policy: bool, asked_at: datetime | None, now: datetime) -> Protection:
    """Return the protection of one vm. `backups`: those that are listed; `asked_at`: since when its policy has counted."""
    taken = sorted((one for one in backups if one.taken_at is not None), key=lambda one: one.taken_at or now)
    good = [one for one in taken if one.state == "ready"]
    instants = [one.taken_at for one in good if one.taken_at is not None]
    gaps = [(after - before).total_seconds() for before, after in itertools.pairwise(instants)]
    last = good[-1] if good else None
    window_s = (now - instants[-1]).total_seconds() if instants else None
    return Protection(
        last_good=last,
        last_verified=next((one for one in reversed(good) if one.level >= 1), None),
        last_booted=next((one for one in reversed(good) if one.booted_at is not None), None),
        loss_window_s=window_s,
        widest_gap_s=max(gaps, default=None),
        problem=_problem(taken, last, window_s, max_age_s=max_age_s, has_policy=has_policy, asked_at=asked_at, now=now),
    )


def _problem(
    taken: Sequence[Backup],
    last: Backup | None,
    window_s: float | None,
    *,
    max_age_s: int,
    has_policy: bool,
    asked_at: datetime | None,
    now: datetime,
) -> str:
    if not has_policy and last is None:
        return "no policy and no backup"
    if last is None and any(one.state == "damaged" for one in taken):
        return "every backup of it is damaged"
    limit = timedelta(seconds=max_age_s)
    if not max_age_s:
        return ""
    if window_s is None:
        return "no backup yet, and its policy's maximum age has passed" if asked_at and now - asked_at > limit else ""
    if window_s > max_age_s:
        return f"its last good backup is {timedelta(seconds=int(window_s))} old, at most {limit} are allowed"
    return ""
