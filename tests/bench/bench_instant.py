"""Instant restores to running guests on a real host, beside bare libvirt's definition and start of the same guest on a whole disk.

    python -m tests.bench.bench_instant [--runs 5]          as root; two libvirt hosts in namespaces, about two minutes

Ours: from the request until the operation is done, that is until QEMU runs the guest on its backup: rows, placement, the export, a layer
over it, definition, start. Bare: define and start of the same definition, on a disk that is there. The goal is absolute: 1 s, whatever
the disk's size; so both a small disk and one of 32 GiB are restored. Each is filled afterwards, which is not measured, and deleted.
Ends with 1 where the goal is missed.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.accounts import load_note, table
from tests.bench.bench_lab import HOSTS, PATIENCE_S, POLL_S, POOLS, Bench, real_lab
from tests.bench.goals import Goal, end
from tests.bench.rest import Connection

GOAL_S = 1.0
SIZES_GIB = (1, 32)
VMS, BACKUPS = "/v1/projects/default/vms", "/v1/projects/default/backups"
REPOSITORY = "file:///srv/trimtab-shared/backup"


class InstantBench(Bench):
    """Guests come back on the host where the repository's folder and both pools are."""

    async def run(self, runs: int) -> None:
        await self.api.open()
        for size_gib in SIZES_GIB:
            backup = await self._backed_up(f"source{size_gib}", size_gib)
            for number in range(runs + 1):
                await self._compare(backup, f"back{size_gib}-{number}", size_gib=size_gib, counts=number > 0)
            sys.stdout.write(f"steps of the last, {size_gib} GiB: {await steps_of(self.api, f'back{size_gib}-{runs}')}\n")
        self.api.close()

    async def _backed_up(self, name: str, size_gib: int) -> str:
        """Return the id of a backup of a guest that ran for a moment."""
        await self._operation("POST", VMS, {
            "name": name, "image": "micro", "memory_mib": 96, "pool": "shared", "to_host": HOSTS[0], "disk_bytes": size_gib << 30,
            "networks": [{"network": "default"}],
        })  # fmt: skip
        await self._operation("POST", BACKUPS, {"vm": name})
        await self._operation("POST", f"{VMS}/{name}:stop", {"force": True})
        found = await self.api.get(f"{BACKUPS}?filter=vm%3D{name}")
        return str(found["items"][0]["id"])

    async def _compare(self, backup: str, name: str, *, size_gib: int, counts: bool) -> None:  # type: ignore[override]
        ask = {"name": name, "to_host": HOSTS[0], "instant": True}
        took = await self._operation("POST", f"{BACKUPS}/{backup}:restore", ask)
        vm = await self.api.get(f"{VMS}/{name}")
        if vm["observed"]["state"] != "running":
            raise SystemExit(f"{name} is {vm['observed']} right after its instant restore")
        await self._filled(name)
        document = str(self._on(HOSTS[0], "xml", f"trimtab-{vm['id']}")["xml"])
        await self._operation("POST", f"{VMS}/{name}:stop", {"force": True})
        bare = self._start_bare(document, vm["id"])
        await self._operation("DELETE", f"{VMS}/{name}", None)
        if counts:
            self.ours[f"instant restore, {size_gib} GiB"].append(took)
            self.bare[f"instant restore, {size_gib} GiB"].append(bare)

    async def _filled(self, name: str) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            fills = (await self.api.get("/v1/operations?filter=kind%3Dvm.fill&page_size=200"))["items"]
            mine = [one for one in fills if one["subject"]["name"] == name]
            if mine and all(one["done"] for one in mine):
                return
            if asyncio.get_running_loop().time() > deadline:
                raise SystemExit(f"the disks of {name} are not filled: {mine}")
            await asyncio.sleep(POLL_S)

    def _start_bare(self, document: str, vm_id: str) -> float:
        """Define and start the same guest by libvirt alone, on the disk that was filled, and remove it again."""
        plain = re.sub(r"<metadata>.*?</metadata>", "", document, flags=re.DOTALL).replace(f"trimtab-{vm_id}", "bare")
        plain = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid.uuid4()}</uuid>", plain)
        self.plane.lab.spec.host(HOSTS[0]).path_on_machine("/var/lib/trimtab").joinpath("bare.xml").write_text(plain)
        took = float(self._on(HOSTS[0], "start", "/var/lib/trimtab/bare.xml")["seconds"])
        self._on(HOSTS[0], "remove", "bare", f"{POOLS['shared']}/volumes/none.qcow2")
        return took


def make_repository(plane: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-key-") as folder:
        plane.trimtab(
            "backup", "repo", "create", "main", "--url", REPOSITORY, "--key-file", str(Path(folder) / "key"), timeout_s=PATIENCE_S
        )


async def steps_of(api: Connection, name: str) -> str:
    """Return how long each step of the newest instant restore of this name took."""
    found = (await api.get("/v1/operations?filter=kind%3Dvm.restore&page_size=200"))["items"]
    [mine] = [one for one in found if one["subject"]["name"] == name]
    shown = await api.get(f"/v1/operations/{mine['id']}")
    at, parts = datetime.fromisoformat(shown["created_at"]), []
    for step in shown.get("steps", ()):
        ended = datetime.fromisoformat(step["at"])
        parts.append(f"{step['step']} {(ended - at).total_seconds():.3f}")
        at = ended
    return ", ".join(parts)


def goals_of(ours: Mapping[str, Sequence[float]]) -> list[Goal]:
    return [Goal(f"{what}, median s", median(took), GOAL_S) for what, took in ours.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    if os.geteuid() != 0:
        raise SystemExit("bench_instant needs root: real libvirt hosts live in namespaces")
    with real_lab() as plane:
        make_repository(plane)
        load = load_note()
        bench = InstantBench(
            plane, Connection(plane.url, plane.authority_file, plane.token_file), defaultdict(list), defaultdict(list)
        )
        asyncio.run(bench.run(runs))
    rows = [["medians, seconds", "Trimtab", "longest", "bare libvirt", "ratio", "goal"]]
    for what in bench.ours:
        ours, bare = median(bench.ours[what]), median(bench.bare[what])
        rows.append([what, f"{ours:.3f}", f"{max(bench.ours[what]):.3f}", f"{bare:.3f}", f"{ours / bare:.1f}", f"{GOAL_S:g} s"])
    sys.stdout.write(table(f"Instant restores to running guests, {runs} runs each, {load}", rows) + "\n")
    end(goals_of(bench.ours))


if __name__ == "__main__":
    main()
