"""Linked clones and snapshots of real guests whose disks differ thirtyfold, beside `qemu-img create` on the same host.

    python -m tests.bench.bench_clone [--runs 3]          as root; two libvirt hosts in namespaces, about two minutes

Clone: from the request until the operation is done: a snapshot of the running source, a layer over it, the definition. Bare: one
`qemu-img create` of an overlay over the same file, which a clone cannot do without. The goal is absolute, since the rest is the
control plane's: 1 s, whatever the disk's size. Ends with 1 where it is missed.
"""

import argparse
import asyncio
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from tests.bench.accounts import load_note, table
from tests.bench.bench_lab import HOSTS, POOLS, Bench, real_lab
from tests.bench.goals import Goal, end
from tests.bench.rest import Connection

SIZES_GIB = (1, 8, 32)
GOAL_S = 1.0
VMS = "/v1/projects/default/vms"


class CloneBench(Bench):
    """The sources run; clones stay off, so that what is measured is the making and not a boot."""

    async def run(self, runs: int) -> None:
        await self.api.open()
        for size_gib in SIZES_GIB:
            source = f"source{size_gib}"
            await self._operation("POST", VMS, {
                "name": source, "image": "micro", "memory_mib": 96, "pool": "shared", "to_host": HOSTS[0],
                "disk_bytes": size_gib << 30, "networks": [{"network": "default"}],
            })  # fmt: skip
            for number in range(runs + 1):
                await self._compare(source, f"{source}-{number}", size_gib=size_gib, counts=number > 0)
            await self._operation("POST", f"{VMS}/{source}:stop", {"force": True})
        self.api.close()

    async def _compare(self, source: str, name: str, *, size_gib: int, counts: bool) -> None:  # type: ignore[override]
        took = await self._operation("POST", f"{VMS}/{source}:clone", {"name": name, "linked": True, "start": False})
        snapshot = await self._operation("POST", f"{VMS}/{source}/snapshots", {"name": f"s-{name}"})
        volume = (await self.api.get(f"{VMS}/{source}"))["volumes"][0]["id"]
        bare = self._overlay(volume, size_gib)
        if counts:
            self.ours[f"linked clone, {size_gib} GiB"].append(took)
            self.bare[f"linked clone, {size_gib} GiB"].append(bare)
            self.ours[f"snapshot of a running vm, {size_gib} GiB"].append(snapshot)
            self.bare[f"snapshot of a running vm, {size_gib} GiB"].append(bare)

    def _overlay(self, volume: str, size_gib: int) -> float:
        folder = f"{POOLS['shared']}/volumes"
        make = (
            f"qemu-img create -q -u -f qcow2 -b {folder}/{volume}.qcow2 -F qcow2 {folder}/bare.qcow2 {size_gib}G; "
            f"rm {folder}/bare.qcow2"
        )
        began = time.monotonic()
        self.plane.lab.run(HOSTS[0], ["sh", "-ec", make])
        return time.monotonic() - began


def goals_of(ours: Mapping[str, Sequence[float]]) -> list[Goal]:
    """Snapshots have no goal."""
    return [Goal(f"{what}, median s", median(took), GOAL_S) for what, took in ours.items() if what.startswith("linked")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    if os.geteuid() != 0:
        raise SystemExit("bench_clone needs root: real libvirt hosts live in namespaces")
    with real_lab() as plane:
        load = load_note()
        bench = CloneBench(
            plane, Connection(plane.url, plane.authority_file, plane.token_file), defaultdict(list), defaultdict(list)
        )
        asyncio.run(bench.run(runs))
    rows = [["medians, seconds", "Trimtab", "qemu-img create", "ratio", "goal"]]
    for what in bench.ours:
        ours, bare = median(bench.ours[what]), median(bench.bare[what])
        goal = f"{GOAL_S:g} s" if what.startswith("linked") else "-"
        rows.append([what, f"{ours:.3f}", f"{bare:.3f}", f"{ours / bare:.1f}", goal])
    sys.stdout.write(table(f"Clones of running guests, {runs} runs each, {load}", rows) + "\n")
    end(goals_of(bench.ours))


if __name__ == "__main__":
    main()
