"""Fleets of simulated hosts: a control plane on loopback and one process with N agents, without root, libvirt or namespaces.

    fleet = SimulatedLab(directory)
    fleet.start_controller()
    fleet.start_hosts(1000)        # real tokens, real joins, real sessions; a simulated hypervisor below each agent
    fleet.stop()                   # or `remove()`, which leaves nothing

The directory looks like that of a lab with real hosts: `controller/`, `log/`; `simulated.json` says which ports were chosen.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trimtab_lab.commands import own_programs, run, wait_until, write_atomically
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab

HEALTH_TIMEOUT_S = 90.0
HOSTS_TIMEOUT_S = 30.0
HOSTS_TIMEOUT_PER_HOST_S = 0.3
"""A join and a session take about 20 ms of CPU on both sides; a busy machine takes its time."""
STOP_TIMEOUT_S = 45.0
MAX_HOSTS = 60_000
FIRST_NETWORK, NETWORKS = 77, 33
CONTROLLER, FLEET = "controller", "simulated-hosts"
"""Names of the two lasting processes, and of their logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSpec:
    """What was chosen when the fleet was first brought up."""

    count: int
    address_prefix: str
    api_port: int
    gateway_port: int
    join_port: int
    metrics_port: int
    """Of the api; engine, gateway and worker take the next three."""
    agent_port: int
    """The same for all hosts: each has an address of its own."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.api_port}"


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """How far the process of the hosts is."""

    count: int = 0
    agents: int = 0
    sessions: int = 0


class SimulatedLab:
    """One simulated fleet; the truth about what runs is the machine's, so any process may use the same one."""

    def __init__(self, directory: Path, *, settings: Mapping[str, str] | None = None) -> None:
        """`settings` go into the controller's environment (`TRIMTAB_LEASE_TTL_S`) at each start."""
        self.directory = directory
        self._settings = dict(settings or {})

    @property
    def is_recorded(self) -> bool:
        return self._record.exists()

    @property
    def spec(self) -> SimulatedSpec:
        if not self.is_recorded:
            raise LabError(f"{self.directory} holds no simulated fleet")
        return SimulatedSpec(**json.loads(self._record.read_text()))

    @property
    def controller_directory(self) -> Path:
        return self.directory / "controller"

    @property
    def token_file(self) -> Path:
        return self.controller_directory / "admin.token"

    @property
    def authority_file(self) -> Path:
        return self.controller_directory / "pki" / "ca.pem"

    def controller_process_ids(self) -> dict[str, int]:
        """The processes of the control plane by name; `supervisor` is their parent."""
        status = self.controller_directory / "run" / "children.json"
        children = json.loads(status.read_text()) if status.exists() else {}
        supervisor = self._process_id(CONTROLLER)
        return {"supervisor": supervisor, **{name: one["pid"] for name, one in children.items()}} if supervisor else {}

    @property
    def fleet_process_id(self) -> int | None:
        return self._process_id(FLEET)

    def start_controller(self) -> None:
        """Initialise the data directory once, start the controller, return when it is healthy. Idempotent."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.is_recorded:
            self._write(_choose(self.directory))
        program = str(own_programs() / "trimtab-controller")
        if not self.token_file.exists():
            arguments = ["init", "--data-dir", str(self.controller_directory), "--advertise", "127.0.0.1"]
            run([program, *arguments], timeout_s=120, environment=self._environment())
        if self._process_id(CONTROLLER) is None:
            self._start(CONTROLLER, [program, "all", "--data-dir", str(self.controller_directory)])
        wait_until(lambda: self.is_healthy() or self._process_id(CONTROLLER) is None, timeout_s=HEALTH_TIMEOUT_S, interval_s=0.2)
        if not self.is_healthy():
            raise LabError(f"{self.spec.url}/v1/health is not well; see {self._log(CONTROLLER)}:\n{self._log_tail(CONTROLLER)}")

    def is_healthy(self) -> bool:
        """Tell whether the API answers and says that every part runs."""
        if not self.authority_file.exists():
            return False
        context = ssl.create_default_context(cafile=str(self.authority_file))
        try:
            with urllib.request.urlopen(f"{self.spec.url}/v1/health", context=context, timeout=5) as answer:
                return bool(json.loads(answer.read())["status"] == "ok")
        except OSError:
            return False

    def start_hosts(self, count: int) -> None:
        """Join hosts until there are `count`, serve them all, return when each holds a session. Idempotent; never shrinks."""
        if not 1 <= count <= MAX_HOSTS:
            raise LabError(f"{count} simulated hosts: 1 to {MAX_HOSTS}, for example 1000")
        spec = self.spec
        if self.fleet_process_id is not None and count > spec.count:
            self._end(FLEET)
        spec = replace(spec, count=max(count, spec.count))
        self._write(spec)
        if self.fleet_process_id is None:
            (self.directory / "status.json").unlink(missing_ok=True)
            self._start(FLEET, [sys.executable, "-m", "trimtab_lab.simulated_fleet", *self._fleet_arguments(spec)])
        limit_s = HOSTS_TIMEOUT_S + HOSTS_TIMEOUT_PER_HOST_S * spec.count
        wait_until(
            lambda: self.figures().sessions >= spec.count or self.fleet_process_id is None, timeout_s=limit_s, interval_s=0.1
        )
        if self.fleet_process_id is None:
            raise LabError(f"the simulated hosts ended; see {self._log(FLEET)}:\n{self._log_tail(FLEET)}")
        if self.figures().sessions < spec.count:
            raise LabError(f"after {limit_s:.0f} s only {self.figures()}; see {self._log(FLEET)}")

    def figures(self) -> FleetFigures:
        try:
            return FleetFigures(**json.loads((self.directory / "status.json").read_text()))
        except FileNotFoundError:
            return FleetFigures()

    def stop(self) -> None:
        """End both processes; everything is kept for the next start. Idempotent."""
        for name in (FLEET, CONTROLLER):
            self._end(name)

    def remove(self) -> None:
        """End both processes and delete the directory. Idempotent."""
        if self.is_recorded:
            self.stop()
            shutil.rmtree(self.directory)

    def cli_environment(self) -> dict[str, str]:
        """What makes the CLI talk to this fleet."""
        return {
            "TRIMTAB_URL": self.spec.url,
            "TRIMTAB_CA": str(self.authority_file),
            "TRIMTAB_TOKEN_FILE": str(self.token_file),
        }

    def shell_environment(self) -> str:
        return "\n".join(f"export {name}={value}" for name, value in self.cli_environment().items())

    def describe(self) -> str:
        """One paragraph for `status`."""
        spec, figures = self.spec, self.figures()
        controller, hosts = self._process_id(CONTROLLER), self.fleet_process_id
        return "\n".join(
            [
                f"{spec.count} simulated hosts on {spec.address_prefix}.0.0/16 port {spec.agent_port}, state in {self.directory}",
                f"controller  {f'pid {controller}, {spec.url}' if controller else 'stopped'}",
                f"hosts       {f'pid {hosts}, {figures.sessions} of {figures.count} hold a session' if hosts else 'stopped'}",
            ]
        )

    # Files and processes.

    @property
    def _record(self) -> Path:
        return self.directory / "simulated.json"

    def _write(self, spec: SimulatedSpec) -> None:
        write_atomically(self._record, json.dumps(asdict(spec), indent=1) + "\n")

    def _log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def _log_tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-8:])

    def _environment(self) -> dict[str, str]:
        spec = self.spec
        own = {
            "TRIMTAB_API_PORT": str(spec.api_port),
            "TRIMTAB_GATEWAY_PORT": str(spec.gateway_port),
            "TRIMTAB_JOIN_PORT": str(spec.join_port),
            "TRIMTAB_METRICS_PORT": str(spec.metrics_port),
            "TRIMTAB_BIND_ADDRESS": "127.0.0.1",
            "TRIMTAB_METRICS_BIND_ADDRESS": "127.0.0.1",
            # One administrator makes a thousand tokens.
            "TRIMTAB_RATE_LIMIT_PER_S": "100000",
            # Simulated hosts do not renew.
            "TRIMTAB_AGENT_CERTIFICATE_HOURS": str(24 * 365),
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")}
        return {**others, **own, **self._settings}

    def _fleet_arguments(self, spec: SimulatedSpec) -> Iterator[str]:
        given = {
            "directory": self.directory,
            "controller-directory": self.controller_directory,
            "url": spec.url,
            "count": spec.count,
            "address-prefix": spec.address_prefix,
            "agent-port": spec.agent_port,
        }
        for name, value in given.items():
            yield from (f"--{name}", str(value))

    def _start(self, name: str, command: list[str]) -> None:
        """Start a process that outlives us, and note which it is: a process id alone may be another's by the time of `stop`."""
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), start_new_session=True
            )
        noted = {"pid": process.pid, "started": _start_time(process.pid)}
        write_atomically(self.directory / f"{name}.pid", json.dumps(noted))

    def _process_id(self, name: str) -> int | None:
        try:
            noted = json.loads((self.directory / f"{name}.pid").read_text())
        except FileNotFoundError:
            return None
        return int(noted["pid"]) if _start_time(noted["pid"]) == noted["started"] else None

    def _end(self, name: str) -> None:
        process_id = self._process_id(name)
        if process_id is None:
            return
        for number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                os.kill(process_id, number)
            if wait_until(lambda: self._process_id(name) is None, timeout_s=timeout_s):
                break
        with suppress(ChildProcessError):
            os.waitpid(process_id, os.WNOHANG)  # ours, where the same program started and ends it
        (self.directory / f"{name}.pid").unlink(missing_ok=True)


