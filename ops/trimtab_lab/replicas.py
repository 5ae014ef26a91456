"""The control plane of a lab as a larger fleet has it: PostgreSQL, a Redis of its own, two engines, two gateways, an api and a worker.

    plane = Replicas(lab)
    plane.start(); plane.join_hosts()
    leader = plane.leader()                  # "engine1" or "engine2"
    plane.kill(leader); plane.freeze_one(leader); plane.thaw_one(leader); plane.start_missing()
    plane.cut_from_database("gateway1"); plane.heal_database("gateway1"); plane.restart_database()

Every process runs in ctl's network namespace without a supervisor: what is killed stays dead and what is frozen stays frozen until the
caller says otherwise, so that a stale leader can come back to itself. Each reaches the database at a loopback address of its own, so
that its way there can be cut alone; what is sent meanwhile is swallowed, as behind a broken switch.
"""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from trimtab_lab.commands import run, wait_until
from trimtab_lab.controlplane import FIRST_METRICS_PORT, HEALTH_TIMEOUT_S, METRICS_PORTS, ControlPlane
from trimtab_lab.ctl import running_process_id, start_in_ctl
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab
from trimtab_lab.specs import PLANE_GROUP, STORAGE_GROUP

PROCESSES = ("api", "worker", "gateway1", "gateway2", "engine1", "engine2")
GATEWAY_PORTS = {"gateway1": (8444, 8445), "gateway2": (8454, 8455)}
DATABASE_PORT = 5432
DATABASE_USER = "trimtab"
UNPRIVILEGED_USER = "nobody"
"""initdb and the server refuse root."""
DATABASE_TIMEOUT_S = 60.0


