"""A person's terminal at a serial console: every key goes to the guest, but Ctrl-]."""

import contextlib
import os
import sys
import termios
import threading
import tty
from collections.abc import Iterator

from trimtab_controller.cli.console_line import ConsoleLine
from trimtab_controller.cli.errors import CommandFailed

LEAVE_KEY = b"\x1d"  # Ctrl-]
_PIECE_BYTES = 4096


def talk(line: ConsoleLine, *, greeting: str) -> None:
    """Carry stdin and stdout until Ctrl-], the end of stdin where it is no terminal, or the end of the session.

    The greeting is shown once every key goes to the guest: who answers it at once must not interrupt us.
    """
    failures: list[CommandFailed] = []
    has_ended = threading.Event()

    def listen() -> None:
        try:
            for piece in line.pieces():
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        except CommandFailed as error:
            failures.append(error)
        finally:
            has_ended.set()

    listening = threading.Thread(target=listen, name="console", daemon=True)
    with _raw_terminal() as line_end:
        sys.stderr.write(f"{greeting}{line_end}")
        sys.stderr.flush()
        listening.start()
        _send_keys(line, has_ended)
        line.close()
        listening.join(timeout=10)
    if failures:
        raise failures[0]


def _send_keys(line: ConsoleLine, has_ended: threading.Event) -> None:
    import select

    source = sys.stdin.fileno()
    while not has_ended.is_set():
        if not select.select([source], [], [], 0.2)[0]:
            continue
        keys = os.read(source, _PIECE_BYTES)
        before, leave, _ = keys.partition(LEAVE_KEY)
        if before:
            line.write(before)
        if leave:
            return
        if not keys:
            # Piped input has ended: what the guest says to it is still to come, until it closes or the user interrupts.
            has_ended.wait()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[str]:
    """Let every key through while the block runs, and yield what ends a line then; the terminal is always put back as it was."""
    if not sys.stdin.isatty():
        yield "\n"
        return
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)
    tty.setraw(source)
    try:
        yield "\r\n"
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
