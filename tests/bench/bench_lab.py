"""Creates and live migrations of real guests through Trimtab, against bare libvirt calls on the same hosts in the same run.

    python tests/bench/bench_lab.py [--runs 3] [--moves 4]     as root; two libvirt hosts in namespaces, about four minutes

Create: from the request until the operation is done (the guest runs), against clone, define, start by one program on the host.
Migration: from the request until the operation is done, against making the target's disk (where it is copied) and one
`virDomainMigrateToURI3` with the same flags and TLS. Downtime: what libvirt says on the target, for both.
The bare guest has the XML that Trimtab gave its own, without the metadata, on the same image. Runs alternate, each guest is moved
`--moves` times, there and back; medians. Goals: create 1.3x, migration 1.15x, downtime not worse.

By libvirt's own count one move of the same guest takes half as long again as the next, so a second row has what is around that count,
which is all that differs by who asks, and the median count of all moves in it for both.
"""

import argparse
import asyncio
import json
import math
import os
import re
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.accounts import clean_up_when_told_to_end, load_note, table
from tests.bench.goals import Goal, end
from tests.bench.rest import Connection
from trimtab_lab.commands import wait_until
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab

HOSTS = ("node1", "node2")
BARE = str(Path(__file__).with_name("bare_libvirt.py"))
GOALS = {"create": 1.3, "migration, shared disk": 1.15, "migration, disk copied": 1.15}
POOLS = {"shared": "/srv/trimtab-shared", "local": "/srv/trimtab-local"}
PATIENCE_S = 240.0
POLL_S = 1.0
"""Costs the figure nothing: the operation itself records when it ended. Each look takes CPU from the guests that are measured."""
SETTLE_S = 4.0
"""Before a guest moves: it boots, so that both kinds move one that does something."""
REST_S = 1.0
"""Between two moves of one guest."""


@contextmanager
def real_lab() -> Iterator[ControlPlane]:
    """Two real hosts with pools, network and image; everything is removed at the end."""
    clean_up_when_told_to_end()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as directory:
        lab = Lab.named(f"bench-{os.getpid()}", state_directory=Path(directory) / "lab")
        try:
            lab.up(hosts=len(HOSTS))
            plane = ControlPlane(lab)
            plane.start()
            plane.join_hosts()
            if not wait_until(
                lambda: plane.trimtab("host", "list", "-o", "json").count('"up"') >= len(HOSTS), timeout_s=PATIENCE_S
            ):
                raise SystemExit("the hosts did not come up")
            plane.trimtab("pool", "create", "shared", "--path", POOLS["shared"], "--shared", "--wait", timeout_s=PATIENCE_S)
            plane.trimtab("pool", "create", "local", "--path", POOLS["local"], "--wait", timeout_s=PATIENCE_S)
            plane.trimtab("network", "create", "default", "--bridge", "br-guest", "--wait", timeout_s=PATIENCE_S)
            image = str(build_guest_image().qcow2)
            plane.trimtab("image", "import", "micro", image, "--pool", "shared", "--wait", timeout_s=PATIENCE_S)
            yield plane
        finally:
            lab.down()


Times = dict[str, list[float]]