class Replicas(ControlPlane):
    """Several replicas over one database. `stop` and `crash` end the product's processes; database and Redis go with the lab."""

    def __init__(self, lab: Lab, *, settings: Mapping[str, str] | None = None, programs: Path | None = None) -> None:
        super().__init__(lab, settings=settings, programs=programs)
        self._directory = lab.spec.state_directory / "pg"

    # --- all of it -------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Found the fleet once, start what does not run, and return when the api is well."""
        self._start_database()
        self._start_redis()
        if not self.token_file.exists():
            self._run_controller(
                "init", "--data-dir", str(self.data_directory), "--advertise", self.lab.spec.ctl_address,
                "--database-url", self._database_url("api"), "--redis-url", self._redis_url,
            )  # fmt: skip
            self._run_controller("migrate", "--data-dir", str(self.data_directory))
        self.start_missing()
        if not wait_until(self.is_healthy, timeout_s=HEALTH_TIMEOUT_S, interval_s=0.2):
            raise LabError(f"{self.url}/v1/health is not well; see {self.lab.spec.log_directory}")

    def start_missing(self) -> None:
        """Start each of the product's processes that does not run."""
        for name in PROCESSES:
            if self.process_of(name) is None:
                self._start_process(name)

    # --- one of them -----------------------------------------------------------------------------------------------------------

    def process_of(self, name: str) -> int | None:
        return running_process_id(self.lab.spec, name, group=PLANE_GROUP)

    def kill(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)
        wait_until(lambda: self.process_of(name) is None, timeout_s=10)

    def freeze_one(self, name: str) -> None:
        self._signal(name, signal.SIGSTOP)

    def thaw_one(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    def log_of(self, name: str) -> str:
        return (self.lab.spec.log_directory / f"{name}.log").read_text(errors="replace")

    def leader(self) -> str:
        """Return the engine that leads, by the lease row; '' while nobody does."""
        owner = self.query("SELECT owner FROM lease WHERE name = 'engine'").strip()
        for name in ("engine1", "engine2"):
            process_id = self.process_of(name)
            if process_id is not None and f"-{process_id}-" in owner:
                return name
        return ""

    # --- the database ----------------------------------------------------------------------------------------------------------

    def query(self, statement: str) -> str:
        """Return what psql prints for a statement, one row a line."""
        return run([*self.psql(), "-c", statement], timeout_s=20).stdout

    def psql(self) -> list[str]:
        """Return the command of a session with the database, as its superuser."""
        return [str(_programs() / "psql"), "-h", str(self._directory), "-U", DATABASE_USER, "-d", "trimtab", "-qAt"]

    def cut_from_database(self, name: str) -> None:
        """Swallow everything between that process and the database."""
        for chain, word in (("OUTPUT", "-d"), ("OUTPUT", "-s")):
            self.lab.run("ctl", ["iptables", "-I", chain, word, address_of(name), "-j", "DROP"])

    def heal_database(self, name: str) -> None:
        for chain, word in (("OUTPUT", "-d"), ("OUTPUT", "-s")):
            self.lab.run("ctl", ["iptables", "-D", chain, word, address_of(name), "-j", "DROP"], check=False)

    def restart_database(self) -> None:
        """End the server at once, connections and all, and start it again; it recovers from its log."""
        process_id = self._database_process()
        if process_id is not None:
            os.kill(process_id, signal.SIGQUIT)
            wait_until(lambda: self._database_process() is None, timeout_s=DATABASE_TIMEOUT_S)
        self._start_database()

    def redis_process(self) -> int | None:
        return running_process_id(self.lab.spec, "redis", group=STORAGE_GROUP)

    # --- inner workings --------------------------------------------------------------------------------------------------------

    def _signal(self, name: str, number: signal.Signals) -> None:
        process_id = self.process_of(name)
        if process_id is not None:
            os.kill(process_id, number)

    def _start_process(self, name: str) -> None:
        settings = {
            "TRIMTAB_DATABASE_URL": self._database_url(name),
            "TRIMTAB_METRICS_PORT": str(FIRST_METRICS_PORT + (METRICS_PORTS if name.endswith("2") else 0)),
        }
        if name in GATEWAY_PORTS:
            port, join_port = GATEWAY_PORTS[name]
            settings |= {"TRIMTAB_GATEWAY_PORT": str(port), "TRIMTAB_JOIN_PORT": str(join_port)}
        start_in_ctl(
            self.lab.spec,
            [str(self._programs / "trimtab-controller"), name.rstrip("12"), "--data-dir", str(self.data_directory)],
            log_name=name,
            group=PLANE_GROUP,
            environment={**self._environment(), **settings},
        )

    def _environment(self) -> dict[str, str]:
        own = {
            "TRIMTAB_DATABASE_URL": self._database_url("api"),
            "TRIMTAB_REDIS_URL": self._redis_url,
            "TRIMTAB_GATEWAYS": ",".join(f"{self.lab.spec.ctl_address}:{port}" for port, _join in GATEWAY_PORTS.values()),
        }
        return {**super()._environment(), **own}

    @property
    def _redis_url(self) -> str:
        return f"unix://{self._directory / 'redis.sock'}"

    def _database_url(self, name: str) -> str:
        return f"postgresql+psycopg://{DATABASE_USER}@{address_of(name)}:{DATABASE_PORT}/trimtab"

    def _database_process(self) -> int | None:
        return running_process_id(self.lab.spec, "postgres", group=STORAGE_GROUP)

    def _start_database(self) -> None:
        if self._database_process() is not None:
            return
        self._directory.mkdir(exist_ok=True)
        parent = self._directory.parent
        parent.chmod(parent.stat().st_mode | 0o011)
        as_user = ["setpriv", *_drop_privileges(self._directory)]
        data, is_new = self._directory / "data", not (self._directory / "data").exists()
        if is_new:
            argv = [str(_programs() / "initdb"), "-D", str(data), "-A", "trust", "-U", DATABASE_USER, "-E", "UTF8", "--locale=C"]
            subprocess.run([*as_user, *argv], check=True, capture_output=True, cwd="/", timeout=DATABASE_TIMEOUT_S)
        options = {
            "unix_socket_directories": str(self._directory),
            "listen_addresses": ",".join(sorted(address_of(name) for name in PROCESSES)),
            "port": str(DATABASE_PORT),
            "max_connections": "200",
            "shared_buffers": "64MB",
        }
        start_in_ctl(
            self.lab.spec,
            [*as_user, str(_programs() / "postgres"), "-D", str(data), *(f"-c{key}={value}" for key, value in options.items())],
            log_name="postgres",
        )
        argv = [str(_programs() / "pg_isready"), "-q", "-h", str(self._directory), "-U", DATABASE_USER]
        if not wait_until(lambda: run(argv, check=False).returncode == 0, timeout_s=DATABASE_TIMEOUT_S, interval_s=0.1):
            raise LabError(f"PostgreSQL did not start; see {self.lab.spec.log_directory / 'postgres.log'}")
        if is_new:
            run([str(_programs() / "createdb"), "-h", str(self._directory), "-U", DATABASE_USER, "trimtab"])

    def _start_redis(self) -> None:
        if self.redis_process() is not None:
            return
        program = shutil.which("redis-server")
        if program is None:
            raise LabError("redis-server is not installed")
        socket = str(self._directory / "redis.sock")
        start_in_ctl(
            self.lab.spec,
            [program, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"],
            log_name="redis",
        )
        if not wait_until(Path(socket).exists, timeout_s=10):
            raise LabError(f"Redis did not start; see {self.lab.spec.log_directory / 'redis.log'}")


def address_of(name: str) -> str:
    """Where that process reaches the database."""
    return f"127.0.0.{2 + PROCESSES.index(name)}"


def _drop_privileges(directory: Path) -> list[str]:
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    os.chown(directory, user.pw_uid, user.pw_gid)
    return [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if not found:
        raise LabError("PostgreSQL is not installed; `ops/bootstrap.sh` installs it")
    return found[-1].parent
