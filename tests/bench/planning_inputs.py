"""Inputs of the planning benchmark: generated fleets, and real traces where they are present."""

import csv
import gzip
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement import (
    DiskNeed,
    FleetSnapshot,
    HostSnapshot,
    NetworkNeed,
    NetworkReach,
    PlacementKind,
    PlacementRequest,
    PoolPlace,
    PoolSnapshot,
)
from trimtab_controller.core.planning.estate import Estate, VmSnapshot

Floats = npt.NDArray[np.float64]
SHAPES = [(1, 2), (2, 4), (2, 8), (4, 8), (4, 16), (8, 32)]
VCPUS, MEMORY_MIB = 128, 250 * 1024


def traces() -> Path | None:
    """Return the folder of traces that `TRIMTAB_TRACES` names; None where it is not there."""
    named = os.environ.get("TRIMTAB_TRACES", "")
    return Path(named) if named and Path(named).is_dir() else None


def planetlab(folder: Path) -> list[tuple[str, Floats]]:
    """Return each day's shares of a core, vms by 288 samples of five minutes."""
    found = []
    for path in sorted(folder.glob("planetlab-*.csv.gz")):
        with gzip.open(path, "rt") as lines:
            rows = [row[1:289] for row in csv.reader(lines) if len(row) >= 289]
        found.append((path.name.split("-")[1].split(".")[0], np.array(rows, dtype=np.float64) / 100))
    return found


def synthetic_days(rng: np.random.Generator) -> list[tuple[str, Floats]]:
    """Return two days of vms whose load has a daily wave, jumps and noise: a stand-in for real days."""
    found = []
    for day in ("synthetic-1", "synthetic-2"):
        time = np.arange(288) / 288
        level = rng.gamma(1.2, 0.12, size=(1200, 1))
        wave = 1 + rng.uniform(0, 0.8, size=(1200, 1)) * np.sin(2 * np.pi * (time + rng.uniform(size=(1200, 1))))
        jumps = np.repeat(rng.choice([0.5, 1.0, 1.0, 2.0], size=(1200, 24)), 12, axis=1)
        noise = rng.normal(0, 0.04, size=(1200, 288))
        found.append((day, np.clip(level * wave * jumps + noise, 0, 1)))
    return found


def make_estate(host_count: int, vm_count: int, seed: int, *, loads: bool = False) -> Estate:
    """Return a fleet in three zones and racks of twenty, vms spread at random; a quarter of them bound to their zone."""
    rng = random.Random(seed)
    used: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    vms = []
    while len(vms) < vm_count:
        row, (vcpus, gib) = rng.randrange(host_count), rng.choice(SHAPES)
        if used[row][0] + vcpus > VCPUS or used[row][1] + gib * 1024 > MEMORY_MIB:
            continue
        used[row][0] += vcpus
        used[row][1] += gib * 1024
        vms.append(_vm(len(vms), row, vcpus, gib * 1024, rng, loads=loads))
    hosts = [_host(row, *used[row]) for row in range(host_count)]
    nfs = PoolSnapshot(pool_id="nfs", name="nfs", is_shared=True, places={"": PoolPlace(1 << 60, 1 << 60, 0)})
    fleet = FleetSnapshot.of(hosts, [nfs])
    return Estate.of(fleet, vms, cpu_millis={host.host_id: 64_000 for host in hosts})


def _vm(number: int, row: int, vcpus: int, memory_mib: int, rng: random.Random, *, loads: bool) -> VmSnapshot:
    request = PlacementRequest(
        request_id=f"plan-{number}",
        vm_id=f"vm-{number:06}",
        vm_name=f"vm{number:06}",
        project_id=f"proj-{number % 20}",
        kind=PlacementKind.MIGRATE,
        vcpus=vcpus,
        memory_mib=memory_mib,
        disks=(DiskNeed(name="root", pool_id="nfs", size_bytes=1 << 34, is_claimed=True),),
        networks=(NetworkNeed(network_id="net-1", name="a"),),
        arch="x86_64",
        cpu_model="EPYC",
        machine="pc-q35-7.2",
        host_selector={"zone": f"z{row % 3}"} if number % 4 == 0 else {},
    )
    # Every tenth host is busier than the rest: something to even out.
    busy = 1.6 if row % 10 == 0 else 0.7
    load = int(vcpus * 1000 * min(1.0, rng.betavariate(1.2, 3) * busy)) if loads else 0
    return VmSnapshot(vm_id=request.vm_id, name=request.vm_name, host_id=f"host-{row:05}", request=request, load_millis=load)


