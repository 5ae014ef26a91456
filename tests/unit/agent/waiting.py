"""Waiting on a condition with a deadline; no test sleeps for a fixed time."""

import asyncio
import time
from collections.abc import Callable

DEADLINE_S = 60.0
"""For what hangs: how fast a machine is, is no test's matter."""
_LOOK_EVERY_S = 0.005


async def until(condition: Callable[[], bool], *, what: str = "the condition", deadline_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not come about within {deadline_s} s"
        await asyncio.sleep(_LOOK_EVERY_S)


def until_now(condition: Callable[[], bool], *, what: str = "the condition", deadline_s: float = DEADLINE_S) -> None:
    """The same for tests without an event loop."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not come about within {deadline_s} s"
        time.sleep(_LOOK_EVERY_S)
