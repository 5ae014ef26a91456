"""How many vms a second are created end to end, and what each costs: one request, one vm, 1,000 simulated hosts.

    python tests/bench/bench_create.py [--vms 1000] [--connections 32]

A create is a POST to the real API with an idempotency key, as the CLI sends it, and is over when its operation is `done`: placed,
volume made, domain defined, guest running, every record of the journal committed with an fsync. The client sends one vm per
request and waits for each answer before it sends the next on that connection.
Goal: 100 creates/s on two cores, simulated hosts and client on the same two.

Baseline of the same run, what no control plane could do without: the same three commands sent to the same agents over plain
stubs, and one fsynced row in SQLite before and one after, by one process.
"""

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.bench.accounts import Meter, Spent, load_note, processes_of, quantile, scrape, table
from tests.bench.bare_commands import create_bare
from tests.bench.fleet import HOSTS, NETWORK, POOL, image_of, simulated_fleet
from tests.bench.goals import Goal, end
from tests.bench.rest import Connection
from trimtab_lab.simulated import SimulatedLab

GOAL_PER_S = 100.0
TIMEOUT_S = 180.0
POLL_S = 0.25
# Imports, channels and statements that the first creates make, and the journal's first pages.
WARM_UP = 100
# A thousand heartbeats each three seconds cost the same whether vms are created or not, and more of a create the slower it is.
IDLE_S = 12.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of creates came to."""

    count: int
    seconds: float
    latencies_s: tuple[float, ...]
    spent: Spent
    transactions: float
    commits: float

    @property
    def per_s(self) -> float:
        return self.count / self.seconds


async def create_all(lab: SimulatedLab, count: int, connections: int) -> Outcome:
    """Create `count` vms and wait until each operation is done."""
    run = secrets.token_hex(3)
    names = [f"b{run}-{i:05}" for i in range(count)]
    waiting = iter(names)
    apis = [Connection.to(lab) for _ in range(connections)]
    await asyncio.gather(*(api.open() for api in apis))
    sent_at: dict[str, float] = {}

    async def send(api: Connection) -> None:
        for name in waiting:
            document = {"name": name, "image": image_of(lab), "memory_mib": 256, "pool": POOL, "networks": [{"network": NETWORK}]}
            key = str(uuid.uuid4())
            at = time.time()
            accepted = await api.post("/v1/projects/default/vms", document, key=key)
            sent_at[accepted["operation"]["id"]] = at

    before = [scrape(lab, "trimtab_sql_transactions_total"), scrape(lab, "trimtab_sql_commits_total")]
    meter = Meter({**processes_of(lab), "client": os.getpid()})
    began = time.time()
    await asyncio.gather(*(send(api) for api in apis))
    await _until_idle(apis[0])
    spent = meter.spent()
    after = [scrape(lab, "trimtab_sql_transactions_total"), scrape(lab, "trimtab_sql_commits_total")]
    ended_at = await _ends(apis[0], set(sent_at))
    for api in apis:
        api.close()
    return Outcome(
        count=count,
        seconds=max(ended_at.values()) - began,
        latencies_s=tuple(ended_at[operation_id] - at for operation_id, at in sent_at.items()),
        spent=spent,
        transactions=after[0] - before[0],
        commits=after[1] - before[1],
    )


async def _until_idle(api: Connection) -> None:
    """Wait until no operation is live; one short question a quarter of a second."""
    deadline = time.monotonic() + TIMEOUT_S
    while (await api.get("/v1/operations?done=false&page_size=1"))["items"]:
        if time.monotonic() > deadline:
            raise SystemExit(f"not every create ended within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(POLL_S)


async def _ends(api: Connection, operation_ids: set[str]) -> dict[str, float]:
    """Return when each operation ended; SystemExit where one is not done."""
    found: dict[str, float] = {}
    token = ""
    while len(found) < len(operation_ids):
        page = await api.get(f"/v1/operations?page_size=500&page_token={token}")
        for one in page["items"]:
            if one["id"] in operation_ids:
                if one["state"] != "done":
                    raise SystemExit(f"{one['id']} ended as {one['state']}: {one.get('error')}")
                found[one["id"]] = datetime.fromisoformat(one["ended_at"]).timestamp()
        token = page["next_page_token"]
        if not token:
            break
    return found


def report(outcome: Outcome, idle: Spent, bare: Spent, bare_s: float, load: str) -> str:
    """Return the tables."""
    count, cores = outcome.count, os.cpu_count() or 1
    ours, bares = outcome.spent.above(idle), bare.above(idle)
    costs = [["CPU-ms per create, above idle", "Trimtab", "bare commands", "idle, CPU-ms per s"]]
    for name, spent_ms in sorted(ours.cpu_ms.items(), key=lambda one: -one[1]):
        beside = f"{bares.cpu_ms[name] / count:.2f}" if name in bares.cpu_ms else ""
        costs.append([name, f"{spent_ms / count:.2f}", beside, f"{idle.cpu_ms.get(name, 0.0) / idle.wall_s:.0f}"])
    all_ms, bare_ms = sum(ours.cpu_ms.values()) / count, sum(bares.cpu_ms.values()) / count
    idle_ms_s = sum(idle.cpu_ms.values()) / idle.wall_s
    costs.append(
        ["control plane alone", f"{ours.control_plane_ms() / count:.2f}", "", f"{idle.control_plane_ms() / idle.wall_s:.0f}"]
    )
    costs.append(["everything", f"{all_ms:.2f}", f"{bare_ms:.2f}", f"{idle_ms_s:.0f}"])
    room = 1000 * cores - idle_ms_s
    latency = [quantile(outcome.latencies_s, share) for share in (0.5, 0.99)]
    per_s, bare_per_s = outcome.per_s, count / bare_s
    figures = [
        ["", "Trimtab", "bare commands", "ratio", "goal"],
        ["creates/s, request to done", f"{per_s:.0f}", f"{bare_per_s:.0f}", f"{per_s / bare_per_s:.2f}", f"{GOAL_PER_S:.0f}"],
        [
            f"creates/s that {cores} cores have CPU for",
            f"{room / all_ms:.0f}",
            f"{room / bare_ms:.0f}",
            f"{bare_ms / all_ms:.2f}",
            "",
        ],
        ["SQL transactions per create", f"{outcome.transactions / count:.1f}", "2.0", "", ""],
        ["SQL commits per create", f"{outcome.commits / count:.2f}", "2.0", "", ""],
        ["latency p50, s", f"{latency[0]:.2f}", "", "", ""],
        ["latency p99, s", f"{latency[1]:.2f}", "", "", ""],
    ]
    title = f"Creates end to end: {count} vms, {HOSTS} simulated hosts, {load}"
    return "\n".join([table(title, figures), "", table("Who spends it", costs)])


def goals_of(outcome: Outcome) -> list[Goal]:
    return [Goal("creates/s, request to done", outcome.per_s, GOAL_PER_S, is_least=True)]


def run(lab: SimulatedLab, *, count: int, connections: int) -> tuple[Outcome, str]:
    """Measure both sides on a fleet that is up; return ours, and the report on both."""
    load = load_note()
    asyncio.run(create_all(lab, WARM_UP, connections))
    meter = Meter(processes_of(lab))
    time.sleep(IDLE_S)
    idle = meter.spent()
    outcome = asyncio.run(create_all(lab, count, connections))
    meter = Meter({"simulated hosts": processes_of(lab)["simulated hosts"], "client": os.getpid()})
    with tempfile.TemporaryDirectory() as directory:
        bare_s = create_bare(lab, count, Path(directory))
    return outcome, report(outcome, idle, meter.spent(), bare_s, load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()
    with simulated_fleet() as lab:
        outcome, told = run(lab, count=arguments.vms, connections=arguments.connections)
    sys.stdout.write(told + "\n")
    end(goals_of(outcome))


if __name__ == "__main__":
    main()
