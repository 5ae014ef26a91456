"""The command line at a pseudo terminal: who sits at a guest's serial console."""

import contextlib
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator

from tests.lab.fleet_kit import PATIENCE_S, Fleet
from trimtab_lab.commands import own_programs


class Seat:
    """The command line at a pseudo terminal, as a person has it."""

    def __init__(self, fleet: Fleet, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(own_programs() / "trimtab"), "vm", "console", *arguments],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TERM": "xterm", **fleet.plane.cli_environment()},
            stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self, timeout_s: float) -> bool:
        """Take what was shown within the time; False at the end."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            piece = os.read(self._master, 65536)
        except OSError:
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)

    def until(self, word: str, *, keys: str = "") -> None:
        """Read until the word is shown; `keys` are pressed again while it is not."""
        end_s, again_s = time.monotonic() + PATIENCE_S, time.monotonic()
        while word not in self.shown:
            assert time.monotonic() < end_s, f"no {word!r} in {self.shown[-2000:]!r}"
            if keys and time.monotonic() >= again_s:
                self.type(keys)
                again_s = time.monotonic() + 5
            assert self.read(0.5) or word in self.shown, f"it ended before {word!r}: {self.shown[-2000:]!r}"

    def end(self) -> int:
        while self.process.poll() is None and self.read(0.5):
            pass
        code = self.process.wait(timeout=60)
        while self.read(0.1) and select.select([self._master], [], [], 0.1)[0]:
            pass
        os.close(self._master)
        return code


@contextlib.contextmanager
def seat(fleet: Fleet, *arguments: str) -> Iterator[Seat]:
    made = Seat(fleet, *arguments)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(timeout=60)
