"""Waiting for operations: progress on stderr, the outcome returned or raised. The operation does not need us: it is durable, so a
controller that restarts meanwhile, or a user who stops waiting, changes nothing about it.
"""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.client import READ_TIMEOUT_S
from trimtab_controller.cli.errors import CommandFailed, from_operation
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.session import Session

Operation = Mapping[str, Any]

ENDED_STATES = frozenset({"done", "failed", "cancelled", "needs_attention"})
# With a line that is redrawn each second the figures are worth asking for each second; else only the end matters.
_POLL_DRAWN_S = 1.0
_POLL_QUIET_S = 20.0
# A controller that restarts is back in seconds; one that is away for this long is down.
_PATIENCE_S = 60.0
_SHORTEST_ROUND_S = 0.2


class ProgressLine:
    """One line on stderr, drawn over and over on a terminal; elsewhere a line per new phase, but for programs, which may parse
    the error that stderr is for then.
    """

    def __init__(self, session: Session) -> None:
        self._is_drawn = session.has_progress
        self._is_silent = session.is_machine_output and not self._is_drawn
        self._phase = ""
        self._is_dirty = False

    def update(self, text: str, phase: str) -> None:
        """Show `text`; where lines are not drawn over, only when `phase` is another than the last."""
        if self._is_drawn:
            # A line that wraps could not be drawn over.
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{humanise.plain(text)[:width]}")
            sys.stderr.flush()
            self._is_dirty = True
        elif phase != self._phase and not self._is_silent:
            render.say(text)
        self._phase = phase

    def clear(self) -> None:
        if self._is_dirty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._is_dirty = False


def has_ended(operation: Operation) -> bool:
    return bool(operation.get("done")) or operation.get("state") in ENDED_STATES


def until_ended(session: Session, operation: Operation) -> Operation:
    """Return the operation at its end, however it ended. DeadlineExceeded after `--timeout`: it goes on."""
    identifier = str(operation["id"])
    started = time.monotonic()
    heard = started
    line = ProgressLine(session)
    try:
        while not has_ended(operation):
            line.update(progress_text(operation, time.monotonic() - started), phase_of(operation))
            left_s = session.wait_timeout_s - (time.monotonic() - started)
            if left_s <= 0:
                raise _gave_up(operation, session.wait_timeout_s)
            asked = time.monotonic()
            try:
                operation = _next_state(session, identifier, left_s)
                heard = time.monotonic()
            except CommandFailed as error:
                if error.kind not in {"unavailable", "deadline_exceeded"} or time.monotonic() - heard > _PATIENCE_S:
                    error.operation_id = identifier
                    error.hint = f"trimtab op wait {identifier}"
                    raise
                line.update(f"{error.message}; still waiting for {identifier}", "unreachable")
                time.sleep(_POLL_DRAWN_S)
            # A server that answers at once without an end must not be asked in a tight loop.
            time.sleep(max(0.0, _SHORTEST_ROUND_S - (time.monotonic() - asked)) if not has_ended(operation) else 0.0)
    except KeyboardInterrupt:
        line.clear()
        render.say(
            f"{identifier} goes on; wait for it again with `trimtab op wait {identifier}`, stop it with `trimtab op cancel`"
        )
        raise
    finally:
        line.clear()
    return operation


def until_done(session: Session, operation: Operation) -> Operation:
    """Return the operation once it is done; raise its error where it ended otherwise."""
    ended = until_ended(session, operation)
    if ended.get("state") != "done":
        raise from_operation(ended)
    return ended


def phase_of(operation: Operation) -> str:
    progress = operation.get("progress") or {}
    parts = (operation.get("state"), operation.get("step"), operation.get("waiting_for"), progress.get("phase"))
    return " ".join(str(part or "") for part in parts)


def progress_text(operation: Operation, elapsed_s: float) -> str:
    """Return `vm.migrate web1  memory  ████░░ 43%  512 MiB of 1.2 GiB  210 MiB/s  3s left`."""
    subject = (operation.get("subject") or {}).get("name") or ""
    parts = [f"{operation.get('kind', '')} {subject}".strip()]
    progress: Mapping[str, Any] = operation.get("progress") or {}
    doing = progress.get("phase") or operation.get("step") or operation.get("state") or ""
    parts.append(str(doing))
    waiting_for = operation.get("waiting_for")
    if waiting_for and not progress:
        parts.append(f"waiting for {waiting_for}")
    parts += transfer_parts(progress)
    parts.append(humanise.duration(elapsed_s))
    return "  ".join(part for part in parts if part)


def transfer_parts(progress: Mapping[str, Any]) -> list[str]:
    """Return percent, bytes, rate and remaining time, as far as they are known."""
    parts = []
    done, total = progress.get("done_bytes") or 0, progress.get("total_bytes") or 0
    percent = progress.get("percent")
    if percent is not None:
        parts.append(humanise.bar(float(percent), 100))
    elif total:
        parts.append(humanise.bar(done, total))
    if total:
        parts.append(f"{humanise.size(done)} of {humanise.size(total)}")
    if progress.get("rate_bytes_s"):
        parts.append(f"{humanise.size(progress['rate_bytes_s'])}/s")
    if progress.get("remaining_s"):
        parts.append(f"{humanise.duration(progress['remaining_s'])} left")
    return parts


def _next_state(session: Session, identifier: str, left_s: float) -> Operation:
    poll_s = math.ceil(max(1.0, min(left_s, _POLL_DRAWN_S if session.has_progress else _POLL_QUIET_S)))
    place = join("operations", identifier) + ":wait"
    answer = session.client.get(place, {"timeout_s": poll_s}, timeout_s=poll_s + READ_TIMEOUT_S)
    found: Operation = answer.get("operation", answer)
    return found


def _gave_up(operation: Operation, timeout_s: float) -> CommandFailed:
    identifier = str(operation["id"])
    return CommandFailed(
        f"{identifier} has not ended after {humanise.duration(timeout_s)} ({phase_of(operation).strip()}); it goes on",
        code="wait-timeout",
        kind="deadline_exceeded",
        operation_id=identifier,
        hint=f"trimtab op wait {identifier}",
    )
