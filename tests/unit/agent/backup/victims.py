"""Writers and pruners on a folder, killed with SIGKILL at random instants. Run as a program it is the nursery they are forked from.

The content of backup `bk-N-R` is a function of N, so that anyone can tell whether a restore is right.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.unit.agent.backup.kit import CHUNK, FLEET, KEY, Disk, back_up, restore
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.repository import Repository, create_repository, open_repository
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_agent.clock import SystemClock
from trimtab_protos.errors import TrimtabError

CHUNKS = 200
KEPT = 3
ROUND_S = 7200
"""Each round is this much later: what was killed in an earlier one is silent."""


class ShiftedClock(SystemClock):
    def __init__(self, shift_s: float) -> None:
        super().__init__()
        self._shift_s = shift_s

    def now_ms(self) -> int:
        return super().now_ms() + int(self._shift_s * 1000)


def content(generation: int) -> Disk:
    disk = Disk(CHUNKS, tail=99)
    for number in range(generation):
        disk.write(number * 7 % (CHUNKS + 1), random.Random(number % 50).randbytes(CHUNK))
    return disk


def generation_of(backup_id: str) -> int:
    return int(backup_id.split("-")[1])


def opened(folder: Path, round_number: int) -> Repository:
    clock = ShiftedClock(round_number * ROUND_S)
    return open_repository(FolderBlobs(folder), KEY, fleet_id=FLEET, clock=clock, holder=f"host{round_number}")


def live(folder: Path, round_number: int, vm: str) -> None:
    """Back up, forget and prune until killed."""
    while True:
        repository = opened(folder, round_number)
        listed = [manifest for manifest in repository.list_backups().manifests if manifest.subject.vm_id == vm]
        base = listed[-1].backup_id if listed else None
        generation = generation_of(base) + 1 if base else 1
        disk = content(generation)
        disk.dirty = {(generation - 1) * 7 % (CHUNKS + 1)}
        back_up(repository, disk, f"bk-{generation}-{round_number}", base_id=base, vm=vm)
        for manifest in listed[:-KEPT]:
            repository.forget(vm, manifest.backup_id)
        try:
            prune(repository, grace_s=0)
        except TrimtabError as error:
            if error.code != "prune-is-running":
                raise
        repository.close()


def check(folder: Path, round_number: int) -> int:
    """Restore every listed backup and compare; return how many."""
    repository = opened(folder, round_number)
    listing = repository.list_backups()
    assert listing.unreadable == {}
    assert verify_all(repository).damaged_backups == []
    for manifest in listing.manifests:
        restored = restore(repository, manifest.backup_id, vm=manifest.subject.vm_id)
        assert restored == bytes(content(generation_of(manifest.backup_id)).content), manifest.backup_id
    repository.close()
    return len(listing.manifests)


@contextmanager
def nursery(folder: Path) -> Iterator[subprocess.Popen[str]]:
    create_repository(FolderBlobs(folder), KEY, fleet_id=FLEET, project_id="", clock=SystemClock())
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.agent.backup.victims", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def kill_round(process: subprocess.Popen[str], round_number: int, delay_ms: int) -> list[str]:
    """Let two writers live for a while, kill both, and return how each ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{round_number} {delay_ms}\n")
    process.stdin.flush()
    return process.stdout.readline().split()


def campaign(folder: Path, *, seed: int, rounds: int) -> int:
    """Kill two writers in each round and check everything after it; return how many restores were compared."""
    dice = random.Random(seed)
    compared = 0
    with nursery(folder) as process:
        for number in range(1, rounds + 1):
            ended = kill_round(process, number, dice.randrange(20, 400))
            assert ended == [str(int(signal.SIGKILL))] * 2, "a writer ended by itself"
            compared += check(folder, number)
    return compared


def main() -> None:
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        round_number, delay_ms = map(int, line.split())
        children = []
        for vm in ("vm-1", "vm-2"):
            child = os.fork()
            if child == 0:
                live(folder, round_number, vm)
            children.append(child)
        time.sleep(delay_ms / 1000)  # the random instant
        for child in children:
            os.kill(child, signal.SIGKILL)
        print(*(os.waitpid(child, 0)[1] for child in children), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