def start_simulated_hosts(lab: Lab, *, count: int) -> SimulatedLab:
    """Bring up the control plane and `count` hosts in the lab's directory."""
    if lab.is_recorded:
        raise LabError(f"lab {lab.spec.name} has real hosts; take another name, as in --name simulated")
    fleet = SimulatedLab(lab.spec.state_directory)
    fleet.start_controller()
    fleet.start_hosts(count)
    return fleet


def _choose(directory: Path) -> SimulatedSpec:
    """Choose free ports, and addresses that another fleet is unlikely to have."""
    network = FIRST_NETWORK + sum(str(directory).encode()) % NETWORKS
    first = _free_ports(8)
    return SimulatedSpec(
        count=0,
        address_prefix=f"127.{network}",
        api_port=first,
        gateway_port=first + 1,
        join_port=first + 2,
        agent_port=first + 3,
        metrics_port=first + 4,
    )


def _free_ports(count: int) -> int:
    """Return the first of `count` neighbouring ports below the ephemeral ones that nobody listens on now."""
    start = 20_000 + time.time_ns() % 8_000
    for first in range(start, 32_000 - count):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise LabError(f"no {count} neighbouring free ports between {start} and 32000")


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _start_time(process_id: int) -> int | None:
    """When the process started, in the kernel's ticks; None where there is none or only its remains."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
