"""`trimtab-controller all`: a private Redis, api, engine, gateway and worker as children of one small process.

    starting -> (first beat) -> running -> (exit, or no beat for 15 s: killed) -> waiting out a backoff -> starting

The supervisor opens no database and runs no threads, so there is little in it that can fail; children die with it
(PR_SET_PDEATHSIG). Everything a child does may be cut at any point: a restart is the same as its first start.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from trimtab_controller import beats
from trimtab_controller.config import PROCESSES, Settings
from trimtab_protos.errors import Conflict

log = structlog.get_logger(__name__)

BEAT_TIMEOUT_S = 15.0
START_GRACE_S = 90.0
"""Until the first beat: imports and a first migration on a slow, busy machine."""
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
STEADY_AFTER_S = 30.0
DRAIN_S = 40.0
"""A worker finishes the drives under way, each below 30 s."""
TICK_S = 0.2

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    name: str
    command: Sequence[str]
    has_beat: bool
    is_last: bool = False
    """Stopped after the others, which use it."""


@dataclass(slots=True)
class Child:
    """One process and what is known of it. Times on CLOCK_MONOTONIC."""

    spec: ChildSpec
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    pipe: int = -1
    started_s: float = 0.0
    beat_s: float | None = None
    not_before_s: float = 0.0
    backoff_s: float = BACKOFF_FIRST_S
    restarts: int = 0
    is_killed: bool = False

    def start(self, now_s: float) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        environment = {**self.environment, beats.ENVIRONMENT: str(writing)}
        parent = os.getpid()
        try:
            self.process = subprocess.Popen(
                self.spec.command,
                env=environment,
                pass_fds=(writing,) if self.spec.has_beat else (),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is ours to pass on: a second signal would mean "at once" to some children
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 this process has one thread
            )
        finally:
            os.close(writing)
        self.pipe, self.started_s, self.beat_s, self.is_killed = reading, now_s, None, False

    def read_beats(self, now_s: float) -> None:
        with suppress(BlockingIOError):
            if os.read(self.pipe, 4096):
                self.beat_s = now_s

    def is_stuck(self, now_s: float) -> bool:
        if not self.spec.has_beat:
            return False
        if self.beat_s is None:
            return now_s - self.started_s > START_GRACE_S
        return now_s - self.beat_s > BEAT_TIMEOUT_S

    def close(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
        self.process, self.pipe = None, -1

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


def _die_with(parent: int) -> None:
    """Runs in the child between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


@dataclass(slots=True)
class Supervisor:
    """Runs the children until SIGTERM or SIGINT."""

    settings: Settings
    children: list[Child]
    stopping: bool = False
    _status_written: str = field(default="")

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._ask_to_stop())
        with _only_one(self.settings.data_dir):
            while not self.stopping:
                self._tick(time.monotonic())
                time.sleep(TICK_S)
            self._drain()
            self._write_status()

    def _ask_to_stop(self) -> None:
        self.stopping = True

    def _tick(self, now_s: float) -> None:
        for child in self.children:
            if child.process is None:
                if now_s >= child.not_before_s:
                    child.start(now_s)
                    assert child.process is not None
                    log.info("child started", child=child.spec.name, pid=child.process.pid, restarts=child.restarts)
                continue
            child.read_beats(now_s)
            if child.is_stuck(now_s) and not child.is_killed:
                log.error("child does not beat and is killed", child=child.spec.name, pid=child.process.pid)
                child.is_killed = True
                child.send(signal.SIGKILL)
            status = child.process.poll()
            if status is not None:
                self._note_exit(child, status, now_s)
        self._write_status()

    def _note_exit(self, child: Child, status: int, now_s: float) -> None:
        lived_s = now_s - child.started_s
        child.backoff_s = BACKOFF_FIRST_S if lived_s > STEADY_AFTER_S else min(child.backoff_s * 2, BACKOFF_MAX_S)
        child.not_before_s = now_s + child.backoff_s
        child.restarts += 1
        log.warning(
            "child ended", child=child.spec.name, status=status, lived_s=round(lived_s, 1), again_in_s=round(child.backoff_s, 1)
        )
        child.close()

    def _drain(self) -> None:
        """Stop the children, those that others use last; kill what has not ended in time."""
        for is_last in (False, True):
            chosen = [child for child in self.children if child.spec.is_last is is_last and child.process is not None]
            log.info("stopping children", children=[child.spec.name for child in chosen])
            for child in chosen:
                child.send(signal.SIGTERM)
                child.send(signal.SIGCONT)  # a stopped one would not hear it
            deadline_s = time.monotonic() + DRAIN_S
            for child in chosen:
                assert child.process is not None
                try:
                    child.process.wait(timeout=max(0.1, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.warning("child did not stop in time and is killed", child=child.spec.name)
                    child.send(signal.SIGKILL)
                    child.process.wait(timeout=10)
                child.close()

    def _write_status(self) -> None:
        """Write who runs, for `/v1/health` and for tests that need a process id."""
        status = json.dumps(
            {
                child.spec.name: {
                    "pid": child.process.pid if child.process else 0,
                    "is_running": child.process is not None and (child.beat_s is not None or not child.spec.has_beat),
                    "restarts": child.restarts,
                }
                for child in self.children
            }
        )
        if status == self._status_written:
            return
        path = status_path(self.settings.data_dir)
        temporary = path.with_suffix(".new")
        temporary.write_text(status)
        temporary.replace(path)
        self._status_written = status


def status_path(data_dir: Path) -> Path:
    return data_dir / "run" / "children.json"


def read_status(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the children of the node's supervisor by name; {} where none has run."""
    try:
        status: dict[str, dict[str, Any]] = json.loads(status_path(data_dir).read_text())
    except (OSError, ValueError):
        return {}
    return status


def redis_spec(settings: Settings) -> ChildSpec | None:
    """Return the private Redis; None where another is configured or the program is missing (the engine then drains by itself)."""
    if not settings.is_redis_private:
        return None
    program = settings.redis_server or shutil.which("redis-server") or shutil.which("valkey-server")
    if not program:
        log.warning("no redis-server here: operations are driven by the engine alone, more slowly; apt-get install redis-server")
        return None
    directory = settings.redis_socket.parent
    directory.mkdir(mode=0o700, exist_ok=True)
    arguments = {
        "port": "0",
        "unixsocket": str(settings.redis_socket.absolute()),
        "unixsocketperm": "700",
        "dir": str(directory.absolute()),
        "save": "",
        "appendonly": "no",
        "maxmemory": "256mb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
        "logfile": str((directory / "redis.log").absolute()),
    }
    command = [program, *(part for name, value in arguments.items() for part in (f"--{name}", value))]
    return ChildSpec("redis", command, has_beat=False, is_last=True)


def supervise(settings: Settings, overrides: Mapping[str, str]) -> None:
    """Run everything of one node until told to stop. `overrides`: settings given as flags, for the children's environment."""
    environment = {**os.environ, "TRIMTAB_DATA_DIR": str(settings.data_dir.absolute()), **overrides}
    specs = [ChildSpec(name, [sys.executable, "-m", "trimtab_controller.main", name], has_beat=True) for name in PROCESSES]
    redis = redis_spec(settings)
    if redis is not None:
        specs.insert(0, redis)
    Supervisor(settings, [Child(spec, environment) for spec in specs]).run()


def is_running(data_dir: Path) -> bool:
    """Tell whether a supervisor holds this data directory."""
    path = data_dir / "run" / "lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for one supervisor; the kernel frees it when we die."""
    path = data_dir / "run" / "lock"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict("controller-running", f"a controller runs in {data_dir} already") from error
        yield
