"""What processes cost: CPU time from the kernel, commits from the product's own metrics, and the table that every bench prints.

CPU time is what may be compared between machines and between busy hours; wall time is shown beside it.
"""

import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.simulated import SimulatedLab

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_ms(process_id: int) -> float:
    """Return the CPU time of a process and its ended threads, in ms; the kernel counts in steps of 10 ms."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return 1000 * (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def processes_of(lab: SimulatedLab) -> dict[str, int]:
    """Return the process ids of a fleet by what they are."""
    found = lab.controller_process_ids()
    fleet = lab.fleet_process_id
    assert fleet is not None
    return {**found, "simulated hosts": fleet}


@dataclass(frozen=True, slots=True)
class Spent:
    """What happened between two looks: seconds on the wall, CPU-ms by process."""

    wall_s: float
    cpu_ms: Mapping[str, float]

    def above(self, idle: "Spent") -> "Spent":
        """Return what this took beyond what the same processes spend in as much time when nothing is asked of them."""
        share = self.wall_s / idle.wall_s
        return Spent(self.wall_s, {name: ms - share * idle.cpu_ms.get(name, 0.0) for name, ms in self.cpu_ms.items()})

    def control_plane_ms(self) -> float:
        return sum(spent for name, spent in self.cpu_ms.items() if name not in {"simulated hosts", "client"})


class Meter:
    """Notes CPU times when made; `spent` says what was added since."""

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = dict(processes)
        self._began_s = time.monotonic()
        self._before = {name: cpu_ms(process_id) for name, process_id in self._processes.items()}

    def spent(self) -> Spent:
        now = {name: cpu_ms(process_id) - self._before[name] for name, process_id in self._processes.items()}
        return Spent(time.monotonic() - self._began_s, now)


def scrape(lab: SimulatedLab, name: str) -> float:
    """Return the sum of one metric over all processes of the control plane and all of its labels."""
    total = 0.0
    for port in range(lab.spec.metrics_port, lab.spec.metrics_port + 4):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith((f"{name} ", f"{name}{{")):
                    total += float(line.rsplit(" ", 1)[1])
    return total


def quantile(values: Iterable[float], share: float) -> float:
    """Return the value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return rows as plain text, the first one their heads; figures right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def clean_up_when_told_to_end() -> None:
    """Let SIGTERM end the program as an error does, so that what it brought up goes away with it."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))


def load_note() -> str:
    """Return what a reader needs to judge wall times by."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the run"
