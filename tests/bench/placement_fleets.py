"""Fleets and requests for the placement benchmarks: synthetic ones with every kind of rule, and real ones where a trace is there."""

import csv
import gzip
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    DiskNeed,
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    GroupSnapshot,
    HostSnapshot,
    NetworkNeed,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
    Relation,
    Stock,
    Taint,
    Toleration,
)

GIB = 1 << 30
# Sizes as Azure's vms had them (its 2017 trace), with how often each came: thousandths of a cpu, MiB.
SHAPES = (
    (1000, 1792, 15644),
    (2000, 3584, 4801),
    (4000, 7168, 2570),
    (8000, 14336, 2332),
    (1000, 768, 411),
    (8000, 57344, 143),
    (4000, 28672, 5),
    (2000, 14336, 5),
    (2000, 4096, 2),
    (4000, 8192, 2),
    (16000, 114688, 1),
)

Pools = list[PoolSnapshot]


def make_fleet(count: int, rng: random.Random) -> tuple[list[HostSnapshot], Pools]:
    """Return hosts between empty and nearly full, in three zones and racks of 40; some cordoned, tainted, kept for a project,
    with devices, or with a pool or network that is not ready."""
    models, machines = frozenset({"EPYC", "EPYC-Rome", "qemu64"}), frozenset(f"pc-q35-{major}.2" for major in range(2, 10))
    hosts = [
        HostSnapshot(
            host_id=f"host-{i:06}",
            name=f"node{i:06}",
            vcpus_limit=256,
            memory_limit_mib=256 * 1024,
            vcpus_claimed=rng.randrange(240),
            memory_claimed_mib=rng.randrange(240) * 1024,
            unmanaged_vcpus=rng.choice([0, 0, 2]),
            labels={"zone": f"z{i % 3}", "rack": f"r{i // 40}"},
            host_class="default",
            class_cpu_model="EPYC",
            class_machine="pc-q35-7.2",
            is_cordoned=rng.random() < 0.02,
            connectivity=HostConnectivity.LOST if rng.random() < 0.01 else HostConnectivity.UP,
            arch="x86_64",
            accelerator="kvm",
            usable_cpu_models=models,
            cpu_features=frozenset({"aes", "avx2"}),
            machines=machines,
            has_uefi=rng.random() < 0.9,
            pools={"pool-local": rng.random() < 0.99, "pool-nfs": True},
            networks={"net-1": NetworkReach(True, 1500), "net-2": NetworkReach(rng.random() < 0.98, 9000)},
            taints=rng.choice([frozenset()] * 8 + [frozenset({Taint("old")}), frozenset({Taint("gpu")})]),
            exclusive_project_id="proj-1" if rng.random() < 0.02 else "",
            devices={"gpu": Stock(4, rng.randrange(4))} if rng.random() < 0.3 else {},
            resources={"licence": Stock(8, rng.randrange(8))},
        )
        for i in range(count)
    ]
    local = {host.host_id: PoolPlace(1000 * GIB, 1000 * GIB, rng.randrange(1000) * GIB) for host in hosts}
    pools = [
        PoolSnapshot(pool_id="pool-local", name="local", is_shared=False, reserve_permille=50, places=local),
        PoolSnapshot(pool_id="pool-nfs", name="nfs", is_shared=True, places={"": PoolPlace(GIB * 10**7, GIB * 10**7, 0)}),
    ]
    return hosts, pools


def make_groups(hosts: list[HostSnapshot], count: int, rng: random.Random) -> list[GroupSnapshot]:
    """Return groups of five members each somewhere in the fleet."""
    return [
        GroupSnapshot(group_id=f"grp-{i}", members={f"vm-old-{i}-{j}": rng.choice(hosts).host_id for j in range(5)})
        for i in range(count)
    ]


def snapshot(count: int, rng: random.Random) -> tuple[FleetSnapshot, list[HostSnapshot], Pools, list[GroupSnapshot]]:
    hosts, pools = make_fleet(count, rng)
    groups = make_groups(hosts, 50, rng)
    return FleetSnapshot.of(hosts, pools, groups=groups), hosts, pools, groups


_APART = (
    GroupRule(relation=Relation.APART),
    GroupRule(relation=Relation.APART, domain="rack", limit=2),
    GroupRule(relation=Relation.APART, domain="zone", is_must=False),
)


def with_everything(count: int, rng: random.Random) -> list[PlacementRequest]:
    """Return requests that each ask for something of every kind, no two of the same size."""
    return [
        PlacementRequest(
            request_id=f"op-{i:06}",
            vm_id=f"vm-{i:06}",
            vm_name=f"vm{i}",
            project_id=f"proj-{rng.randrange(20)}",
            kind=PlacementKind.CREATE,
            vcpus=rng.randint(1, 16),
            memory_mib=256 * rng.randint(1, 200),
            disks=(
                DiskNeed(name="root", pool_id="pool-local", size_bytes=rng.randint(1, 80) * GIB),
                DiskNeed(name="log", pool_id="pool-nfs", size_bytes=GIB),
            ),
            networks=(NetworkNeed(network_id="net-1", name="a"), NetworkNeed(network_id="net-2", name="b", mtu=9000)),
            arch="x86_64",
            cpu_model="EPYC",
            cpu_features=("aes",),
            machine="pc-q35-7.2",
            host_selector={"zone": f"z{rng.randrange(3)}"} if rng.random() < 0.5 else {},
            host_class="default",
            tolerations=(Toleration("gpu"),),
            devices={"gpu": 1} if rng.random() < 0.2 else {},
            resources={"licence": 1},
            group=GroupNeed(group_id=f"grp-{rng.randrange(50)}", name="web", rules=_APART),
            order=i,
        )
        for i in range(count)
    ]


