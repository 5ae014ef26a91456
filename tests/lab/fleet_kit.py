"""Drives a whole fleet as an operator does: only the command line, and the lab for faults.

What is looked at again and again until it is so is read by the command line's own client: a process for each look would take the
processors from the guests that are waited for.
"""

import base64
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeVar

from tests.lab.ticks import TICK
from trimtab_controller.cli.client import Client
from trimtab_lab.commands import own_programs
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.hosts import Lab

# Under TCG beside other tests a guest may take minutes to boot; the conditions below end as soon as they hold.
PATIENCE_S = 450.0
POLL_S = 0.5
VMS = "/v1/projects/default/vms"
TICKS_TAIL_BYTES = 64 << 10
"""Of a serial log: some thousand lines of a guest that counts."""
HOSTS = ("node1", "node2", "node3")
"""The fleet's members; the lab may have another host that a test lets come and go."""
FREE_FROM = 110
"""Addresses of guests whose tests do not care; those below are given out by the tests themselves."""


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
    _free: Iterator[int] = field(default_factory=lambda: count(FREE_FROM), init=False)

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

    def read(self, path: str, query: Mapping[str, str | int | bool | None] | None = None) -> dict[str, Any]:
        """Return what `-o json` prints of one resource. CommandFailed as the command line would say it."""
        ours = self.plane.cli_environment()
        client = Client(ours["TRIMTAB_URL"], token=ours["TRIMTAB_TOKEN"], ca_path=ours["TRIMTAB_CA"], timeout_s=PATIENCE_S)
        return dict(client.get(path, query))

    def vm(self, name: str) -> dict[str, Any]:
        return self.read(f"{VMS}/{name}")

    def create(self, name: str, *, pool: str, index: int | None = None, to: str = "") -> dict[str, Any]:
        """Create a vm with the address `index` of the guests' network, or one that no other test has."""
        address = f"{self.lab.spec.guest_prefix}.{next(self._free) if index is None else index}/24"
        more = ("--to", to) if to else ()
        self.ok(
            "vm", "create", name, "--image", "micro", "--memory", "96MiB", "--pool", pool,
            "--network", f"default,ip={address}", *more, "--wait",
        )  # fmt: skip
        return self.vm(name)

    def ticks(self, name: str) -> tuple[int, float]:
        """Return the guest's newest (counter, uptime); (0, 0) before its first."""
        # The log may turn over in between: an offset before its end is where it ends.
        answer = self.read(f"{VMS}/{name}/console", {"offset": -TICKS_TAIL_BYTES, "max_bytes": TICKS_TAIL_BYTES})
        found = TICK.findall(base64.b64decode(answer["content_base64"]).decode(errors="replace"))
        return (int(found[-1][0]), float(found[-1][1])) if found else (0, 0.0)

    def wait_for_ticks(self, name: str, at_least: int) -> tuple[int, float]:
        return wait_until(lambda: seen if (seen := self.ticks(name))[0] >= at_least else None, f"{name} to count to {at_least}")

    def delete(self, *names: str) -> None:
        for name in names:
            self.ok("vm", "delete", name, "--yes", "--wait")

    def purge(self, *names: str) -> None:
        """Delete vms with their disks, for good: a pool of a test's own is to be empty then."""
        self.delete(*names)
        for name in names:
            self.ok("vm", "purge", name, "--yes", "--wait")

    def host(self, name: str) -> dict[str, Any]:
        return self.read(f"/v1/hosts/{name}")

    def wait_for_host(self, name: str, connectivity: str = "up") -> dict[str, Any]:
        return wait_until(
            lambda: seen if (seen := self.host(name))["connectivity"] == connectivity else None, f"{name} to be {connectivity}"
        )

    def kill_management(self, host: str) -> None:
        """End the agent of a host and the whole control plane with no warning, and wait until those that follow have met."""
        died = self.lab.signal_service(host, "trimtab-agent", signal.SIGKILL)
        self.plane.crash()
        wait_until(
            lambda: self.lab.service_process_id(host, "trimtab-agent") not in (None, died), f"{host} to have an agent again"
        )
        born = datetime.now(UTC)
        self.plane.start()
        wait_until(
            lambda: (heard := self.host(host)["heard_at"]) and datetime.fromisoformat(heard) > born,
            f"{host}'s new agent to be heard",
        )
        self.wait_for_host(host)

    def begin(self, *arguments: str) -> str:
        """Start an operation without waiting for it and return its id."""
        return self.ok(*arguments, "--no-wait").out.strip()

    def operation(self, operation_id: str) -> dict[str, Any]:
        return self.read(f"/v1/operations/{operation_id}")

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
