"""Durable placements: pending requests in the database to hosts claimed and committed, through the leader's own loop, without the API.

    python -m tests.bench.bench_placement_durable [--vms 2000] [--hosts 300] [--databases sqlite postgresql]

Each vm has a boot volume on a shared pool and a nic; each batch reads the fleet, decides with reasons kept, and commits claims,
epochs, decisions, answers and events. Reported: placements per second of wall time, and the CPU time of this process for each
(PostgreSQL's server works beside it). The baseline is the same rows with one transaction per placement.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.bench.postgres import private_server
from tests.placement_rows import ask, found
from trimtab_controller.clock import SystemClock
from trimtab_controller.loops import placement as placement_loop
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import migrate, schema
from trimtab_controller.store.database import Database

GOAL_PER_S = 2000.0


def measure(url: str, *, vm_count: int, host_count: int, together: int) -> dict[str, Any]:
    migrate.upgrade(url)
    db = Database(url)
    rng = random.Random(7)
    term, ids = found(db, host_count)
    loop = PlacementLoop(db=db, clock=SystemClock(), nudger=Nudger(lambda: None), rng=rng, rest=0.0)
    for number in range(vm_count):
        size = {"vcpus": rng.choice([1, 2, 4, 8]), "memory_mib": rng.choice([1792, 3584, 7168, 14336])}
        ask(db, ids, number, **size)
    placement_loop_size, placement_loop.COMMITTED_TOGETHER = placement_loop.COMMITTED_TOGETHER, together
    started_s, started_cpu = time.perf_counter(), time.process_time()
    for _ in range(-(-vm_count // placement_loop.BATCH)):
        loop.run(term)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu
    placement_loop.COMMITTED_TOGETHER = placement_loop_size
    with db.engine.connect() as connection:
        claimed = connection.execute(sa.select(sa.func.count()).select_from(schema.claim)).scalar_one()
        kept = connection.execute(sa.select(sa.func.count()).select_from(schema.decision)).scalar_one()
    db.close()
    if claimed != vm_count or kept != vm_count:
        raise SystemExit(f"{claimed} claims and {kept} decisions for {vm_count} vms")
    return {"committed_together": together, "per_s": round(vm_count / wall_s), "cpu_us_each": round(cpu_s / vm_count * 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=2000)
    parser.add_argument("--hosts", type=int, default=300)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    results, lines = {}, []
    with tempfile.TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)
        for dialect in arguments.databases:
            runs = {}
            for name, together, count in (("batched", 250, arguments.vms), ("one_by_one", 1, arguments.vms // 4)):
                sized = {"vm_count": count, "host_count": arguments.hosts, "together": together}
                if dialect == "sqlite":
                    runs[name] = measure(f"sqlite:///{directory}/{name}.db", **sized)
                else:
                    with private_server(Path(directory) / name) as url:
                        runs[name] = measure(url, **sized)
            results[dialect] = {**runs, "ratio": round(runs["batched"]["per_s"] / runs["one_by_one"]["per_s"], 1)}
            per_s = runs["batched"]["per_s"]
            verdict = "pass" if per_s >= GOAL_PER_S else "FAIL"
            lines.append(f"{verdict}  durable placements, {dialect}: {per_s:,}/s (goal >= {GOAL_PER_S:,.0f})")
    sys.stdout.write(json.dumps({"hosts": arguments.hosts, "vms": arguments.vms, "results": results}, indent=2) + "\n")
    sys.stderr.write("\n".join(lines) + "\n")
    if any(line.startswith("FAIL") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