def mixed(count: int, rng: random.Random, *, distinct_sizes: bool = False) -> list[PlacementRequest]:
    """Return requests of real sizes: half plain, a third in a zone with a disk, the rest in groups, tolerant or asking for a device.

    `distinct_sizes`: instead each has vcpus, memory and a disk of a size of its own.
    """
    requests = [_mixed(i, rng) for i in range(count)]
    return [_resized(request, rng) for request in requests] if distinct_sizes else requests


def _resized(request: PlacementRequest, rng: random.Random) -> PlacementRequest:
    disks = tuple(replace(disk, size_bytes=rng.randint(GIB, 80 * GIB)) for disk in request.disks)
    return replace(request, vcpus=rng.randint(1, 16), memory_mib=rng.randint(512, 64 * 1024), disks=disks)


def _mixed(i: int, rng: random.Random) -> PlacementRequest:
    cpu_millis, memory_mib, _ = rng.choices(SHAPES, weights=[shape[2] for shape in SHAPES])[0]
    kind = rng.random()
    is_grouped, is_special = kind < 0.08, 0.08 <= kind < 0.18
    return PlacementRequest(
        request_id=f"op-{i:06}",
        vm_id=f"vm-{i:06}",
        vm_name=f"vm{i}",
        project_id=f"proj-{rng.randrange(2)}",
        kind=PlacementKind.CREATE,
        vcpus=cpu_millis // 1000,
        memory_mib=memory_mib,
        disks=(DiskNeed(name="root", pool_id="pool-local", size_bytes=20 * GIB),) if kind < 0.5 else (),
        networks=(NetworkNeed(network_id="net-1", name="a"),),
        cpu_model="EPYC",
        machine="pc-q35-7.2",
        host_selector={"zone": f"z{rng.randrange(3)}"} if 0.18 <= kind < 0.5 else {},
        tolerations=(Toleration("gpu"),) if is_special else (),
        devices={"gpu": 1} if is_special else {},
        group=GroupNeed(group_id=f"grp-{rng.randrange(50)}", name="web", rules=_APART[:1]) if is_grouped else None,
        order=i,
    )


def plain(count: int, rng: random.Random, *, distinct_sizes: bool = False, vcpu: int = 1000) -> list[PlacementRequest]:
    """Return requests for vcpus and memory alone: of real sizes, or each of a size of its own. `vcpu`: how hosts count a whole cpu."""
    sizes = [shape[:2] for shape in rng.choices(SHAPES, weights=[shape[2] for shape in SHAPES], k=count)]
    if distinct_sizes:
        sizes = [(rng.randint(500, 16_000), rng.randint(512, 64 * 1024)) for _ in range(count)]
    sizes = [(max(1, cpu_millis * vcpu // 1000), memory_mib) for cpu_millis, memory_mib in sizes]
    return [
        PlacementRequest(
            request_id=f"op-{i:06}",
            vm_id=f"vm-{i:06}",
            vm_name=f"vm{i}",
            project_id=f"proj-{i % 20}",
            kind=PlacementKind.CREATE,
            vcpus=vcpus,
            memory_mib=memory_mib,
            order=i,
        )
        for i, (vcpus, memory_mib) in enumerate(sizes)
    ]


def empty_hosts(count: int) -> list[HostSnapshot]:
    """Return hosts of 64 cpus (in thousandths) and 256 GiB."""
    return [
        HostSnapshot(host_id=f"host-{i:06}", name=f"node{i:06}", vcpus_limit=64_000, memory_limit_mib=256 * 1024)
        for i in range(count)
    ]


def trace_rows() -> tuple[str, Iterator[tuple[float, bool, str, int, int, str]]]:
    """Return where the trace is from, and its rows: seconds, is a creation, vm, thousandths of a cpu, MiB, batch.

    `TRIMTAB_TRACES` names a directory with `azure-2017-dev.csv.gz`; without it the trace is made up, and the name says so.
    """
    directory = os.environ.get("TRIMTAB_TRACES", "")
    path = Path(directory) / "azure-2017-dev.csv.gz"
    if directory and path.exists():
        return path.name, _read(path)
    return "synthetic stand-in (set TRIMTAB_TRACES to a directory with azure-2017-dev.csv.gz)", iter(_synthetic(random.Random(7)))


def _read(path: Path) -> Iterator[tuple[float, bool, str, int, int, str]]:
    with gzip.open(path, "rt", newline="") as lines:
        for row in csv.DictReader(lines):
            yield float(row["t_s"]), row["op"] == "1", row["vm"], int(row["cpu_millis"]), int(row["memory_mib"]), row["batch"]


def _synthetic(rng: random.Random) -> list[tuple[float, bool, str, int, int, str]]:
    """Return four days of arrivals with real sizes and lifetimes from minutes to days, sorted by time."""
    rows, now_s = [], 0.0
    for i in range(30_000):
        now_s += rng.expovariate(1 / 12)
        cpu_millis, memory_mib, _ = rng.choices(SHAPES, weights=[shape[2] for shape in SHAPES])[0]
        life_s = min(rng.lognormvariate(8, 2), 10 * 86_400)
        rows.append((now_s, True, str(i), cpu_millis, memory_mib, str(i // 3)))
        rows.append((now_s + life_s, False, str(i), cpu_millis, memory_mib, str(i // 3)))
    return sorted(row for row in rows if row[0] <= now_s)