def _host(row: int, vcpus: int, memory_mib: int) -> HostSnapshot:
    return HostSnapshot(
        host_id=f"host-{row:05}",
        name=f"node{row:05}",
        vcpus_limit=VCPUS,
        memory_limit_mib=MEMORY_MIB,
        vcpus_claimed=vcpus,
        memory_claimed_mib=memory_mib,
        labels={"zone": f"z{row % 3}", "rack": f"r{row // 20}"},
        arch="x86_64",
        usable_cpu_models=frozenset({"EPYC", "qemu64"}),
        machines=frozenset({"pc-q35-7.2", "pc-q35-8.0"}),
        pools={"nfs": True},
        networks={"net-1": NetworkReach(True, 1500)},
    )


class GanetiInput:
    """A text input of Ganeti's htools: nodes and instances, as read and as written back with other primaries."""

    def __init__(self, text: str) -> None:
        self._parts = text.split("\n\n")
        self.nodes = [line.split("|") for line in self._parts[1].splitlines() if line]
        self.instances = [line.split("|") for line in self._parts[2].splitlines() if line]

    @classmethod
    def read(cls, path: Path) -> "GanetiInput":
        with gzip.open(path, "rt") as file:
            return cls(file.read())

    @classmethod
    def generate(cls, node_count: int, seed: int) -> "GanetiInput":
        """Return a stand-in for the saved inputs: 30% of the nodes hold about 90% of their memory in vms."""
        rng = random.Random(seed)
        nodes, instances = [], []
        for row in range(node_count):
            fill_mib = int(262144 * (rng.uniform(0.83, 0.97) if row < node_count * 0.3 else rng.uniform(0.05, 0.25)))
            used = 4096
            while used < fill_mib:
                gib, disk, cpus = rng.choice([(1, 20480, 1), (2, 40960, 1), (4, 51200, 2), (8, 102400, 4), (16, 204800, 8)])
                name = f"vm{len(instances):06}"
                line = f"{name}|{gib * 1024}|{disk}|{cpus}|running|Y|n{row:05}||ext||1|{disk}|N"
                instances.append(line)
                used += gib * 1024
            free = max(0, 262144 - used)
            nodes.append(f"n{row:05}|262144|4096|{free}|4194304|4194304|64|{'M' if row == 0 else 'N'}|uuid-g1|1||N|0|1|1.0")
        spec = "8192,4,102400,1,1,1|128,1,1024,1,1,1;131072,32,1048576,16,8,12"
        templates = "diskless,file,sharedfile,plain,blockdev,drbd,rbd,ext,gluster|4.0|32.0"
        policy = f"|{spec}|{templates}\ngroup-01|{spec}|{templates}\n"
        return cls("\n\n".join(["group-01|uuid-g1|preferred||", "\n".join(nodes), "\n".join(instances), "", policy]))

    def text(self) -> str:
        parts = list(self._parts)
        parts[1] = "\n".join("|".join(node) for node in self.nodes)
        parts[2] = "\n".join("|".join(instance) for instance in self.instances)
        return "\n\n".join(parts)

    def estate(self) -> Estate:
        """Return the nodes as hosts with their own ratio of vcpus, and the instances as vms on shared storage."""
        by_node: defaultdict[str, list[list[str]]] = defaultdict(list)
        for instance in self.instances:
            by_node[instance[6]].append(instance)
        hosts = [
            HostSnapshot(
                host_id=node[0],
                name=node[0],
                vcpus_limit=int(node[6]) * 4,
                memory_limit_mib=int(node[1]) - int(node[2]),
                vcpus_claimed=sum(int(one[3]) for one in by_node[node[0]]),
                memory_claimed_mib=int(node[1]) - int(node[2]) - int(node[3]),
            )
            for node in self.nodes
        ]
        vms = [
            VmSnapshot(vm_id=one[0], name=one[0], host_id=one[6], request=shape_request(int(one[3]), int(one[1]), one[0]))
            for one in self.instances
        ]
        return Estate.of(FleetSnapshot.of(hosts), vms)


def shape_request(vcpus: int, memory_mib: int, name: str = "new") -> PlacementRequest:
    return PlacementRequest(
        request_id=name,
        vm_id=name,
        vm_name=name,
        project_id="proj-a",
        kind=PlacementKind.MIGRATE if name != "new" else PlacementKind.CREATE,
        vcpus=vcpus,
        memory_mib=memory_mib,
    )
