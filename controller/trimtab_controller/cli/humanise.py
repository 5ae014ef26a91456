"""Figures as people read them. Tables only: machine output keeps the API's own values."""

import re
from datetime import UTC, datetime

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def size(size_bytes: float | None) -> str:
    """Return `1.5 GiB`; three significant digits at most, "" for None."""
    if size_bytes is None:
        return ""
    amount, unit = float(size_bytes), 0
    while abs(amount) >= 1024 and unit < len(_BINARY) - 1:
        amount, unit = amount / 1024, unit + 1
    shown = f"{amount:.0f}" if amount == int(amount) or amount >= 100 else f"{amount:.1f}"
    return f"{shown} {_BINARY[unit]}"


def mib(memory_mib: float | None) -> str:
    return "" if memory_mib is None else size(memory_mib * 1024 * 1024)


def duration(seconds: float) -> str:
    """Return `3s`, `2m 10s`, `5h 2m`, `3d 4h`: two units at most."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    for unit_s, name, lower_s, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit_s:
            rest = whole % unit_s // lower_s
            return f"{whole // unit_s}{name}" + (f" {rest}{lower}" if rest else "")
    return f"{whole}s"


def ago(seconds: float | None) -> str:
    """Return `3s ago`; one unit only, since an age is for a glance."""
    return "never" if seconds is None else f"{duration(seconds).split()[0]} ago"


def instant(text: object) -> datetime | None:
    """Return the moment that an RFC 3339 text names, or None where it is none."""
    try:
        parsed = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def since(text: object, now: datetime) -> str:
    """Return how long ago a moment was, or in how much time it comes."""
    moment = instant(text)
    if moment is None:
        return ""
    seconds = (now - moment).total_seconds()
    return ago(seconds) if seconds >= 0 else f"in {duration(-seconds)}"


def bar(used: float, limit: float, *, width: int = 20) -> str:
    """Return `████░░░░  42%`; a limit of nothing shows as empty, more than all as full."""
    share = used / limit if limit > 0 else 0.0
    filled = min(width, max(0, round(share * width)))
    return f"{'█' * filled}{'░' * (width - filled)} {share * 100:3.0f}%"


def plain(text: object) -> str:
    """Return text without control characters: names and messages may come from a guest, a terminal obeys them."""
    found = str(text)
    return found if found.isprintable() else _CONTROL.sub("�", found.replace("\n", " ").replace("\t", " "))
