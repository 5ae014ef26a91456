"""Server-sent events: the wire format, and a stream that resumes where it broke."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trimtab_controller.cli.errors import CommandFailed

# The first is at once: most breaks are a controller that restarts. Then slower, so that a fleet of watchers does not hammer it.
_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0)
# So many failures in a row, without one event between, and the controller counts as down.
_TRIES = 12


@dataclass(frozen=True, slots=True)
class ServerEvent:
    id: str
    kind: str
    text: str

    def document(self) -> Any:
        return json.loads(self.text)


def parse(lines: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Yield the events of a stream's lines; comments (heartbeats) are passed over, an event without its blank line is not yet one."""
    identifier, kind, texts = "", "", list[str]()
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if texts:
                yield ServerEvent(identifier, kind or "message", "\n".join(texts))
            kind, texts = "", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            identifier = value
        elif name == "event":
            kind = value
        elif name == "data":
            texts.append(value)


def follow(
    open_stream: Callable[[str], Iterator[ServerEvent]], *, on_break: Callable[[CommandFailed | None], None]
) -> Iterator[ServerEvent]:
    """Yield events for ever; after a break ask for what follows the last one seen.

    Raises what the server refuses (expired position, missing permission) and, after long silence, that it is unreachable.
    `on_break` is told of each break.
    """
    last_id, failures = "", 0
    while True:
        broken: CommandFailed | None = None
        try:
            for event in open_stream(last_id):
                failures = 0
                last_id = event.id or last_id
                yield event
        except CommandFailed as error:
            if error.kind not in {"unavailable", "deadline_exceeded", "rate_limited"} or failures >= _TRIES:
                raise
            broken = error
        on_break(broken)
        time.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
        failures += 1
