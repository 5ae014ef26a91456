"""Creates and live migrations of real guests through Trimtab, against bare libvirt calls on the same hosts in the same run.

    python tests/bench/bench_lab.py [--runs 3]          as root; two libvirt hosts in namespaces, about four minutes

Create: from the request until the operation is done (the guest runs), against clone, define, start by one program on the host.
Migration: from the request until the operation is done, against making the target's disk (where it is copied) and one
`virDomainMigrateToURI3` with the same flags and TLS. Downtime: what libvirt says on the target, for both.
The bare guest has the XML that Trimtab gave its own, without the metadata, on the same image. Runs alternate; medians.
Goals: create 1.3x, migration 1.15x, downtime not worse.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.accounts import clean_up_when_told_to_end, load_note, table
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
POLL_S = 0.25
"""Costs the figure nothing: the operation itself records when it ended. Each look takes CPU from the guests that are measured."""
SETTLE_S = 4.0
"""Before a guest moves: it boots, so that both kinds move one that does something."""


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


@dataclass(slots=True)
class Bench:
    plane: ControlPlane
    api: Connection
    ours: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bare: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    async def run(self, runs: int) -> None:
        for number in range(runs + 1):
            for pool in POOLS:
                await self._compare(f"{pool}{number}", pool, counts=number > 0)
        self.api.close()

    async def _compare(self, name: str, pool: str, *, counts: bool) -> None:
        """Create and move one guest each way. The first pair only warms caches: replicas of images, channels, certificates."""
        kind = "migration, shared disk" if pool == "shared" else "migration, disk copied"
        took = {"create": await self._create(name, pool)}
        vm = await self.api.get(f"/v1/projects/default/vms/{name}")
        await asyncio.sleep(SETTLE_S)
        guest = f"trimtab-{vm['id']}"
        document = str(self._on(HOSTS[0], "xml", guest)["xml"])
        took[kind] = await self._operation("POST", f"/v1/projects/default/vms/{name}:migrate", {"to_host": HOSTS[1]})
        took[f"downtime of {kind}"] = self._on(HOSTS[1], "downtime", guest)["downtime_ms"] / 1000
        await self._operation("DELETE", f"/v1/projects/default/vms/{name}", None)
        bare = await self._bare(document, vm["id"], pool, kind)
        if counts:
            for what, seconds in took.items():
                self.ours[what].append(seconds)
            for what, seconds in bare.items():
                self.bare[what].append(seconds)

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

    async def _bare(self, document: str, vm_id: str, pool: str, kind: str) -> dict[str, float]:
        """Do the same with libvirt alone."""
        path = f"{POOLS[pool]}/volumes/bare.qcow2"
        (disk,) = re.findall(r"<source file=['\"]([^'\"]+/volumes/[^'\"]+)['\"]", document)
        base = await self._base(pool)
        plain = re.sub(r"<metadata>.*?</metadata>", "", document, flags=re.DOTALL)
        plain = plain.replace(f"trimtab-{vm_id}", "bare").replace(disk, path)
        plain = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid.uuid4()}</uuid>", plain)
        self.plane.lab.spec.host(HOSTS[0]).path_on_machine("/var/lib/trimtab").joinpath("bare.xml").write_text(plain)
        took = {"create": self._on(HOSTS[0], "create", "/var/lib/trimtab/bare.xml", base, path)["seconds"]}
        await asyncio.sleep(SETTLE_S)
        address = self.plane.lab.spec.host(HOSTS[1]).address
        copied_s, targets = 0.0, []
        if pool == "local":
            copied_s, targets = self._on(HOSTS[1], "clone", base, path)["seconds"], ["vda"]
        moved = self._on(HOSTS[0], "migrate", "bare", f"qemu+tls://{address}/system", f"tcp://{address}", *targets)
        took[kind] = copied_s + moved["seconds"]
        took[f"downtime of {kind}"] = self._on(HOSTS[1], "downtime", "bare")["downtime_ms"] / 1000
        for host in reversed(HOSTS):
            self._on(host, "remove", "bare", path)
        return took

    async def _base(self, pool: str) -> str:
        image = await self.api.get("/v1/projects/default/images/micro")
        return f"{POOLS[pool]}/images/{image['id']}.qcow2"

    def _on(self, host: str, *arguments: str) -> Any:
        return json.loads(self.plane.lab.run(host, [sys.executable, BARE, *arguments], timeout_s=PATIENCE_S).stdout)


def report(bench: Bench, runs: int, load: str) -> str:
    rows = [["medians, seconds", "Trimtab", "bare libvirt", "ratio", "goal"]]
    for what in sorted(bench.ours):
        ours, bare = median(bench.ours[what]), median(bench.bare[what])
        goal = f"{GOALS[what]:g}" if what in GOALS else "1"
        rows.append([what, f"{ours:.3f}", f"{bare:.3f}", f"{ours / bare:.2f}" if bare else "-", goal])
    return table(f"Real guests on two libvirt hosts, {runs} runs each, {load}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench_lab needs root: real libvirt hosts live in namespaces")
    with real_lab() as plane:
        load = load_note()
        bench = Bench(plane, Connection(plane.url, plane.authority_file, plane.token_file))
        asyncio.run(bench.run(arguments.runs))
        sys.stdout.write(report(bench, arguments.runs, load) + "\n")


if __name__ == "__main__":
    main()
