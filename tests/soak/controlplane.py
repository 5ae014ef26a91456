"""The control plane of a campaign: real processes of the product, a Redis and agents, each killed, frozen and started at will."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import redis

from trimtab_agent.certificates import new_agent_request
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_controller import config, installation
from trimtab_controller.clock import SystemClock, mint
from trimtab_controller.pki import FleetPki, Purpose
from trimtab_controller.store import certificates, host_reports, hosts
from trimtab_controller.store.database import Database, Session

# Short, so that a campaign sees many of their ends; a real fleet takes five times as long.
LEASE_TTL_S, LEASE_RENEW_S, HEARTBEAT_S = 3.0, 0.5, 0.5
DRIVER_LEASE_S = 4.0
STOP_TIMEOUT_S = 20.0
HOSTS_PER_AGENT_PROCESS = 2
# Address space of the campaign's agents; each host has an address of its own, as real ones do.
AGENT_PORT_FIRST = 21_000


@dataclass(slots=True, eq=False)
class Process:
    """One process that may be started again after it was killed."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    running: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started_s: float = 0.0

    def start(self) -> None:
        with self.log.open("ab") as log:
            # It ends with the campaign, however that ends.
            command = ["setpriv", "--pdeathsig=SIGKILL", *self.command]
            self.running = subprocess.Popen(
                command, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.starts += 1
        self.started_s = time.monotonic()

    def kill(self) -> None:
        """`kill -9`, whatever it was doing; a frozen one too."""
        if self.running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait(STOP_TIMEOUT_S)
            self.running = None

    def freeze(self) -> None:
        if self.running is not None:
            os.killpg(self.running.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGCONT)

    @property
    def has_died(self) -> bool:
        """Tell whether it ended by itself."""
        return self.running is not None and self.running.poll() is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many of each."""

    hosts: int = 6
    workers: int = 2
    engines: int = 2
    gateways: int = 2


@dataclass(eq=False)
class ControlPlane:
    """Founded in `directory`; nothing runs until `start`."""

    directory: Path
    shape: Shape
    fleet: SimulatedFleet
    world_socket: Path
    database_url: str
    processes: dict[str, Process] = field(default_factory=dict)
    host_ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "log").mkdir(exist_ok=True)
        self._ports = _free_ports(2 * self.shape.gateways + 4 + self.shape.hosts + 3 * 4 * 2)
        settings = config.load(data_dir=self.data_dir, database_url=self.database_url or None, advertise="127.0.0.1")
        installation.found(settings, SystemClock(), {})
        self.settings = config.load(data_dir=self.data_dir, database_url=self.database_url or None)
        self.db = Database(self.settings.effective_database_url)
        self.default_class_id = self.db.write(self._ensure_class)
        self._add_controller()
        self._add_agents()

    @property
    def data_dir(self) -> Path:
        return self.directory / "controller"

    @property
    def redis_socket(self) -> Path:
        return self.directory / "redis.sock"

    def named(self, kind: str) -> list[Process]:
        return [process for name, process in sorted(self.processes.items()) if name.startswith(kind)]

    def start(self) -> None:
        for process in self.processes.values():
            process.start()

    def restart_the_dead(self) -> list[str]:
        """Start again what ended by itself, as a supervisor would; return their names."""
        dead = [process for process in self.processes.values() if process.has_died]
        for process in dead:
            process.start()
        return [process.name for process in dead]

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
        self.db.close()

    def flush_redis(self) -> bool:
        """FLUSHALL; False where Redis is down."""
        client = redis.Redis(unix_socket_path=str(self.redis_socket), socket_timeout=2)
        try:
            client.flushall()
        except redis.RedisError:
            return False
        finally:
            client.close()
        return True

    def up_hosts(self) -> int:
        return self.db.read(lambda session: sum(1 for host in hosts.live(session) if host.connectivity.value == "up"))

    # Making them.

    def _ensure_class(self, session: Session) -> str:
        found = hosts.find_class(session, hosts.DEFAULT_CLASS)
        if found is None:
            found = hosts.insert_class(session, host_class_id=mint("hc"), name=hosts.DEFAULT_CLASS, now=SystemClock().now())
        return found.id

    def _add_controller(self) -> None:
        gateways = [(self._ports.pop(), self._ports.pop()) for _ in range(self.shape.gateways)]
        self.gateway_addresses = [f"127.0.0.1:{port}" for port, _join in gateways]
        redis_server = shutil.which("redis-server")
        assert redis_server is not None, "a campaign needs redis-server"
        arguments = ["--port", "0", "--unixsocket", str(self.redis_socket), "--save", "", "--appendonly", "no"]
        self._add("redis", [redis_server, *arguments], {})
        for number, (port, join_port) in enumerate(gateways):
            self._add_own(f"gateway{number}", {"GATEWAY_PORT": str(port), "JOIN_PORT": str(join_port)})
        for number in range(self.shape.engines):
            self._add_own(f"engine{number}", {})
        for number in range(self.shape.workers):
            self._add_own(f"worker{number}", {})

    def _add_own(self, name: str, settings: Mapping[str, str]) -> None:
        kind = name.rstrip("0123456789")
        # Each process takes its place in a block of four metrics ports.
        own = {"METRICS_PORT": str(_block_of_four(self._ports)), **settings}
        self._add(name, [sys.executable, "-m", "trimtab_controller.main", kind], own)

    def _add(self, name: str, command: list[str], settings: Mapping[str, str]) -> None:
        common = {
            "DATA_DIR": str(self.data_dir),
            "DATABASE_URL": self.settings.effective_database_url,
            "REDIS_URL": f"unix://{self.redis_socket}",
            "GATEWAYS": ",".join(self.gateway_addresses),
            "BIND_ADDRESS": "127.0.0.1",
            "METRICS_BIND_ADDRESS": "127.0.0.1",
            "LEASE_TTL_S": str(LEASE_TTL_S),
            "LEASE_RENEW_S": str(LEASE_RENEW_S),
            "HEARTBEAT_S": str(HEARTBEAT_S),
            "DRIVER_LEASE_S": str(DRIVER_LEASE_S),
            "WORKER_THREADS": "4",
            "LOG_LEVEL": "warning",
            "LOG_FORMAT": "console",
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRIMTAB_")}
        environment = {**inherited, **{f"TRIMTAB_{key}": value for key, value in {**common, **settings}.items()}}
        self.processes[name] = Process(name, command, environment, self.directory / "log" / f"{name}.log")

    def _add_agents(self) -> None:
        documents = [self._join(number) for number in range(self.shape.hosts)]
        pki = FleetPki(self.settings.pki_dir)
        for start in range(0, len(documents), HOSTS_PER_AGENT_PROCESS):
            name = f"agents{start // HOSTS_PER_AGENT_PROCESS}"
            document = self.directory / f"{name}.json"
            content = {
                "hosts": documents[start : start + HOSTS_PER_AGENT_PROCESS],
                "journal": str(self.directory / f"{name}.db"),
                "world": str(self.world_socket),
                "gateways": self.gateway_addresses,
                "ca_pem": pki.bundle_pem(),
            }
            document.write_text(json.dumps(content))
            self._add(name, [sys.executable, "-m", "tests.soak.agent_process", str(document)], {})

    def _join(self, number: int) -> dict[str, str]:
        """Make a member as a join does: certificate, rows, mapping to every pool and network."""
        host_id, request = mint("host"), new_agent_request()
        hypervisor = SimulatedHypervisor(self.fleet, SimulatedHost(host_id=host_id, hostname=f"node{number + 1}"))
        machine = uuid.uuid5(uuid.NAMESPACE_OID, host_id)
        address = f"127.0.0.1:{self._ports.pop()}"
        now = SystemClock().now()
        issued = FleetPki(self.settings.pki_dir).signing().sign_agent(request.csr_pem, host_id, now=now, life=timedelta(days=7))

        def work(session: Session) -> None:
            hosts.insert(
                session,
                host_id=host_id,
                name=f"node{number + 1}",
                host_class_id=self.default_class_id,
                agent_address=address,
                migration_address="192.0.2.1",
                machine_id=machine.hex,
                smbios_uuid=str(machine),
                now=now,
            )
            certificates.record(
                session, serial=issued.serial, host_id=host_id, purpose=Purpose.AGENT, not_after=issued.not_after, now=now
            )
            host_reports.map_everything(session, host_id)

        self.db.write(work)
        self.host_ids.append(host_id)
        return {
            "host_id": host_id,
            "address": address,
            "certificate_pem": issued.pem,
            "key_pem": request.key_pem.decode(),
            "boot_id": hypervisor.boot_id,
        }


def _free_ports(count: int) -> list[int]:
    found = []
    for port in range(AGENT_PORT_FIRST + time.time_ns() % 5000, 32_000):
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _block_of_four(ports: list[int]) -> int:
    """Take four neighbouring ports off the list."""
    for index, first in enumerate(ports):
        block = ports[index : index + 4]
        if block == [first, first + 1, first + 2, first + 3]:
            del ports[index : index + 4]
            return first
    raise RuntimeError("no four neighbouring ports")
