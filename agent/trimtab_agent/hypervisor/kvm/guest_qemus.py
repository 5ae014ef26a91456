"""Which guests run another QEMU than the one that is installed: an upgrade of its package replaces the program, never a process.

Asked of the programs themselves (`--version`), the guest's by /proc/PID/exe, which works though its file was replaced: the guest's
monitor is left alone, and a guest that hangs holds up nothing.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from trimtab_protos.messages import GuestQemu

_TIMEOUT_S = 5.0
_SAID = re.compile(r"version (\d\S*(?: \([^)]*\))?)")

Identity = tuple[int, int, int]
"""Device, inode and time of change of a program's file: another one after each upgrade."""


class GuestQemus:
    """Each program is asked once. Not thread-safe: belongs to the reader of the inventory."""

    def __init__(self, *, proc: Path = Path("/proc"), process_ids: Path = Path("/run/libvirt/qemu")) -> None:
        self._proc, self._process_ids = proc, process_ids
        self._said: dict[Identity, str] = {}

    def read(self, installed: Path, guests: Iterable[tuple[str, str]]) -> tuple[str, tuple[GuestQemu, ...]]:
        """Return what the installed QEMU says of itself, and the guests that run another; `guests`: vm ids with libvirt's names.

        Where the installed one does not say, nothing is told of guests.
        """
        seen: dict[Identity, str] = {}
        build = self._build_of(installed, seen)
        others = []
        for vm_id, name in guests if build else ():
            program = self._program_of(name)
            runs = build if program is None else self._build_of(program, seen)
            if runs is not None and runs != build:
                others.append(GuestQemu(vm_id=vm_id, build=runs))
        self._said = seen
        return build or "", tuple(sorted(others, key=lambda each: each.vm_id))

    def _program_of(self, name: str) -> Path | None:
        """Return the program of a guest's process, where it has one."""
        with contextlib.suppress(OSError, ValueError):
            return self._proc / str(int((self._process_ids / f"{name}.pid").read_text())) / "exe"
        return None

    def _build_of(self, program: Path, seen: dict[Identity, str]) -> str | None:
        """Return what a program says; '' where it says nothing of use, None where it is not there (a guest that has just ended)."""
        try:
            found = os.stat(program)
        except OSError:
            return None
        identity = (found.st_dev, found.st_ino, found.st_ctime_ns)
        if identity not in seen:
            seen[identity] = self._said[identity] if identity in self._said else _ask(program)
        return seen[identity]


def _ask(program: Path) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
        said = _SAID.search(ran.stdout)
        return said[1] if said else ""
    return ""
