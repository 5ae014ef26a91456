"""`trimtab-beacon`: renews the host's lease on shared storage as well, so that losing every controller kills no guest.

Each round it notes the time, writes the host's slot, reads the controller's fence intent, and, where there is none, tells the warden
that the lease lasts a ttl from the noted time. A host is recovered only after its intent was durable for the whole bound: whatever
was renewed before the intent has ended by then, and nothing is renewed after it.

It is a process of its own because storage hangs: it hangs with it, and neither agent nor warden ever waits for it.
What it does (pool, ttl) the agent leaves in `beacon.json` on /run once the controller has recorded that an intent must be written
there; without that file it idles. Standard library only.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab_agent import beacon_slots, warden_state
from trimtab_agent.warden_guests import boottime_s

TASK_NAME = "beacon.json"
IDLE_S = 1.0
SEND_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the agent wants of the beacon."""

    host_id: str
    boot_id: str
    pool_path: str
    ttl_s: float
    every_s: float


def write_task(directory: Path, task: Task | None) -> None:
    """Leave the task for the beacon, or take it away."""
    path = directory / TASK_NAME
    if task is None:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(task)))
    fresh.replace(path)


def read_task(directory: Path) -> Task | None:
    try:
        return Task(**json.loads((directory / TASK_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class Beacon:
    """The rounds of one host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._counter = 0

    def round(self, task: Task) -> float | None:
        """Write, then read; return until when the lease lasts, None where it is not renewed. OSError: the storage failed."""
        began_s = boottime_s()
        self._counter += 1
        with beacon_slots.opened(beacon_slots.path_of(Path(task.pool_path), task.host_id)) as slot:
            said = {"host": task.host_id, "boot": task.boot_id, "counter": self._counter, "ttl_ms": int(task.ttl_s * 1000)}
            beacon_slots.write_block(slot, 0, said)
            try:
                intent = beacon_slots.read_block(slot, 1)
            except ValueError:
                return None
        return began_s + task.ttl_s if intent is None else None

    def tell(self, deadline_s: float) -> None:
        """Tell the warden; a warden that does not listen is not waited for."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SEND_TIMEOUT_S)
            connection.connect(str(self._directory / warden_state.SOCKET_NAME))
            message = {"type": "beacon", "seq": self._counter, "deadline": deadline_s}
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.recv(4096)

    def run(self, stopping: threading.Event) -> None:
        was_renewed = False
        while not stopping.is_set():
            task = read_task(self._directory)
            if task is None:
                stopping.wait(IDLE_S)
                continue
            due_s = boottime_s() + task.every_s
            deadline_s = None
            try:
                deadline_s = self.round(task)
                if deadline_s is not None:
                    self.tell(deadline_s)
            except OSError as error:
                sys.stderr.write(f"beacon: not renewed: {error}\n")
            if (deadline_s is not None) != was_renewed:
                was_renewed = deadline_s is not None
                sys.stderr.write(f"beacon: {'renews' if was_renewed else 'does not renew'} the lease in {task.pool_path}\n")
            stopping.wait(max(0.0, due_s - boottime_s()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew until SIGTERM."""
    parser = argparse.ArgumentParser(prog="trimtab-beacon", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--runtime-dir", type=Path, default=Path("/run/trimtab"), help="where the task and the warden's socket lie"
    )
    given = parser.parse_args(arguments)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.suppress(OSError):
        os.nice(-5)
    Beacon(given.runtime_dir).run(stopping)
    return 0


if __name__ == "__main__":
    sys.exit(main())
