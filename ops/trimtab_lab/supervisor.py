"""Keeps the daemons of one lab host running, as systemd would on a real one. Standard library only.

    stopped ─start→ starting ─READY (or at once, without notify)→ running
    starting, running ─process died→ backoff (1 s) ─→ starting
    starting, running, backoff ─stop→ stopping ─process died→ stopped     (SIGTERM, SIGKILL after 10 s)
    stopping ─start→ stopping, wanted again: starts as soon as the old process is gone (this is a restart)

Single-threaded: the init's loop calls every method; nothing here blocks.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RESTART_AFTER_S = 1.0
KILL_AFTER_S = 10.0
NOTIFY_DIRECTORY = Path("/run/trimtab-lab-notify")


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    name: str
    command: Callable[[], list[str]]
    """Asked at every start, since a configuration file may have changed since the last."""
    condition: Path | None = None
    """Without this file the service is not started, which counts as success (systemd's ConditionPathExists)."""
    notifies: bool = False
    """It tells readiness on NOTIFY_SOCKET, so that `start` returns when it serves."""
    stops_group: bool = False
    """Its children die with it (KillMode=control-group); libvirtd must not take guests along."""
    environment: Mapping[str, str] = field(default_factory=dict)
    reload_signal: signal.Signals = signal.SIGHUP
    watchdog_s: float = 0.0
    """It says WATCHDOG=1 at least so often, or is killed (WatchdogSec); 0: nobody watches."""
    restart_after_s: float = RESTART_AFTER_S


@dataclass(slots=True)
class Service:
    """One definition and what became of it in this life of the host."""

    definition: ServiceDefinition
    state: str = "stopped"
    is_wanted: bool = False
    process_id: int | None = None
    starts: int = 0
    last_exit: int | None = None
    """Exit status as the shell would show it, 128 + signal for a killed process."""
    due_s: float | None = None
    """When to restart (backoff) or to kill (stopping), on the monotonic clock."""
    notify_socket: socket.socket | None = None
    fed_s: float = 0.0
    """When it last fed its watchdog."""

    @property
    def is_settled(self) -> bool:
        """True once nothing more will happen to the service by itself soon: what a waiting systemctl waits for."""
        return self.state in ("running", "stopped", "backoff")


class Supervisor:
    """The services of one host."""

    def __init__(self, definitions: list[ServiceDefinition], *, environment: Mapping[str, str], log_directory: Path):
        self.services = {each.name: Service(each) for each in definitions}
        self._environment = dict(environment)
        self._log_directory = log_directory

    def start(self, name: str) -> None:
        service = self.services[name]
        service.is_wanted = True
        if service.state in ("stopped", "backoff"):
            self._spawn(service)

    def stop(self, name: str) -> None:
        service = self.services[name]
        service.is_wanted = False
        if service.state == "backoff":
            service.state, service.due_s = "stopped", None
        elif service.state in ("starting", "running"):
            self._signal(service, signal.SIGTERM)
            service.state, service.due_s = "stopping", time.monotonic() + KILL_AFTER_S

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def reload(self, name: str) -> None:
        service = self.services[name]
        if service.process_id is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(service.process_id, service.definition.reload_signal)

    def child_exited(self, process_id: int, wait_status: int) -> bool:
        """Says whether the process was a service's main one; orphans of the host are only reaped."""
        for service in self.services.values():
            if service.process_id == process_id:
                self._exited(service, wait_status)
                return True
        return False

    def tick(self) -> None:
        """Does what is due: restarts after the backoff, kills what ignored SIGTERM."""
        now_s = time.monotonic()
        for service in self.services.values():
            watchdog_s = service.definition.watchdog_s
            if watchdog_s and service.state == "running" and now_s - service.fed_s > watchdog_s:
                self._signal(service, signal.SIGKILL)
                service.fed_s = now_s  # it is dying; not again before it had the time
            if service.due_s is None or service.due_s > now_s:
                continue
            service.due_s = None
            if service.state == "backoff":
                self._spawn(service)
            elif service.state == "stopping":
                self._signal(service, signal.SIGKILL)

    def next_due_s(self) -> float | None:
        """Seconds until `tick` has something to do."""
        due = [service.due_s for service in self.services.values() if service.due_s is not None]
        due += [
            service.fed_s + service.definition.watchdog_s + 0.01
            for service in self.services.values()
            if service.definition.watchdog_s and service.state == "running"
        ]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def read_notification(self, service: Service) -> None:
        if service.notify_socket is None:
            return
        with contextlib.suppress(BlockingIOError):
            message = service.notify_socket.recv(4096)
            words = message.split(b"\n")
            service.fed_s = time.monotonic()
            successor = [int(word[8:]) for word in words if word.startswith(b"MAINPID=")]
            if successor:
                # A successor that took over from inside; its predecessor ends as an orphan of ours.
                service.process_id = successor[0]
            if b"READY=1" in words and service.state == "starting":
                service.state = "running"

    def open_notify_sockets(self) -> dict[str, socket.socket]:
        NOTIFY_DIRECTORY.mkdir(exist_ok=True)
        for service in self.services.values():
            if service.definition.notifies or service.definition.watchdog_s:
                service.notify_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                service.notify_socket.bind(str(NOTIFY_DIRECTORY / service.definition.name))
        return {name: each.notify_socket for name, each in self.services.items() if each.notify_socket is not None}

    def _spawn(self, service: Service) -> None:
        definition = service.definition
        if definition.condition is not None and not definition.condition.exists():
            service.state, service.due_s = "stopped", None
            return
        environment = self._environment | dict(definition.environment)
        if service.notify_socket is not None:
            environment["NOTIFY_SOCKET"] = str(NOTIFY_DIRECTORY / definition.name)
        if definition.watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(definition.watchdog_s * 1e6))
        log = str(self._log_directory / f"{definition.name}.log")
        command = definition.command()
        service.due_s = None
        try:
            service.process_id = os.posix_spawn(
                command[0],
                command,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
                # Python ignores these two; a daemon expects them at their default.
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as error:
            with Path(log).open("a") as file:
                file.write(f"cannot start {command[0]}: {error}\n")
            service.state, service.due_s = "backoff", time.monotonic() + definition.restart_after_s
            return
        service.starts += 1
        service.fed_s = time.monotonic()
        service.state = "starting" if definition.notifies else "running"

    def _exited(self, service: Service, wait_status: int) -> None:
        code = os.waitstatus_to_exitcode(wait_status)
        service.last_exit = code if code >= 0 else 128 - code
        if service.definition.stops_group and service.process_id is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(service.process_id, signal.SIGKILL)
        was_stopping = service.state == "stopping"
        service.process_id, service.due_s = None, None
        if not service.is_wanted:
            service.state = "stopped"
        elif was_stopping:
            self._spawn(service)
        else:
            service.state, service.due_s = "backoff", time.monotonic() + service.definition.restart_after_s

    def _signal(self, service: Service, number: signal.Signals) -> None:
        if service.process_id is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if service.definition.stops_group:
                os.killpg(service.process_id, number)
            else:
                os.kill(service.process_id, number)
