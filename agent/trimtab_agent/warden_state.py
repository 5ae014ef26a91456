"""What agent and warden tell each other: one line of JSON on a unix socket, and the same in a file for a warden that starts.

The file lies on /run, which is memory and empty after a boot. The agent writes it before it sends: a warden that was killed, or a
successor, knows at its start what its predecessor knew. Standard library only.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_agent.warden_guests import Guest

SOCKET_NAME = "warden.sock"
STATE_NAME = "warden.state"
KILLED_NAME = "warden-killed.jsonl"
"""In the agent's state directory: a line for every guest that was killed, until the agent has reported it."""
LINE_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class HandOver:
    """A lease as its warden needs it."""

    sequence: int
    """Of this message; the answer repeats it."""
    deadline_s: float
    """CLOCK_BOOTTIME at which the lease ends; 0: there never was one, so nothing of ours was started under one."""
    guests: tuple[Guest, ...]

    def as_line(self) -> bytes:
        guests = [[guest.vm_id, guest.uuid, guest.epoch] for guest in self.guests]
        return json.dumps({"type": "lease", "seq": self.sequence, "deadline": self.deadline_s, "guests": guests}).encode() + b"\n"


def parse(message: dict[str, Any]) -> HandOver:
    """Return the hand-over of a parsed line; ValueError or KeyError where it is none."""
    guests = tuple(Guest(str(vm_id), str(uuid), int(epoch)) for vm_id, uuid, epoch in message["guests"])
    return HandOver(int(message["seq"]), float(message["deadline"]), guests)


def write(directory: Path, held: HandOver) -> None:
    """Replace the file at once; memory only, so never synced."""
    path = directory / STATE_NAME
    fresh = path.with_suffix(".new")
    fresh.write_bytes(held.as_line())
    fresh.chmod(0o600)
    fresh.replace(path)


def read(directory: Path) -> HandOver | None:
    """Return what was handed over last during this boot; None where nothing was."""
    try:
        return parse(json.loads((directory / STATE_NAME).read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def append_killed(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append a line for each killed guest, on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_killed(path: Path) -> list[dict[str, Any]]:
    """Set the lines written so far apart and return them; `forget_killed` once they are reported, else they come again."""
    apart = path.with_suffix(".reporting")
    if not apart.exists():
        try:
            path.replace(apart)
        except FileNotFoundError:
            return []
    found = []
    for line in apart.read_bytes().splitlines():
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            continue  # torn by a power cut; that the guest is gone is seen in its domain too
    return found


def forget_killed(path: Path) -> None:
    path.with_suffix(".reporting").unlink(missing_ok=True)
