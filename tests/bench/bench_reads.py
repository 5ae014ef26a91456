"""How fast the API reads with 5,000 vms, what the CLI's `vm list` takes, and what a heartbeat costs the gateway.

    python tests/bench/bench_reads.py [--vms 5000] [--hosts 250] [--seconds 10] [--readers 4]

Reads: `--readers` connections, each asking one thing after the other (a vm, a page of 100 vms, a page of operations, one
operation) for `--seconds`. Goal: p99 below 100 ms. Baseline: what the machine itself does
to a request, shown by the same client asking the API for its smallest answer (`GET /v1/join`) in the same run.

CLI: `trimtab vm list` of 20 vms and of all 5,000, wall and CPU, medians. Goal: 0.25 s. Baseline: the same
interpreter doing nothing (`python -c pass`).

Heartbeats: CPU time of the gateway over 20 s without load, by heartbeat.

The 5,000 vms are created like any other and run on simulated hosts, which takes a minute or two.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.accounts import Meter, load_note, processes_of, quantile, scrape, table
from tests.bench.bench_create import create_all
from tests.bench.fleet import simulated_fleet
from tests.bench.goals import Goal, end
from tests.bench.rest import Connection
from trimtab_lab.commands import own_programs
from trimtab_lab.simulated import SimulatedLab

HOSTS = 250
"""20 vms a host. A thousand simulated hosts take three quarters of a processor, which a controller's machine has for itself."""
GOAL_P99_MS, GOAL_CLI_S = 100.0, 0.25
IDLE_S = 20.0
CLI_RUNS = 21
CREATE_CONNECTIONS = 8
SMALLEST, LISTING = "smallest answer", "trimtab vm list"


@dataclass(frozen=True, slots=True)
class Figures:
    """What has a goal, by what was asked: 99th percentiles of answers, and medians of the CLI's wall time."""

    p99_ms: dict[str, float]
    cli_s: dict[str, float]


def goals_of(figures: Figures) -> list[Goal]:
    answers = [Goal(f"{name}, p99 ms", p99_ms, GOAL_P99_MS) for name, p99_ms in figures.p99_ms.items()]
    return [*answers, *(Goal(f"{name}, median s", wall_s, GOAL_CLI_S) for name, wall_s in figures.cli_s.items())]


async def read_for(lab: SimulatedLab, seconds: float, readers: int) -> dict[str, list[float]]:
    """Return how long each answer took, in ms, by what was asked."""
    api = Connection.to(lab)
    await api.open()
    page = await api.get("/v1/projects/default/vms?page_size=100")
    operations = await api.get("/v1/operations?page_size=100")
    api.close()
    asked = {
        SMALLEST: ["/v1/join"],
        "GET vm": [f"/v1/projects/default/vms/{vm['name']}" for vm in page["items"]],
        "page of 100 vms": [f"/v1/projects/default/vms?page_size=100&page_token={page['next_page_token']}"],
        "GET operation": [f"/v1/operations/{one['id']}" for one in operations["items"]],
        "page of 100 operations": [f"/v1/operations?page_size=100&page_token={operations['next_page_token']}"],
    }
    took: dict[str, list[float]] = {name: [] for name in asked}
    until = time.monotonic() + seconds

    async def reader(first: int) -> None:
        connection = Connection.to(lab)
        await connection.open()
        turn = first
        while time.monotonic() < until:
            for name, paths in asked.items():
                began = time.monotonic()
                await connection.get(paths[turn % len(paths)])
                took[name].append(1000 * (time.monotonic() - began))
            turn += 1
        connection.close()

    await asyncio.gather(*(reader(i) for i in range(readers)))
    return took


def timed(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the medians of wall and CPU seconds of a command."""
    walls, cpus = [], []
    for _ in range(CLI_RUNS):
        before, began = os.times(), time.monotonic()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=60)
        walls.append(time.monotonic() - began)
        after = os.times()
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return median(walls), median(cpus)


def cli(lab: SimulatedLab) -> tuple[dict[str, float], str]:
    """Return the median wall time of each command that has a goal, and the table of all."""
    environment = {**os.environ, **lab.cli_environment()}
    # As at an operator's: what one start has compiled the next need not. A shell that forbids it would time the compiler.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    program = str(own_programs() / "trimtab")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import of the CLI": [sys.executable, "-c", "import trimtab_controller.cli.main"],
        f"{LISTING} --limit 20": [program, "vm", "list", "--limit", "20"],
        f"{LISTING}, all": [program, "vm", "list"],
    }
    measured = {name: timed(command, environment) for name, command in commands.items()}
    base_s, _ = measured["python -c pass"]
    rows = [["medians", "wall s", "CPU s", "ratio", "goal s"]]
    for name, (wall_s, cpu_s) in measured.items():
        goal = f"{GOAL_CLI_S}" if name.startswith(LISTING) else ""
        rows.append([name, f"{wall_s:.3f}", f"{cpu_s:.3f}", f"{wall_s / base_s:.1f}", goal])
    return {name: wall_s for name, (wall_s, _cpu_s) in measured.items() if name.startswith(LISTING)}, table("The CLI", rows)


def heartbeats(lab: SimulatedLab, hosts: int) -> str:
    processes = processes_of(lab)
    before, meter = scrape(lab, "trimtab_gateway_heartbeats_total"), Meter(processes)
    time.sleep(IDLE_S)
    spent, beats = meter.spent(), scrape(lab, "trimtab_gateway_heartbeats_total") - before
    rows = [["process", "CPU-ms per s", "CPU-ms per heartbeat"]]
    for name, spent_ms in sorted(spent.cpu_ms.items(), key=lambda one: -one[1]):
        rows.append([name, f"{spent_ms / spent.wall_s:.1f}", f"{spent_ms / beats:.3f}" if name in _BEATING else ""])
    return table(f"An idle fleet: {hosts} hosts, {beats / spent.wall_s:.0f} heartbeats/s", rows)


_BEATING = {"gateway", "simulated hosts"}


def run(lab: SimulatedLab, *, vms: int, seconds: float, readers: int) -> tuple[Figures, str]:
    """Measure reads and the CLI on a fleet that is up; return what has goals, and the report."""
    asyncio.run(create_all(lab, vms, CREATE_CONNECTIONS))
    load = load_note()
    took = asyncio.run(read_for(lab, seconds, readers))
    rows = [["", "answers", "p50 ms", "p99 ms", "goal p99"]]
    for name, values in took.items():
        goal = "" if name == SMALLEST else f"{GOAL_P99_MS:.0f}"
        rows.append([name, str(len(values)), f"{quantile(values, 0.5):.1f}", f"{quantile(values, 0.99):.1f}", goal])
    reads = table(f"Reads with {vms} vms, {readers} readers, {load}", rows)
    cli_s, commands = cli(lab)
    p99_ms = {name: quantile(values, 0.99) for name, values in took.items() if name != SMALLEST}
    return Figures(p99_ms, cli_s), "\n\n".join([reads, commands])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=5000)
    parser.add_argument("--hosts", type=int, default=HOSTS, help="All of them simulated, on the same processors.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--readers", type=int, default=4)
    arguments = parser.parse_args()
    with simulated_fleet(arguments.hosts) as lab:
        sys.stdout.write(heartbeats(lab, arguments.hosts) + "\n\n")
        figures, report = run(lab, vms=arguments.vms, seconds=arguments.seconds, readers=arguments.readers)
    sys.stdout.write(report + "\n")
    end(goals_of(figures))


if __name__ == "__main__":
    main()
