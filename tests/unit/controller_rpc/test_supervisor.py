"""The supervisor: children that die or hang are replaced, a stop drains them, and none outlives it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab_controller import config, supervisor
from trimtab_controller.supervisor import redis_spec
from trimtab_protos.errors import Conflict

WITHIN_S = 30.0

CHILD = """
import os, signal, sys, time
name, directory = sys.argv[1:]
def end(*_):
    open(f"{directory}/{name}.drained", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
while True:
    if not os.path.exists(f"{directory}/{name}.silent"):
        os.write(int(os.environ["TRIMTAB_BEAT_FD"]), b".")
    time.sleep(0.05)
"""

RUNNER = """
import sys
from trimtab_controller import config, supervisor
from trimtab_controller.supervisor import Child, ChildSpec, Supervisor
supervisor.BEAT_TIMEOUT_S = 0.6
supervisor.BACKOFF_FIRST_S = 0.05
directory = sys.argv[1]
import os
children = [
    Child(ChildSpec(name, [sys.executable, f"{directory}/child.py", name, directory], has_beat=True), os.environ)
    for name in ("first", "second")
]
Supervisor(config.load(data_dir=directory), children).run()
"""


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


class Running:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "child.py").write_text(textwrap.dedent(CHILD))
        (directory / "runner.py").write_text(textwrap.dedent(RUNNER))
        self.process = subprocess.Popen([sys.executable, str(directory / "runner.py"), str(directory)])

    def status(self) -> dict[str, dict[str, Any]]:
        return supervisor.read_status(self.directory)

    def is_up(self) -> bool:
        status = self.status()
        return len(status) == 2 and all(child["is_running"] for child in status.values())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    until(made.is_up)
    yield made
    made.process.kill()
    made.process.wait(timeout=10)


def is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_that_dies_is_started_again(running: Running) -> None:
    before = running.status()["first"]["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: running.status()["first"]["restarts"] == 1 and running.is_up())
    status = running.status()
    assert status["first"]["pid"] != before
    assert status["second"]["restarts"] == 0


def test_a_child_that_is_frozen_is_killed_and_replaced(running: Running) -> None:
    before = running.status()["second"]["pid"]
    os.kill(before, signal.SIGSTOP)
    until(lambda: running.status()["second"]["restarts"] >= 1 and running.is_up())
    assert not is_alive(before)


def test_a_child_whose_loop_hangs_is_killed(running: Running) -> None:
    """It runs, answers signals, and does nothing: only the missing beat tells."""
    before = running.status()["first"]["pid"]
    (running.directory / "first.silent").touch()
    until(lambda: running.status()["first"]["restarts"] >= 1)
    (running.directory / "first.silent").unlink()
    assert not is_alive(before)


def test_a_stop_lets_children_drain(running: Running) -> None:
    children = [child["pid"] for child in running.status().values()]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=WITHIN_S) == 0
    assert (running.directory / "first.drained").exists()
    assert (running.directory / "second.drained").exists()
    assert not any(is_alive(child) for child in children)
    assert not supervisor.is_running(running.directory)


def test_no_child_outlives_a_supervisor_that_was_killed(running: Running) -> None:
    children = [child["pid"] for child in running.status().values()]
    running.process.kill()
    running.process.wait(timeout=10)
    until(lambda: not any(is_alive(child) for child in children))


def test_a_directory_has_one_supervisor(running: Running) -> None:
    assert supervisor.is_running(running.directory)
    with pytest.raises(Conflict, match="runs in"):
        supervisor.Supervisor(config.load(data_dir=running.directory), []).run()


def test_redis_is_private_or_not_started_at_all(tmp_path: Path) -> None:
    spec = redis_spec(config.load(data_dir=tmp_path, redis_server="/usr/bin/some-redis"))
    assert spec is not None
    command = dict(zip(spec.command[1::2], spec.command[2::2], strict=True))
    assert spec.command[0] == "/usr/bin/some-redis"
    assert (command["--port"], command["--save"], command["--unixsocketperm"]) == ("0", "", "700")
    assert (tmp_path / "redis").stat().st_mode & 0o077 == 0
    assert redis_spec(config.load(data_dir=tmp_path, redis_url="redis://elsewhere:6379")) is None


# --- everything together -----------------------------------------------------------------------------------------------------------------


class Controller:
    """`trimtab-controller all`, as an operator runs it."""

    def __init__(self, directory: Path, ports: list[int]) -> None:
        self.data_dir = directory / "d"
        self.ports = ports
        self.log = directory / "log"
        self._run("init", "--advertise", "127.0.0.1", *self._flags())
        with self.log.open("wb") as log:
            environment = {**os.environ, "TRIMTAB_LOG_FORMAT": "json"}
            self.process = subprocess.Popen(self._command("all"), stdout=log, stderr=log, env=environment)

    def _flags(self) -> list[str]:
        api, gateway, join, metrics = self.ports[:4]
        names = {"--api-port": api, "--gateway-port": gateway, "--join-port": join, "--metrics-port": metrics}
        return ["--bind-address", "127.0.0.1", *(part for name, port in names.items() for part in (name, str(port)))]

    def _command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "trimtab_controller.main", verb, "--data-dir", str(self.data_dir), *arguments]

    def _run(self, verb: str, *arguments: str) -> None:
        subprocess.run(self._command(verb, *arguments), check=True, capture_output=True, timeout=60)

    def get(self, path: str, *, token: str = "") -> Any:
        import ssl
        import urllib.request

        context = ssl.create_default_context(cafile=str(self.data_dir / "pki" / "ca.pem"))
        request = urllib.request.Request(f"https://127.0.0.1:{self.ports[0]}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as response:
                return json.load(response)
        except OSError:
            return None

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        health = self.get("/v1/health")
        return bool(health) and health["status"] == "ok"


@pytest.mark.timeout(600)
def test_everything_runs_survives_a_killed_worker_and_stops(memory_directory: Path) -> None:
    import socket

    sockets = [socket.socket() for _number in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets] + [free_run_of_ports(4)]
    for one in sockets:
        one.close()
    directory = memory_directory / "all"
    directory.mkdir()
    controller = Controller(directory, ports)
    try:
        deadline = time.monotonic() + 120
        while not controller.is_healthy():
            assert time.monotonic() < deadline, controller.log.read_text()[-3000:]
            time.sleep(0.2)
        token = (controller.data_dir / "admin.token").read_text().strip()
        assert controller.get("/v1/whoami", token=token)["name"] == "admin"
        check_metrics(ports[3])
        worker = supervisor.read_status(controller.data_dir)["worker"]["pid"]
        os.kill(worker, signal.SIGKILL)
        status = until_restarted(controller, "worker")
        assert status["worker"]["pid"] != worker
        children = [child["pid"] for child in status.values()]
    finally:
        controller.process.send_signal(signal.SIGTERM)
        assert controller.process.wait(timeout=60) == 0, controller.log.read_text()[-3000:]
    assert not any(is_alive(child) for child in children)
    shutil.rmtree(directory)


def until_restarted(controller: Controller, name: str) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + 60
    while True:
        status = supervisor.read_status(controller.data_dir)
        if status[name]["restarts"] >= 1 and status[name]["is_running"]:
            return status
        assert time.monotonic() < deadline, controller.log.read_text()[-3000:]
        time.sleep(0.1)


def free_run_of_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    import random
    import socket

    while True:
        first = random.randrange(20_000, 30_000)
        sockets = []
        try:
            for port in range(first, first + count):
                one = socket.socket()
                sockets.append(one)
                one.bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return first
        finally:
            for one in sockets:
                one.close()


def check_metrics(first_port: int) -> None:
    import urllib.request

    for offset, process in enumerate(config.PROCESSES):
        with urllib.request.urlopen(f"http://127.0.0.1:{first_port + offset}/metrics", timeout=10) as response:
            text = response.read().decode()
        assert f'trimtab_controller_build_info{{process="{process}"' in text
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
