"""Durable placements: pending requests in the database to hosts claimed and committed, through the leader's own loop, without the API.

    python tests/bench/bench_placement_durable.py [--vms 2000] [--hosts 300] [--databases sqlite postgresql]

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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.bench.postgres import private_server
from trimtab_controller.clock import SystemClock, mint
from trimtab_controller.loops import placement as placement_loop
from trimtab_controller.loops.placement import PlacementLoop
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import hosts, leases, migrate, placements, schema
from trimtab_controller.store.database import Database, Session

GIB = 1 << 30
GOAL_PER_S = 2000.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def found(db: Database, host_count: int) -> tuple[int, dict[str, str]]:
    """Insert a project, hosts that are up, a shared pool and a network; return the leader's term and the ids."""
    ids = {kind: mint(kind) for kind in ("proj", "hc", "pool", "net")}

    def work(session: Session) -> int:
        session.execute(schema.project.insert().values(id=ids["proj"], name="default", created_at=NOW))
        hosts.insert_class(session, host_class_id=ids["hc"], name=hosts.DEFAULT_CLASS, now=NOW)
        classes = schema.host_class.update().where(schema.host_class.c.id == ids["hc"])
        session.execute(classes.values(machine="pc-q35-7.2", cpu_model="EPYC"))
        pool = {"name": "nfs", "kind": "dir", "path": "/srv/nfs", "is_shared": True, "settings": {}}
        session.execute(schema.pool.insert().values(id=ids["pool"], sharing_proven_at=NOW, created_at=NOW, **pool))
        space = {"capacity_bytes": 10**7 * GIB, "available_bytes": 10**7 * GIB, "claimed_bytes": 0}
        session.execute(schema.pool_space.insert().values(pool_id=ids["pool"], host_id="", observed_at=NOW, **space))
        for number in range(host_count):
            _host(session, f"host-{number:05}", number, ids)
        taken = leases.take(session, leases.ENGINE, owner="bench", seen=None, ttl_ms=10**9, now=NOW)
        assert taken is not None
        return taken.term

    return db.write(work), ids


def _host(session: Session, host_id: str, number: int, ids: dict[str, str]) -> None:
    inventory = {"machines": ["pc-q35-7.2"], "usable_cpu_models": ["EPYC"], "arch": "x86_64", "accelerator": "kvm"}
    session.execute(
        schema.host.insert().values(
            id=host_id,
            name=f"node{number}",
            host_class_id=ids["hc"],
            labels={"zone": f"z{number % 3}"},
            agent_address="",
            migration_address="",
            machine_id=host_id,
            smbios_uuid=host_id,
            connectivity="up",
            connectivity_at=NOW,
            inventory={**_INVENTORY, **inventory},
            inventory_digest=f"digest-{number % 4}-{host_id}",
            vcpus_limit=100_000,
            memory_limit_mib=10**9,
            created_at=NOW,
        )
    )
    session.execute(schema.pool_host.insert().values(pool_id=ids["pool"], host_id=host_id, state="ready", observed_at=NOW))


_INVENTORY = {
    "hostname": "node",
    "machine_id": "m",
    "smbios_uuid": "u",
    "boot_id": "b",
    "kernel": "6.1",
    "agent_version": "1",
    "libvirt_version": "9",
    "qemu_version": "7.2",
    "cpu_vendor": "AMD",
    "cpu_model": "EPYC",
    "cpus": 64,
    "memory_mib": 256 * 1024,
}


def ask(db: Database, ids: dict[str, str], count: int, rng: random.Random) -> None:
    """Queue the requests of `count` new vms."""

    def work(session: Session) -> None:
        for number in range(count):
            _vm(session, ids, number, rng)

    db.write(work)


def _vm(session: Session, ids: dict[str, str], number: int, rng: random.Random) -> None:
    vm_id, operation_id = mint("vm"), mint("op")
    size = {"vcpus": rng.choice([1, 2, 4, 8]), "memory_mib": rng.choice([1792, 3584, 7168, 14336])}
    empty: dict[str, Any] = {"labels": {}, "cpu_features": [], "device_addresses": {}, "seed": {}, "host_selector": {}}
    session.execute(
        schema.vm.insert().values(
            id=vm_id,
            uuid=vm_id[-36:],
            project_id=ids["proj"],
            name=f"vm{number}-{operation_id[-8:]}",
            arch="x86_64",
            vcpus_max=size["vcpus"],
            memory_max_mib=size["memory_mib"],
            firmware="bios",
            desired_power="running",
            observed_state="absent",
            observed_addresses=[],
            created_at=NOW,
            **size,
            **empty,
        )
    )
    session.execute(
        schema.volume.insert().values(
            id=mint("vol"),
            project_id=ids["proj"],
            name=f"{vm_id}-root",
            pool_id=ids["pool"],
            vm_id=vm_id,
            disk_index=0,
            format="qcow2",
            size_bytes=10 * GIB,
            observed_state="absent",
            created_at=NOW,
        )
    )
    session.execute(
        schema.operation.insert().values(
            id=operation_id,
            kind="vm.create",
            saga_version=1,
            project_id=ids["proj"],
            subject_id=vm_id,
            subject_name=f"vm{number}",
            is_exclusive=False,
            state="waiting",
            params={},
            next_run=NOW,
            actor="bench",
            request_id="",
            created_at=NOW,
            updated_at=NOW,
        )
    )
    placements.ask(
        session,
        operation_id=operation_id,
        vm_id=vm_id,
        project_id=ids["proj"],
        kind="create",
        to_host_id="",
        previous_host_id="",
        now=NOW,
    )


def measure(url: str, *, vm_count: int, host_count: int, together: int) -> dict[str, Any]:
    migrate.upgrade(url)
    db = Database(url)
    rng = random.Random(7)
    term, ids = found(db, host_count)
    loop = PlacementLoop(db=db, clock=SystemClock(), nudger=Nudger(lambda: None), rng=rng)
    ask(db, ids, vm_count, rng)
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


if __name__ == "__main__":
    main()
