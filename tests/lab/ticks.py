"""What a guest's serial log says of its counter: one line a second, each number once, until somebody stops it."""

import re

TICK = re.compile(r"tick (\d+) uptime ([\d.]+)")


def spoken(log: str) -> list[tuple[int, float]]:
    """Return every (counter, uptime) in a log. Its last line counts once it has ended: half of a figure is another figure."""
    whole = log[: log.rfind("\n") + 1]
    return [(int(number), float(uptime)) for number, uptime in TICK.findall(whole)]


def breaks(log: str, *, first: int, last: int) -> list[str]:
    """Return where a guest that was never stopped did not count on, from `first` to `last`, both of which it must have said.

    Empty: no number is left out or said twice, and its uptime grew with each. A log that goes on in another (a move) is their texts joined.
    """
    said = spoken(log)
    numbers = [number for number, _uptime in said]
    missing = [f"{number} was not said" for number in (first, last) if number not in numbers]
    if missing:
        return missing
    begin, end = numbers.index(first), len(numbers) - 1 - numbers[::-1].index(last)
    found = []
    for (number, uptime), (following, later) in zip(said[begin:end], said[begin + 1 : end + 1], strict=True):
        if following != number + 1:
            found.append(f"after {number} came {following}")
        if later <= uptime:
            found.append(f"at {following} the uptime was {later} after {uptime}: it was started anew")
    return found
