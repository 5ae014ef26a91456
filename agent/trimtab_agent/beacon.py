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
from dataclasses import replace
from pathlib import Path

from trimtab_agent import beacon_state, warden_state
from trimtab_agent.beacon_state import Task
from trimtab_agent.warden_guests import boottime_s
from trimtab_protos import beacon_slots
from trimtab_protos.beacon_slots import Beat

IDLE_S = 1.0
SEND_TIMEOUT_S = 1.0


class Beacon:
    """The rounds of one host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._state = beacon_state.read_state(directory)
        self._counter = self._state.counter

    def round(self, task: Task) -> float | None:
        """Write, then read; return until when the lease lasts, None where an intent forbids it. OSError: the storage failed."""
        began_s = boottime_s()
        with beacon_slots.opened(beacon_slots.path_of(Path(task.pool_path), task.host_id)) as slot:
            self._check_slot(task, beacon_slots.read_block(slot, beacon_slots.BEAT))
            self._counter += 1
            beat = Beat(
                host_id=task.host_id,
                boot_id=task.boot_id,
                lease_number=task.lease_number,
                counter=self._counter,
                ttl_ms=int(task.ttl_s * 1000),
            )
            beacon_slots.write_block(slot, beacon_slots.BEAT, beat)
            try:
                intent = beacon_slots.intent_of(beacon_slots.read_block(slot, beacon_slots.INTENT))
            except ValueError:
                return None
        is_forbidden = intent is not None and intent.forbids(task.lease_number)
        return None if is_forbidden else began_s + task.ttl_s

    def _check_slot(self, task: Task, block: bytes) -> None:
        """Refuse (OSError) a slot that is not the one we wrote: where a pool is not mounted any more, no intent would ever be seen."""
        try:
            found = beacon_slots.beat_of(block)
        except ValueError:
            return
        is_ours = found is not None and found.boot_id == task.boot_id and found.counter >= self._counter
        if self._counter and not is_ours:
            raise OSError(f"this is not the slot that was written last: is {task.pool_path} mounted?")
        self._counter = max(self._counter, found.counter if found is not None and is_ours else 0)

    def tell(self, deadline_s: float) -> None:
        """Tell the warden; a warden that does not listen is not waited for."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SEND_TIMEOUT_S)
            connection.connect(str(self._directory / warden_state.SOCKET_NAME))
            message = {"type": "beacon", "seq": self._counter, "deadline": deadline_s}
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.recv(4096)

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            task = beacon_state.read_task(self._directory)
            if task is None:
                stopping.wait(IDLE_S)
                continue
            due_s = boottime_s() + task.every_s
            self._renew(task)
            stopping.wait(max(0.0, due_s - boottime_s()))

    def _renew(self, task: Task) -> None:
        was, problem, deadline_s = self._state, "", None
        if was.pool_id != task.pool_id:
            was, self._counter = replace(was, pool_id=task.pool_id, counter=0), 0
        try:
            deadline_s = self.round(task)
            if deadline_s is None:
                problem = "the controller forbids it: this host is being recovered"
        except OSError as error:
            problem = f"the storage failed: {error}"
        if beacon_state.read_task(self._directory) != task:
            return  # taken back while we were at it: whether the controller still looks for a beacon there is not known
        state = replace(was, counter=self._counter, problem=problem, forbidden_lease=0)
        if deadline_s is not None and task.lease_number:
            state = replace(state, deadline_s=deadline_s, renewed_s=deadline_s - task.ttl_s)
        elif deadline_s is None and not problem.startswith("the storage"):
            state = replace(state, forbidden_lease=task.lease_number)
        if (self._state.problem, self._state.pool_id) != (problem, task.pool_id):
            sys.stderr.write(f"beacon: {problem or 'the slot works'} ({task.pool_path})\n")
        self._state = state
        # Before the warden is told: one that is started anew reads it, and would end the guests of a lease that it does not know of.
        beacon_state.write_state(self._directory, state)
        if deadline_s is not None and task.lease_number:
            with contextlib.suppress(OSError):
                self.tell(deadline_s)


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
