"""How fast the API reads with 5,000 vms, what the CLI's `vm list` takes, and what a heartbeat costs the gateway.

    python tests/bench/bench_reads.py [--vms 5000] [--seconds 10] [--readers 4]

Reads: `--readers` connections, each asking one thing after the other (a vm, a page of 100 vms, a page of operations, one
operation) for `--seconds`. Goal: p99 below 100 ms. Baseline: what the machine itself does
to a request, shown by the same client asking the API for its smallest answer (`GET /v1/join`) in the same run.

CLI: `trimtab vm list` of 20 vms and of all 5,000, wall and CPU, medians. Goal: 0.25 s. Baseline: the same
interpreter doing nothing (`python -c pass`).

Heartbeats: CPU time of the gateway over 20 s without load, by heartbeat.

The 5,000 vms are rows put into the database (copies of one that was created), since reads see only rows.
"""

import argparse
import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from tests.bench.accounts import Meter, load_note, processes_of, quantile, scrape, table
from tests.bench.bench_create import create_all
from tests.bench.fleet import HOSTS, simulated_fleet
from tests.bench.rest import Connection
from trimtab_controller.clock import mint
from trimtab_controller.core.ids import domain_uuid
from trimtab_lab.commands import own_programs
from trimtab_lab.simulated import SimulatedLab

GOAL_P99_MS, GOAL_CLI_S = 100.0, 0.25
IDLE_S = 20.0
CLI_RUNS = 21


def fill(lab: SimulatedLab, count: int) -> None:
    """Copy a created vm, its operation and its nic until there are `count` vms in the project."""
    database = sqlite3.connect(lab.controller_directory / "trimtab.db", timeout=30, isolation_level=None)
    database.row_factory = sqlite3.Row
    database.execute("BEGIN IMMEDIATE")
    vm = dict(database.execute("SELECT * FROM vm WHERE deleted_at IS NULL ORDER BY created_at LIMIT 1").fetchone())
    operation = dict(database.execute("SELECT * FROM operation WHERE subject_id = ?", (vm["id"],)).fetchone())
    volume = dict(database.execute("SELECT * FROM volume WHERE vm_id = ?", (vm["id"],)).fetchone())
    (there,) = database.execute("SELECT count(*) FROM vm WHERE deleted_at IS NULL").fetchone()
    for i in range(there, count):
        vm_id = mint("vm")
        _insert(database, "vm", {**vm, "id": vm_id, "uuid": domain_uuid(vm_id), "name": f"filled-{i:05}"})
        _insert(database, "operation", {**operation, "id": mint("op"), "subject_id": vm_id, "subject_name": f"filled-{i:05}"})
        _insert(database, "volume", {**volume, "id": mint("vol"), "vm_id": vm_id, "name": f"filled-{i:05}-root"})
    database.execute("COMMIT")
    database.close()


def _insert(database: sqlite3.Connection, name: str, row: dict[str, object]) -> None:
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


async def read_for(lab: SimulatedLab, seconds: float, readers: int) -> dict[str, list[float]]:
    """Return how long each answer took, in ms, by what was asked."""
    api = Connection.to(lab)
    await api.open()
    page = await api.get("/v1/projects/default/vms?page_size=100")
    operations = await api.get("/v1/operations?page_size=100")
    api.close()
    asked = {
        "smallest answer": ["/v1/join"],
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


def cli(lab: SimulatedLab) -> str:
    environment = {**os.environ, **lab.cli_environment()}
    program = str(own_programs() / "trimtab")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import of the CLI": [sys.executable, "-c", "import trimtab_controller.cli.main"],
        "trimtab vm list --limit 20": [program, "vm", "list", "--limit", "20"],
        "trimtab vm list, all": [program, "vm", "list"],
    }
    measured = {name: timed(command, environment) for name, command in commands.items()}
    base_s, _ = measured["python -c pass"]
    rows = [["medians", "wall s", "CPU s", "ratio", "goal s"]]
    for name, (wall_s, cpu_s) in measured.items():
        goal = f"{GOAL_CLI_S}" if name.startswith("trimtab vm list") else ""
        rows.append([name, f"{wall_s:.3f}", f"{cpu_s:.3f}", f"{wall_s / base_s:.1f}", goal])
    return table("The CLI", rows)


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


def run(lab: SimulatedLab, *, vms: int, seconds: float, readers: int) -> str:
    """Measure reads and the CLI on a fleet that is up and return the report."""
    asyncio.run(create_all(lab, 1, 1))
    fill(lab, vms)
    load = load_note()
    took = asyncio.run(read_for(lab, seconds, readers))
    rows = [["", "answers", "p50 ms", "p99 ms", "goal p99"]]
    for name, values in took.items():
        goal = "" if name == "smallest answer" else f"{GOAL_P99_MS:.0f}"
        rows.append([name, str(len(values)), f"{quantile(values, 0.5):.1f}", f"{quantile(values, 0.99):.1f}", goal])
    reads = table(f"Reads with {vms} vms, {readers} readers, {load}", rows)
    return "\n\n".join([reads, cli(lab)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--readers", type=int, default=4)
    arguments = parser.parse_args()
    with simulated_fleet() as lab:
        sys.stdout.write(heartbeats(lab, HOSTS) + "\n\n")
        report = run(lab, vms=arguments.vms, seconds=arguments.seconds, readers=arguments.readers)
        sys.stdout.write(report + "\n")


if __name__ == "__main__":
    main()
