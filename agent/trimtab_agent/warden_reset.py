"""Resets the machine when a killed guest does not die: a process that waits for dead storage cannot be killed. Standard library only."""

import contextlib
import fcntl
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of linux/watchdog.h.
_SETTIMEOUT, _GETTIMEOUT = 0xC0045706, 0x80045707
_GOOD_BYE = b"V"
"""The last thing that is written before a close on purpose: else the device goes on counting, and resets the machine."""
_UNTOLD_S = 60.0
"""What a device is taken to wait that does not say it: the longest usual one."""


def set_timeout(descriptor: int, seconds: float) -> float:
    """Have the device wait so long without being fed; return what it waits then. OSError: it takes no such orders."""
    asked = struct.pack("i", math.ceil(seconds))
    try:
        answer = fcntl.ioctl(descriptor, _SETTIMEOUT, asked)
    except OSError:
        answer = fcntl.ioctl(descriptor, _GETTIMEOUT, asked)
    return float(struct.unpack("i", answer)[0])


@dataclass(slots=True)
class Reset:
    """`off` says so and waits. `sysrq` reboots at once, without syncing. `watchdog` holds /dev/watchdog open, feeds it, and stops."""

    kind: str = "off"
    after_s: float = 5.0
    """How long a killed guest may take to die."""
    trigger: Path = Path("/proc/sysrq-trigger")
    device: Path = Path("/dev/watchdog")
    device_timeout_s: float = 10.0
    """As asked for; once the device is open, as it says."""
    is_due: bool = False
    order: Callable[[int, float], float] = set_timeout
    say: Callable[[str], None] = lambda _text: None
    _descriptor: int = -1
    _problem: str = ""

    @property
    def takes_s(self) -> float:
        """What a reset adds to K at the worst."""
        if self.kind == "off":
            return 0.0
        return self.after_s + (self.device_timeout_s if self.kind == "watchdog" else 0.0)

    @property
    def missing(self) -> tuple[str, ...]:
        """What keeps it from resetting the machine, in words; nothing where it can, or was not asked to."""
        return (self._problem,) if self._problem else ()

    def feed(self) -> None:
        """Tell the device that we live. It is opened when it can be: a predecessor holds it until it leaves."""
        if self.kind != "watchdog" or self.is_due:
            return
        try:
            if self._descriptor < 0:
                self._open()
            os.write(self._descriptor, b"\0")
        except OSError as error:
            self._note(f"no reset ({self.device}: {error.strerror})")

    def leave(self) -> None:
        """Let go of the device on purpose; where a guest survived its kill it goes on counting."""
        if self._descriptor < 0 or self.is_due:
            return
        with contextlib.suppress(OSError):
            os.write(self._descriptor, _GOOD_BYE)
        os.close(self._descriptor)
        self._descriptor = -1

    def settle(self) -> None:
        """Called while the lease lives: whatever survived is no danger any more."""
        self.is_due = False

    def guests_survive(self, for_s: float, vm_ids: Sequence[str]) -> None:
        if not vm_ids or for_s <= self.after_s:
            self.is_due = False
            return
        if not self.is_due:
            self.say(f"{', '.join(vm_ids)} survived SIGKILL for {for_s:.1f} s; reset: {self.kind}")
        self.is_due = True
        if self.kind == "sysrq":
            self.trigger.write_text("b")

    def _open(self) -> None:
        self._descriptor = os.open(self.device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.device_timeout_s = self.order(self._descriptor, self.device_timeout_s)
            self._note("")
        except OSError as error:
            self.device_timeout_s = _UNTOLD_S
            self._note(f"{self.device} does not say how long it waits ({error.strerror}); {_UNTOLD_S:.0f} s are reckoned with")

    def _note(self, problem: str) -> None:
        if problem and problem != self._problem:
            self.say(problem)
        self._problem = problem