@dataclass(slots=True)
class Bench:
    plane: ControlPlane
    api: Connection
    moves: int
    ours: Times = field(default_factory=lambda: defaultdict(list))
    bare: Times = field(default_factory=lambda: defaultdict(list))

    async def run(self, runs: int) -> None:
        for number in range(runs + 1):
            for pool in POOLS:
                await self._compare(f"{pool}{number}", pool, counts=number > 0)
        self.api.close()

    async def _compare(self, name: str, pool: str, *, counts: bool) -> None:
        """Create and move one guest each way. The first pair only warms caches: replicas of images, channels, certificates."""
        kind = "migration, shared disk" if pool == "shared" else "migration, disk copied"
        ours: Times = defaultdict(list)
        ours["create"].append(await self._create(name, pool))
        vm = await self.api.get(f"/v1/projects/default/vms/{name}")
        await asyncio.sleep(SETTLE_S)
        guest = f"trimtab-{vm['id']}"
        document = str(self._on(HOSTS[0], "xml", guest)["xml"])
        for _source, target in self._ways():
            took_s = await self._operation("POST", f"/v1/projects/default/vms/{name}:migrate", {"to_host": target})
            await self._note_move(ours, kind, took_s, guest, target)
        await self._operation("DELETE", f"/v1/projects/default/vms/{name}", None)
        bare = await self._bare(document, vm["id"], pool, kind)
        if counts:
            for times, all_times in ((ours, self.ours), (bare, self.bare)):
                for what, seconds in times.items():
                    all_times[what] += seconds

    def _ways(self) -> list[tuple[str, str]]:
        return [(HOSTS[number % 2], HOSTS[(number + 1) % 2]) for number in range(self.moves)]

    async def _note_move(self, times: Times, kind: str, took_s: float, guest: str, target: str) -> None:
        seen = self._on(target, "moved", guest)
        times[kind].append(took_s)
        times[f"{kind}, libvirt's own count"].append(seen["elapsed_ms"] / 1000)
        times[f"{kind}, around it"].append(took_s - seen["elapsed_ms"] / 1000)
        times[f"downtime of {kind}"].append(seen["downtime_ms"] / 1000)
        await asyncio.sleep(REST_S)

    async def _create(self, name: str, pool: str) -> float:
        document = {
            "name": name, "image": "micro", "memory_mib": 96, "pool": pool, "networks": [{"network": "default"}], "to_host": HOSTS[0],
        }  # fmt: skip
        return await self._operation("POST", "/v1/projects/default/vms", document)

    async def _operation(self, method: str, path: str, document: dict[str, Any] | None) -> float:
        """Return the seconds from the request to the operation's end."""
        self.api.close()  # the server closes what was idle for some seconds, which a write hears too late
        await self.api.open()
        began, body = time.time(), json.dumps(document).encode() if document is not None else b""
        accepted = (await self.api.send(method, path, body, key=str(uuid.uuid4())))["operation"]
        deadline = time.monotonic() + PATIENCE_S
        while not accepted["done"]:
            if time.monotonic() > deadline:
                raise SystemExit(f"{path}: {accepted}")
            await asyncio.sleep(POLL_S)
            accepted = await self.api.get(f"/v1/operations/{accepted['id']}")
        if accepted["state"] != "done":
            raise SystemExit(f"{path} ended as {accepted['state']}: {accepted['error']}")
        return datetime.fromisoformat(accepted["ended_at"]).timestamp() - began

    async def _bare(self, document: str, vm_id: str, pool: str, kind: str) -> Times:
        """Do the same with libvirt alone."""
        path = f"{POOLS[pool]}/volumes/bare.qcow2"
        (disk,) = re.findall(r"<source file=['\"]([^'\"]+/volumes/[^'\"]+)['\"]", document)
        base, times = await self._base(pool), defaultdict[str, list[float]](list)
        plain = re.sub(r"<metadata>.*?</metadata>", "", document, flags=re.DOTALL)
        plain = plain.replace(f"trimtab-{vm_id}", "bare").replace(disk, path)
        plain = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid.uuid4()}</uuid>", plain)
        self.plane.lab.spec.host(HOSTS[0]).path_on_machine("/var/lib/trimtab").joinpath("bare.xml").write_text(plain)
        times["create"].append(self._on(HOSTS[0], "create", "/var/lib/trimtab/bare.xml", base, path)["seconds"])
        await asyncio.sleep(SETTLE_S)
        for source, target in self._ways():
            address = self.plane.lab.spec.host(target).migration_address
            copied_s, targets = 0.0, []
            if pool == "local":
                copied_s, targets = self._on(target, "clone", base, path)["seconds"], ["vda"]
            done = self._on(source, "migrate", "bare", f"qemu+tls://{address}/system", f"tcp://{address}", *targets)
            await self._note_move(times, kind, copied_s + done["seconds"], "bare", target)
        for host in HOSTS:
            self._on(host, "remove", "bare", path)
        return times

    async def _base(self, pool: str) -> str:
        image = await self.api.get("/v1/projects/default/images/micro")
        return f"{POOLS[pool]}/images/{image['id']}.qcow2"

    def _on(self, host: str, *arguments: str) -> Any:
        return json.loads(self.plane.lab.run(host, [sys.executable, BARE, *arguments], timeout_s=PATIENCE_S).stdout)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: seconds of either side. Without a goal it only explains the others."""

    what: str
    ours_s: float
    bare_s: float
    goal: float | None

    @property
    def ratio(self) -> float:
        """Return it as the table shows it: what the second digit does not show is noise."""
        return round(self.ours_s / self.bare_s, 2) if self.bare_s else math.inf

    def cells(self) -> list[str]:
        ratio = f"{self.ratio:.2f}" if self.bare_s else "-"
        return [
            self.what,
            f"{self.ours_s:.3f}",
            f"{self.bare_s:.3f}",
            ratio,
            f"{self.goal:g}" if self.goal is not None else "",
        ]


def compared(ours: Times, bare: Times) -> list[Row]:
    rows = []
    for what in sorted(ours):
        goal = GOALS.get(what, 1 if what.startswith("downtime") else None)
        rows.append(Row(what, median(ours[what]), median(bare[what]), goal))
    for kind in sorted(set(GOALS) - {"create"}):
        count_s = median([*ours[f"{kind}, libvirt's own count"], *bare[f"{kind}, libvirt's own count"]])
        ours_s, bare_s = (count_s + median(times[f"{kind}, around it"]) for times in (ours, bare))
        rows.append(Row(f"{kind}, the same count for both", ours_s, bare_s, GOALS[kind]))
    return rows


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    return [Goal(f"{row.what}, over bare libvirt's", row.ratio, row.goal) for row in rows if row.goal is not None]


def report(rows: Sequence[Row], title: str) -> str:
    return table(title, [["medians, seconds", "Trimtab", "bare libvirt", "ratio", "goal"], *(row.cells() for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--moves", type=int, default=4, help="of each guest; an even number ends where it began")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench_lab needs root: real libvirt hosts live in namespaces")
    with real_lab() as plane:
        load = load_note()
        bench = Bench(plane, Connection(plane.url, plane.authority_file, plane.token_file), arguments.moves)
        asyncio.run(bench.run(arguments.runs))
    rows = compared(bench.ours, bench.bare)
    title = f"Real guests on two libvirt hosts, {arguments.runs} runs of {arguments.moves} moves each, {load}"
    sys.stdout.write(report(rows, title) + "\n")
    end(goals_of(rows))


if __name__ == "__main__":
    main()
