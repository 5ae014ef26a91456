"""Finds QEMU processes by the uuid of their domain, and kills exactly those. Standard library only; shared by warden and agent.

A guest is named by its uuid, not by a process id that somebody noted: a guest that starts a moment after the list was handed over
is found too, and a process id that was given to another process since is not. Kills go through a pidfd, which cannot mean another.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

QEMU_NAMES = (b"qemu-system-", b"qemu-kvm")


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that another host may start once our lease has ended: its vm keeps running, all its writable disks are shared."""

    vm_id: str
    uuid: str
    epoch: int


@dataclass(slots=True)
class Held:
    """One QEMU process, by a descriptor that means this process and no later one of the same number."""

    guest: Guest
    process_id: int
    descriptor: int

    @property
    def has_ended(self) -> bool:
        """True once the process has exited; its files are closed by then, so no write of it is in flight."""
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until it has exited, at most so long; tell whether it has."""
        readable, _, _ = select.select([self.descriptor], [], [], timeout_s)
        return bool(readable)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def close(self) -> None:
        os.close(self.descriptor)


def boottime_s() -> float:
    """Seconds since this kernel booted, time asleep included. Wall clocks have no say in leases."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def find(guests: Iterable[Guest], *, known: Iterable[int] = ()) -> list[Held]:
    """Open every QEMU process of these guests but the `known` ones. Costs one read per process of the host."""
    by_uuid = {guest.uuid.lower().encode(): guest for guest in guests}
    skipped = set(known)
    found: list[Held] = []
    if not by_uuid:
        return found
    for process_id in _process_ids():
        if process_id in skipped:
            continue
        uuid = _uuid_of(process_id)
        if uuid is None or uuid not in by_uuid:
            continue
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process_id)
            # Looked at again through the open descriptor: the number may have changed hands between look and open.
            if _uuid_of(process_id) == uuid:
                found.append(Held(by_uuid[uuid], process_id, descriptor))
            else:
                os.close(descriptor)
    return found


def _process_ids() -> Iterator[int]:
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def _uuid_of(process_id: int) -> bytes | None:
    """Return the domain uuid on a QEMU's command line, None for any other process."""
    try:
        with open(f"/proc/{process_id}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return None
    program = words[0].rpartition(b"/")[2]
    if not program.startswith(QEMU_NAMES):
        return None
    with contextlib.suppress(ValueError, IndexError):
        return words[words.index(b"-uuid") + 1].lower()
    return None
