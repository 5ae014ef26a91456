"""One backup, restore or verification in a process of its own, for bench_backup.py: prints its figures as JSON."""

import json
import os
import resource
import sys
import time
from pathlib import Path

from trimtab_agent.backup.copying import copy_disk
from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.manifests import Consistency, Subject
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.repository import Repository, create_repository, open_repository
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_agent.backup.repository.writer import begin_backup
from trimtab_agent.clock import SystemClock

KEY = RepositoryKey(bytes(32))
BITMAP = "qemu:dirty-bitmap:b0"


def back_up(repository: Repository, path: Path, backup_id: str, base_id: str | None) -> dict[str, float]:
    contexts = [ALLOCATION, *([BITMAP] if base_id else [])]
    with (
        NbdClient.connect(path, "vda", contexts=contexts) as client,
        begin_backup(repository, Subject("fleet-1", "project-1", "vm-1", "vm"), backup_id, base_id=base_id) as writer,
    ):
        base = writer.base.disk("vda") if writer.base else None
        disk = writer.open_disk("vda", client.size_bytes, base=base)
        copied = copy_disk(client, disk, bitmap=BITMAP if base_id else None, on_progress=lambda _done, _total: None)
        writer.commit([writer.finish(disk)], created_ms=repository.clock.now_ms(), consistency=Consistency.CRASH)
    return {"dirty_bytes": copied.dirty_bytes, "read_bytes": copied.read_bytes}


def restore(repository: Repository, target: Path) -> dict[str, float]:
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    with open_backup(repository, "vm-1", "bk-2") as reader:
        disk = reader.disk("vda")
        os.ftruncate(descriptor, disk.manifest.size_bytes)
        disk.copy_to(lambda offset, content: _write(descriptor, offset, content))
    os.fsync(descriptor)
    os.close(descriptor)
    return {}


def _write(descriptor: int, offset: int, content: bytes) -> None:
    os.pwrite(descriptor, content, offset)


def peak_mib() -> float:
    # Not ru_maxrss: it outlives exec, so that it tells the size of the process that forked this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    verb, folder, *rest = sys.argv[1:]
    if verb == "full":
        Path(folder).mkdir()
        create_repository(FolderBlobs(Path(folder)), KEY, fleet_id="fleet-1", project_id="", clock=SystemClock())
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    repository = open_repository(FolderBlobs(Path(folder)), KEY, fleet_id="fleet-1", clock=SystemClock())
    match verb:
        case "full":
            told = back_up(repository, Path(rest[0]), "bk-1", None)
        case "increment":
            told = back_up(repository, Path(rest[0]), "bk-2", "bk-1")
        case "restore":
            told = restore(repository, Path(rest[0]))
        case _:
            told = {"damaged": float(verify_all(repository).damaged_records)}
    after = resource.getrusage(resource.RUSAGE_SELF)
    told |= {
        "wall_s": time.monotonic() - began,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
