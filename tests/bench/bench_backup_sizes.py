"""What an increment and the agent's memory cost on disks of 2, 20 and 200 GiB that hold and change equally much.

    python -m tests.bench.bench_backup_sizes [--gib 2 20 200]          about a minute

The disks are sparse qcow2 behind qemu-nbd, 256 MiB of data spread over all of each; each process does one step and tells its own peak of
memory. Goal: an increment costs what changed, whatever the disk's size, and no step takes more than 200 MiB; ends with 1 where it is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.accounts import load_note, table
from tests.bench.bench_backup import MIB, change, own, run, served
from tests.bench.goals import Goal, end

DATA_MIB = 256
PEAK_GOAL_MIB = 200
INCREMENT_GOAL_S = 1.0
READ_BEYOND_MIB = 25
"""Of the change's 100 overwrites of 64 KiB each may cost the whole of its chunk of 256 KiB, and the piece the chunks at its edges."""


@dataclass(frozen=True, slots=True)
class Row:
    gib: int
    full_s: float
    increment_s: float
    increment_cpu_s: float
    dirty_mib: float
    read_mib: float
    peak_mib: float

    def cells(self) -> list[str]:
        figures = [self.full_s, self.increment_s, self.increment_cpu_s, self.dirty_mib, self.read_mib]
        return [f"{self.gib} GiB", *(f"{figure:.2f}" for figure in figures), f"{self.peak_mib:.0f}"]


def make_sparse(folder: Path, size_bytes: int) -> Path:
    """Make a disk with 1 MiB of data in each of 256 places, spread evenly."""
    image = folder / "sparse.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size_bytes))
    step = size_bytes // DATA_MIB // MIB * MIB
    # A pattern of its own in each place, so that nothing is found to be there already.
    writes = [f"write -q -P {number % 255 + 1} {number * step} 1M" for number in range(DATA_MIB)]
    run("qemu-io", "-f", "qcow2", *(argument for write in writes for argument in ("-c", write)), str(image))
    run("qemu-img", "bitmap", "--add", "-g", "65536", str(image), "b0")
    return image


def measure(folder: Path, gib: int) -> Row:
    size_bytes = gib << 30
    image = make_sparse(folder, size_bytes)
    repository = folder / "repository"
    with served(image) as path:
        full, told_full = own("full", str(repository), str(path))
    change(image, size_bytes, 1)
    with served(image, "-B", "b0") as path:
        increment, told = own("increment", str(repository), str(path))
    _, told_restore = own("restore", str(repository), str(folder / "restored.raw"))
    peak = max(each["peak_mib"] for each in (told_full, told, told_restore))
    return Row(
        gib, full["wall_s"], increment["wall_s"], increment["cpu_s"], told["dirty_bytes"] / MIB, told["read_bytes"] / MIB, peak
    )


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    return [
        *(
            Goal(f"increment of {row.gib} GiB, MiB read beyond what is dirty", row.read_mib - row.dirty_mib, READ_BEYOND_MIB)
            for row in rows
        ),
        *(Goal(f"increment of {row.gib} GiB, wall s", row.increment_s, INCREMENT_GOAL_S) for row in rows),
        Goal("peak memory of any step, MiB", max(row.peak_mib for row in rows), PEAK_GOAL_MIB),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, nargs="+", default=[2, 20, 200])
    sizes, load = parser.parse_args().gib, load_note()
    rows = [["disk", "full s", "increment s", "its CPU s", "dirty MiB", "read MiB", f"peak MiB (goal {PEAK_GOAL_MIB})"]]
    measured: list[Row] = []
    for gib in sizes:
        with tempfile.TemporaryDirectory(prefix="tt-bench-") as name:
            measured.append(measure(Path(name), gib))
    rows += [row.cells() for row in measured]
    sys.stdout.write(table(f"Backups by the size of the disk, {load}", rows) + "\n")
    end(goals_of(measured))


if __name__ == "__main__":
    main()
