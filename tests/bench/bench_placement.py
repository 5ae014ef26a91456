"""CPU time of one placement decision, verdicts kept, against a plain Python loop over the same hosts in the same run.

    python tests/bench/bench_placement.py [--hosts 1000 10000] [--requests 400] [--seed 7]

Every request differs, each sees the claims of those before it, and both sides must choose the same hosts: a run in which they
do not ends with an error. Prints one JSON document; only the ratio means anything on another machine.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    Books,
    Decision,
    DiskNeed,
    FleetSnapshot,
    HostSnapshot,
    NetworkNeed,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    Policy,
    PoolPlace,
    PoolSnapshot,
    decide,
)

GIB = 1 << 30
POLICY = Policy("best-fit-alone", {"best-fit": 1.0})


def make_fleet(count: int, rng: random.Random) -> tuple[list[HostSnapshot], list[PoolSnapshot]]:
    """Return hosts between empty and nearly full, in three zones; some cordoned, some with a pool or network that is not ready."""
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
        )
        for i in range(count)
    ]
    local = {host.host_id: PoolPlace(1000 * GIB, 1000 * GIB, rng.randrange(1000) * GIB) for host in hosts}
    pools = [
        PoolSnapshot(pool_id="pool-local", name="local", is_shared=False, reserve_permille=50, places=local),
        PoolSnapshot(pool_id="pool-nfs", name="nfs", is_shared=True, places={"": PoolPlace(GIB * 10**6, GIB * 10**6, 0)}),
    ]
    return hosts, pools


def make_requests(count: int, rng: random.Random) -> list[PlacementRequest]:
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
            order=i,
        )
        for i in range(count)
    ]


class PlainLoop:
    """What one would write first: all rules and the score for one host after the other. Keeps no reasons."""

    def __init__(self, hosts: Sequence[HostSnapshot], pools: Sequence[PoolSnapshot]) -> None:
        self.hosts = sorted(hosts, key=lambda host: host.name)
        self.vcpus = {host.host_id: host.vcpus_limit - host.vcpus_claimed - host.unmanaged_vcpus for host in hosts}
        self.memory_mib = {host.host_id: host.memory_limit_mib - host.memory_claimed_mib for host in hosts}
        self.local = {host.host_id: pools[0].free_bytes(host.host_id) for host in hosts}
        self.shared = pools[1].free_bytes()

    def place(self, request: PlacementRequest) -> str | None:
        local, shared = request.disks[0].size_bytes, request.disks[1].size_bytes
        best, best_score = None, -1.0
        for host in self.hosts:
            if not self._fits(request, host) or self.local[host.host_id] < local or self.shared < shared:
                continue
            vcpus = (self.vcpus[host.host_id] - request.vcpus) / host.vcpus_limit
            memory = (self.memory_mib[host.host_id] - request.memory_mib) / host.memory_limit_mib
            score = 1.0 - 0.5 * (vcpus * vcpus + memory * memory)
            if score > best_score:
                best, best_score = host.host_id, score
        if best is not None:
            self.vcpus[best] -= request.vcpus
            self.memory_mib[best] -= request.memory_mib
            self.local[best] -= local
            self.shared -= shared
        return best

    def _fits(self, request: PlacementRequest, host: HostSnapshot) -> bool:
        return (
            host.connectivity is HostConnectivity.UP
            and not host.is_cordoned
            and self.vcpus[host.host_id] >= request.vcpus
            and self.memory_mib[host.host_id] >= request.memory_mib
            and host.host_class == request.host_class
            and host.arch == request.arch
            and all(host.labels.get(key) == value for key, value in request.host_selector.items())
            and request.cpu_model in host.usable_cpu_models
            and request.machine in host.machines
            and all(feature in host.cpu_features for feature in request.cpu_features)
            and all(host.pools.get(disk.pool_id, False) for disk in request.disks)
            and all(
                (reach := host.networks.get(need.network_id)) is not None and reach.is_ready and reach.mtu >= need.mtu
                for need in request.networks
            )
        )


def cpu_us(run: Callable[[], object]) -> float:
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / 1000


def store(decision: Decision) -> str:
    return json.dumps(decision.as_json())


def measure(host_count: int, request_count: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    hosts, pools = make_fleet(host_count, rng)
    requests = make_requests(request_count, rng)
    snapshots: list[FleetSnapshot] = []
    build_us = cpu_us(lambda: snapshots.append(FleetSnapshot.of(hosts, pools)))
    books, plain = Books(snapshots[0]), PlainLoop(hosts, pools)
    decisions: list[Decision] = []
    loop_chose: list[str | None] = []

    def decide_and_claim(request: PlacementRequest) -> None:
        decision = decide(books, request, policy=POLICY)
        if decision.chosen_host_id is not None:
            books.claim(request, decision.chosen_host_id)
        decisions.append(decision)

    def loop_and_claim(request: PlacementRequest) -> None:
        loop_chose.append(plain.place(request))

    gc.collect()
    gc.freeze()  # the fleet itself is not garbage: neither side should pay for walking it
    ours = [cpu_us(partial(decide_and_claim, request)) for request in requests]
    stored = [cpu_us(partial(store, decision)) for decision in decisions]
    loop = [cpu_us(partial(loop_and_claim, request)) for request in requests]
    gc.unfreeze()
    if loop_chose != [decision.chosen_host_id for decision in decisions]:
        raise SystemExit("the plain loop chose other hosts: one of the two is wrong")
    placed = sum(decision.chosen_host_id is not None for decision in decisions)
    return {
        "hosts": host_count,
        "requests": request_count,
        "placed": placed,
        "snapshot_cpu_ms": round(build_us / 1000, 2),
        "decision_cpu_us_p50": round(statistics.median(ours), 1),
        "decision_cpu_us_p99": round(statistics.quantiles(ours, n=100)[98], 1),
        "decision_cpu_us_mean": round(statistics.fmean(ours), 1),
        "stored_form_cpu_us_p50": round(statistics.median(stored), 1),
        "plain_loop_cpu_us_p50": round(statistics.median(loop), 1),
        "ratio_p50": round(statistics.median(loop) / statistics.median(ours), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    results = [measure(count, arguments.requests, arguments.seed) for count in arguments.hosts]
    sys.stdout.write(json.dumps({"seed": arguments.seed, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
