"""The control plane of a lab: `trimtab-controller all` in the namespace ctl, and the join of the lab's hosts.

Uses only what an operator has: the programs' command lines and the health page. Reached from the machine at
`https://10.X.0.2:8443`; the admin's token and the CA lie in the controller's data directory.
"""

import contextlib
import json
import os
import shlex
import signal
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from trimtab_lab import cgroups
from trimtab_lab.commands import own_programs, run, wait_until
from trimtab_lab.ctl import ctl_command, running_process_id, start_in_ctl
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab
from trimtab_lab.specs import PLANE_GROUP

LOG_NAME = "controller"
HEALTH_TIMEOUT_S = 90.0
"""Five processes import and migrate a database; a few seconds on an idle machine."""
STOP_TIMEOUT_S = 20.0
JOIN_TIMEOUT_S = 120.0
FIRST_METRICS_PORT, METRICS_PORTS = 9108, 4
"""The controller's defaults."""


class ControlPlane:
    """The controller of one lab."""

    def __init__(self, lab: Lab, *, settings: Mapping[str, str] | None = None, programs: Path | None = None) -> None:
        """`settings` go into the controller's environment (`TRIMTAB_LEASE_TTL_S`); `programs` holds other programs."""
        self.lab = lab
        self._settings = dict(settings or {})
        self._programs = programs or own_programs()

    @property
    def url(self) -> str:
        return self.lab.spec.controller_url

    @property
    def metrics_url(self) -> str:
        """Of the api; engine, gateway and worker export on the next three ports."""
        return f"http://{self.lab.spec.ctl_address}:{FIRST_METRICS_PORT}/metrics"

    @property
    def data_directory(self) -> Path:
        return self.lab.spec.controller_directory

    @property
    def token_file(self) -> Path:
        return self.data_directory / "admin.token"

    @property
    def authority_file(self) -> Path:
        return self.data_directory / "pki" / "ca.pem"

    @property
    def process_id(self) -> int | None:
        """The supervisor of the controller's processes, `None` when it does not run."""
        return running_process_id(self.lab.spec, LOG_NAME, group=PLANE_GROUP)

    def start(self) -> None:
        """Initialises the data directory once, starts the controller and returns when it is healthy. Idempotent."""
        if not self.token_file.exists():
            self._run_controller("init", "--data-dir", str(self.data_directory), "--advertise", self.lab.spec.ctl_address)
        if self.process_id is None:
            self.crash()
            start_in_ctl(
                self.lab.spec,
                [str(self._programs / "trimtab-controller"), "all", "--data-dir", str(self.data_directory)],
                log_name=LOG_NAME,
                group=PLANE_GROUP,
                environment=self._environment(),
            )
            wait_until(lambda: self.process_id is not None, timeout_s=5)
        # A controller that ended will not become well: do not make the user wait for it.
        wait_until(lambda: self.is_healthy() or self.process_id is None, timeout_s=HEALTH_TIMEOUT_S, interval_s=0.2)
        if self.process_id is None or not self.is_healthy():
            log = self.lab.spec.log_directory / f"{LOG_NAME}.log"
            raise LabError(
                f"{self.url}/v1/health is not well; see {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            )

    def stop(self) -> None:
        """Asks the controller to end, then makes it. Idempotent."""
        process_id = self.process_id
        if process_id is not None:
            os.kill(process_id, signal.SIGTERM)
            group = self.lab.spec.cgroup(PLANE_GROUP)
            wait_until(lambda: not cgroups.process_ids(group), timeout_s=STOP_TIMEOUT_S, interval_s=0.1)
        self.crash()

    def crash(self) -> None:
        """Kills every process of the control plane at once; `start` brings it back on the same data."""
        cgroups.kill_all(self.lab.spec.cgroup(PLANE_GROUP))

    def freeze(self) -> None:
        """Stops every process of the control plane where it stands, until `thaw`."""
        cgroups.set_frozen(self.lab.spec.cgroup(PLANE_GROUP), frozen=True)

    def thaw(self) -> None:
        cgroups.set_frozen(self.lab.spec.cgroup(PLANE_GROUP), frozen=False)

    def is_healthy(self) -> bool:
        if not self.authority_file.exists():
            return False
        context = ssl.create_default_context(cafile=str(self.authority_file))
        try:
            _get(f"{self.url}/v1/health", context=context)
        except OSError:
            return False
        return True

    def scrape(self) -> str:
        """The metrics of the control plane's processes, one text after the other; a process that is down is left out."""
        texts = []
        for port in range(FIRST_METRICS_PORT, FIRST_METRICS_PORT + METRICS_PORTS):
            with contextlib.suppress(OSError):
                texts.append(_get(f"http://{self.lab.spec.ctl_address}:{port}/metrics"))
        return "\n".join(texts)

    def join_hosts(self, *, lease_fencing: bool | None = None, beacon: bool = True) -> None:
        """Joins every host of the lab that has not joined yet. `lease_fencing`: None leaves it to the beacon, as the join does."""
        for host in self.lab.spec.hosts():
            if not self.has_joined(host.name):
                self.join(host.name, lease_fencing=lease_fencing, beacon=beacon)

    def has_joined(self, host: str) -> bool:
        return (self.lab.spec.host(host).path_on_machine("/var/lib/trimtab") / "agent.toml").exists()

    def join(self, host: str, *, lease_fencing: bool | None = None, beacon: bool = True) -> None:
        """What an operator does: create a one-use token, paste the line that comes with it on the host."""
        created = self.trimtab("host", "token", "create", host, "-o", "json")
        line = join_line(created)
        if line is None:
            raise LabError(f"`trimtab host token create {host}` printed no line to paste: {created}")
        fencing = {None: [], True: ["--lease-fencing"], False: ["--no-lease-fencing"]}[lease_fencing]
        arrival = ["--migration-address", self.lab.spec.host(host).migration_address]
        argv = [*shlex.split(line), *arrival, *fencing, *([] if beacon else ["--no-beacon"])]
        self.lab.run(host, [*self.lab.agent_command, *argv[1:]], timeout_s=JOIN_TIMEOUT_S)

    def trimtab(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Runs the CLI from the machine as the lab's admin and returns its output."""
        environment = {**_without_settings(), **self.cli_environment()}
        return run([str(self._programs / "trimtab"), *arguments], timeout_s=timeout_s, environment=environment).stdout

    def cli_environment(self) -> dict[str, str]:
        """What makes the CLI talk to this lab."""
        return {
            "TRIMTAB_URL": self.url,
            "TRIMTAB_CA": str(self.authority_file),
            "TRIMTAB_TOKEN": self.token_file.read_text().strip(),
        }

    def shell_environment(self) -> str:
        """Lines for a user's shell; the token stays in its file."""
        return (
            f"export TRIMTAB_URL={self.url}\nexport TRIMTAB_CA={self.authority_file}\nexport TRIMTAB_TOKEN_FILE={self.token_file}"
        )

    def _run_controller(self, *arguments: str) -> None:
        command = ctl_command(self.lab.spec, [str(self._programs / "trimtab-controller"), *arguments], group=PLANE_GROUP)
        run(command, timeout_s=120, environment=self._environment())

    def _environment(self) -> dict[str, str]:
        return {**_without_settings(), **self._settings}


def join_line(created: str) -> str | None:
    """The line to paste from the CLI's JSON, under whatever name it stands there."""

    def search(value: object) -> str | None:
        match value:
            case str() if value.startswith("trimtab-agent join "):
                return value
            case dict():
                return next(filter(None, map(search, value.values())), None)
            case list():
                return next(filter(None, map(search, value)), None)
        return None

    return search(json.loads(created))


def _get(url: str, *, context: ssl.SSLContext | None = None) -> str:
    """The text behind an address; raises OSError for refusals and error pages alike."""
    # Without the proxies that the machine's environment may name: the lab is one hop away.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(url, timeout=2) as answer:
        return str(answer.read().decode())


def _without_settings() -> dict[str, str]:
    """This process's environment without a user's own TRIMTAB_ settings, which mean another controller."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")}
