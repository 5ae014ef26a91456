"""Backup and restore of one disk beside peers in the same run: wall and CPU time, bytes stored, ratios.

    python -m tests.bench.bench_backup [--size-gib 2] [--data-mib 1024] [--rounds 3]

The source is a qcow2 image behind qemu-nbd: half of its data random, half from this machine's libraries; the change is 100 scattered
64 KiB overwrites and 40 MiB in one piece. `nbdcopy --flush` to a raw file is the floor, durable as ours is; restic reads the same bytes
where it is installed. Every restore is compared. Only ratios within one run, and CPU time, mean anything on another machine. Ends with 1
where a goal is missed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.bench.goals import Goal, end
from trimtab_agent.backup.access import Access
from trimtab_agent.backup.export.process import Order, export_name
from trimtab_agent.backup.repository.keys import RepositoryKey

KEY = RepositoryKey(bytes(32))
MIB = 1 << 20
OWN = Path(__file__).with_name("backup_client.py")


def run(*command: str) -> str:
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{command[0]} ended with {finished.returncode}: {finished.stderr[-1000:]}")
    return finished.stdout


def make_image(directory: Path, size_bytes: int, data_mib: int) -> Path:
    raw, image = directory / "source.raw", directory / "source.qcow2"
    dice = random.Random(5)
    with raw.open("wb") as file:
        file.truncate(size_bytes)
        for _ in range(data_mib // 2):
            file.write(dice.randbytes(MIB))
        file.seek(size_bytes // 2)
        left = data_mib // 2 * MIB
        for path in sorted(Path("/usr/lib").rglob("*")):
            if left <= 0:
                break
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    piece = path.read_bytes()[:left]
                    file.write(piece)
                    left -= len(piece)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    raw.unlink()
    run("qemu-img", "bitmap", "--add", "-g", "65536", str(image), "b0")
    return image


def change_arguments(piece: Path, size_bytes: int, round_number: int) -> list[str]:
    """Return the commands of qemu-io that change about 46 MiB: 100 scattered overwrites and one piece; `piece` holds what is written."""
    dice = random.Random(100 + round_number)
    piece.write_bytes(dice.randbytes(40 * MIB))
    slots = size_bytes // 2 // 65536
    writes = [f"write -q -s {piece} {dice.randrange(slots) * 65536} 64k" for _ in range(100)]
    return [*writes, f"write -q -s {piece} {size_bytes - 64 * MIB} 40M"]


def change(image: Path, size_bytes: int, round_number: int) -> int:
    """Change about 46 MiB and return how many bytes were written."""
    piece = image.with_suffix(".piece")
    writes = change_arguments(piece, size_bytes, round_number)
    run("qemu-io", "-f", "qcow2", *(argument for write in writes for argument in ("-c", write)), str(image))
    piece.unlink()
    return 100 * 65536 + 40 * MIB


def listens(path: Path) -> bool:
    """qemu-nbd binds its socket, then opens the image, then listens."""
    with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
        peer.connect(str(path))
        return True
    return False


@contextlib.contextmanager
def served(image: Path, *arguments: str) -> Iterator[Path]:
    path = image.with_suffix(".sock")
    server = subprocess.Popen(
        ["qemu-nbd", "-t", "-r", "-f", "qcow2", "-k", str(path), "-x", "vda", "-e", "8", *arguments, str(image)]
    )
    try:
        while not listens(path):
            time.sleep(0.01)
        yield path
    finally:
        server.terminate()
        server.wait()
        path.unlink(missing_ok=True)


def measured(command: list[str], *, environment: dict[str, str] | None = None) -> tuple[dict[str, float], str]:
    """Run a command; return wall and CPU seconds and its peak memory, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **(environment or {})}).stdout
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}, output


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def own(verb: str, *arguments: str) -> tuple[dict[str, float], dict[str, float]]:
    """Run our reader and repository in a process of their own; the interpreter's start counts for the wall, not for its own figures."""
    _, output = measured([sys.executable, str(OWN), verb, *arguments])
    told = json.loads(output)
    return {"wall_s": told.pop("wall_s"), "cpu_s": told.pop("cpu_s")}, told


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bench:
    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.directory = directory
        self.size_bytes = size_bytes
        self.rows: dict[str, list[dict[str, float]]] = {}

    def note(self, name: str, figures: dict[str, float], **more: float) -> None:
        self.rows.setdefault(name, []).append({**figures, **more})

    def one_round(self, image: Path, number: int, data_mib: int) -> None:
        work = self.directory / f"round{number}"
        work.mkdir()
        repository, restored, floor = work / "repository", work / "restored.raw", work / "nbdcopy.raw"
        with served(image) as path:
            uri = f"nbd+unix:///vda?socket={path}"
            self.note("nbdcopy full", measured(["nbdcopy", "--flush", uri, str(floor)])[0])
            figures, told = own("full", str(repository), str(path))
            self.note("trimtab full", figures, stored_mib=folder_bytes(repository) / MIB, **told)
            self.restic(work, uri, "full")
        dirty = change(image, self.size_bytes, number)
        stored = folder_bytes(repository)
        with served(image, "-B", "b0") as path:
            uri = f"nbd+unix:///vda?socket={path}"
            figures, told = own("increment", str(repository), str(path))
            added = folder_bytes(repository) - stored
            self.note("trimtab increment", figures, stored_mib=added / MIB, stored_by_dirty=added / told["dirty_bytes"], **told)
            self.note("nbdcopy after the change", measured(["nbdcopy", "--flush", uri, str(floor)])[0], written_mib=dirty / MIB)
            self.restic(work, uri, "increment")
        figures, _ = own("restore", str(repository), str(restored))
        self.note("trimtab restore", figures)
        if digest_of(restored) != digest_of(floor):
            raise SystemExit("a restore differs from its source")
        self.export(repository, work, data_mib)
        figures, _ = own("verify", str(repository))
        self.note("trimtab verify", figures)
        shutil.rmtree(work)
        run("qemu-img", "bitmap", "--clear", str(image), "b0")

    def export(self, repository: Path, work: Path, data_mib: int) -> None:
        """Serve the increment in a process of its own and read all of it, as QEMU does when it fills a disk."""
        path, began = work / "export.sock", time.monotonic()
        access = Access(url=f"file://{repository}", key=KEY.text, fleet_id="fleet-1")
        order = Order(access=access, holder="bench", vm_id="vm-1", backup_id="bk-2", disk="vda", socket=str(path))
        with subprocess.Popen(
            [sys.executable, "-m", "trimtab_agent.backup.export.process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as server:
            out, _ = None, server.stdin.write(order.encoded()) if server.stdin else None
            if server.stdin and server.stdout:
                server.stdin.close()
                out = server.stdout.readline()
            if out is None or json.loads(out):
                raise SystemExit(f"the export did not start: {out!r}")
            self.note("trimtab export ready", {"wall_s": time.monotonic() - began})
            uri = f"nbd+unix:///{export_name('bk-2', 'vda')}?socket={path}"
            figures, _ = measured(["nbdcopy", uri, "null:"])
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            self.note(
                "trimtab export read by nbdcopy",
                {"wall_s": figures["wall_s"]},
                mib_s=data_mib / figures["wall_s"],
                peak_mib=int(peak.split()[1]) / 1024,
            )
            server.terminate()

    def restic(self, work: Path, uri: str, step: str) -> None:
        if shutil.which("restic") is None:
            return
        environment = {
            "RESTIC_PASSWORD": "bench",
            "RESTIC_REPOSITORY": str(work / "restic"),
            "RESTIC_CACHE_DIR": str(work / "cache"),
        }
        if step == "full":
            measured(["restic", "init"], environment=environment)
        before = folder_bytes(work / "restic")
        pipe = f"nbdcopy '{uri}' - | restic backup --stdin --stdin-filename vda --quiet"
        figures, _ = measured(["bash", "-o", "pipefail", "-c", pipe], environment=environment)
        self.note(f"restic {step}", figures, stored_mib=(folder_bytes(work / "restic") - before) / MIB)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            name: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
            for name, rows in self.rows.items()
        }

    def report(self) -> dict[str, object]:
        medians = self.medians()
        full, floor = medians["trimtab full"], medians["nbdcopy full"]
        ratios = {
            "export ready, s": medians["trimtab export ready"]["wall_s"],
            "restore wall / nbdcopy wall": medians["trimtab restore"]["wall_s"] / floor["wall_s"],
        }
        if "restic full" in medians:
            ratios["restic full / trimtab full, wall"] = medians["restic full"]["wall_s"] / full["wall_s"]
            ratios["restic increment / trimtab increment, wall"] = (
                medians["restic increment"]["wall_s"] / medians["trimtab increment"]["wall_s"]
            )
        return {"ratios": {name: round(value, 3) for name, value in ratios.items()}, "medians": medians}


def goals_of(medians: Mapping[str, Mapping[str, float]], data_mib: int) -> list[Goal]:
    full, increment = medians["trimtab full"], medians["trimtab increment"]
    cpu = Goal("full, CPU s per GiB of data", full["cpu_s"] / (data_mib / 1024), 3.2)
    return [
        Goal("full, wall over nbdcopy's", full["wall_s"] / medians["nbdcopy full"]["wall_s"], 1.5, instead=cpu),
        Goal("increment, wall s", increment["wall_s"], 1),
        Goal("increment, stored over dirty", increment["stored_by_dirty"], 1.3),
        # Three times the rate of the Python plugin.
        Goal("export, MiB/s of data", medians["trimtab export read by nbdcopy"]["mib_s"], 249, is_least=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=float, default=2)
    parser.add_argument("--data-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size_bytes = int(arguments.size_gib * 1024) * MIB
    with tempfile.TemporaryDirectory(prefix="tt-bench-") as name:
        bench = Bench(Path(name), size_bytes)
        image = make_image(Path(name), size_bytes, arguments.data_mib)
        for number in range(arguments.rounds):
            bench.one_round(image, number, arguments.data_mib)
        print(json.dumps(bench.report(), indent=1))  # noqa: T201
        end(goals_of(bench.medians(), arguments.data_mib))


if __name__ == "__main__":
    main()
