"""Drives a whole fleet as an operator does: only the command line, and the lab for faults."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab_lab.commands import own_programs
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.hosts import Lab

TICK = re.compile(r"tick (\d+) uptime ([\d.]+)")
# Under TCG beside other tests a guest may take minutes to boot; the conditions below end as soon as they hold.
PATIENCE_S = 300.0
POLL_S = 0.5
HOSTS = ("node1", "node2", "node3")
"""The fleet's members; the lab may have another host that a test lets come and go."""


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(slots=True)
class Fleet:
    lab: Lab
    plane: ControlPlane

    def trimtab(self, *arguments: str, timeout_s: float = PATIENCE_S) -> Ran:
        """Run the CLI and return what it did, failures too."""
        finished = subprocess.run(
            [str(own_programs() / "trimtab"), *arguments],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **self.plane.cli_environment()},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        return Ran(finished.returncode, finished.stdout, finished.stderr)

    def ok(self, *arguments: str) -> Ran:
        """Run the CLI; a failure shows what the user would have seen."""
        ran = self.trimtab(*arguments)
        assert ran.code == 0, f"trimtab {' '.join(arguments)} ended with {ran.code}: {ran.err}{ran.out}"
        return ran

    def vm(self, name: str) -> dict[str, Any]:
        return dict(self.ok("vm", "get", name, "-o", "json").json())

    def create(self, name: str, *, pool: str, index: int, to: str = "") -> dict[str, Any]:
        address = f"{self.lab.spec.guest_prefix}.{index}/24"
        more = ("--to", to) if to else ()
        self.ok(
            "vm", "create", name, "--image", "micro", "--memory", "96MiB", "--pool", pool,
            "--network", f"default,ip={address}", *more, "--wait",
        )  # fmt: skip
        return self.vm(name)

    def ticks(self, name: str) -> tuple[int, float]:
        """Return the guest's newest (counter, uptime); (0, 0) before its first."""
        found = TICK.findall(self.ok("vm", "console", name, "--log").out)
        return (int(found[-1][0]), float(found[-1][1])) if found else (0, 0.0)

    def wait_for_ticks(self, name: str, at_least: int) -> tuple[int, float]:
        return wait_until(lambda: seen if (seen := self.ticks(name))[0] >= at_least else None, f"{name} to count to {at_least}")

    def delete(self, *names: str) -> None:
        for name in names:
            self.ok("vm", "delete", name, "--yes", "--wait")

    def host(self, name: str) -> dict[str, Any]:
        return dict(self.ok("host", "get", name, "-o", "json").json())

    def wait_for_host(self, name: str, connectivity: str = "up") -> dict[str, Any]:
        return wait_until(
            lambda: seen if (seen := self.host(name))["connectivity"] == connectivity else None, f"{name} to be {connectivity}"
        )

    def begin(self, *arguments: str) -> str:
        """Start an operation without waiting for it and return its id."""
        return self.ok(*arguments, "--no-wait").out.strip()

    def operation(self, operation_id: str) -> dict[str, Any]:
        return dict(self.ok("op", "get", operation_id, "-o", "json").json())

    def end_of(self, operation_id: str) -> dict[str, Any]:
        return wait_until(
            lambda: seen if (seen := self.operation(operation_id))["done"] else None, f"operation {operation_id} to end"
        )

    def sh(self, host: str, script: str, *, check: bool = True) -> str:
        """Run a shell script inside a host and return what it printed."""
        return self.lab.run(host, ["sh", "-ec", script], check=check).stdout

    def runs_on(self, vm_id: str) -> list[str]:
        """Return the hosts on which a QEMU of this vm really runs, asked of libvirt and not of Trimtab."""
        return [
            host
            for host in HOSTS
            if self.lab.init_process_id(host) is not None
            and f"trimtab-{vm_id}" in self.lab.run(host, ["virsh", "list", "--name"]).stdout.split()
        ]

    def domains_of(self, host: str) -> str:
        return self.lab.run(host, ["virsh", "list", "--all", "--name"]).stdout

    def hosts_that_define(self, vm_id: str) -> list[str]:
        return [host for host in HOSTS if vm_id in self.domains_of(host)]

    def files_of(self, identifier: str) -> list[str]:
        """Return the files on any pool of any host whose path names this id."""
        found = []
        for host in HOSTS:
            listed = self.lab.run(host, ["find", "/srv/trimtab-shared", "/srv/trimtab-local", "-path", f"*{identifier}*"]).stdout
            found += [f"{host}:{line}" for line in listed.splitlines()]
        return found


def fleet_settings(lab: Lab) -> dict[str, str]:
    """Return the controller's settings: images may come from a server that a test runs on the machine's lab address, and tests wait
    for what the drift loop says."""
    return {
        "TRIMTAB_DRIFT_PERIOD_S": "3",
        "TRIMTAB_RECOVER_LOST_AFTER_S": "2",
        "TRIMTAB_IMAGE_URL_HOSTS": lab.spec.machine_address,
        "TRIMTAB_IMAGE_URL_NETWORKS": str(lab.spec.subnet),
    }


def answers_ping(fleet: Fleet, address: str) -> bool:
    """Tell whether a guest answers; asked from the control plane's foot in the guests' network."""
    pinged = fleet.lab.run("ctl", ["busybox", "ping", "-c", "1", "-W", "2", address], check=False)
    return "bytes from" in pinged.stdout


T = TypeVar("T")


def wait_until(ask: Callable[[], T | None], what: str, *, patience_s: float = PATIENCE_S) -> T:
    """Return the first answer that is not None or False."""
    deadline = time.monotonic() + patience_s
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what}"
        time.sleep(POLL_S)  # real guests on real time; every wait ends with its condition
