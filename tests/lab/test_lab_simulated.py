"""`trimtab-lab up --simulated N`, typed as a user does: a control plane that knows N hosts, usable by what is printed, gone with `down`."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from trimtab_lab.commands import own_programs

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

COUNT = 12


def typed(program: str, *arguments: str, **environment: str) -> str:
    finished = subprocess.run(
        [str(own_programs() / program), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert finished.returncode == 0, f"{program} {' '.join(arguments)}: {finished.stdout}{finished.stderr}"
    return finished.stdout


def processes_in(directory: Path) -> list[str]:
    """Return the command lines of all processes that name the directory."""
    lines = (one.read_bytes().replace(b"\0", b" ").decode() for one in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(one))
    return [line for line in lines if str(directory) in line]


def _is_readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:  # it ended meanwhile
        return False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets lie below: their paths are bounded."""
    with TemporaryDirectory(prefix="tt-sim-") as directory:
        yield Path(directory)


def test_a_fleet_of_simulated_hosts_comes_takes_a_volume_and_goes_without_a_trace(short_path: Path) -> None:
    directory = short_path / "sim"
    where = ("--name", "sim-test", "--state-dir", str(directory))
    printed = typed("trimtab-lab", "up", "--simulated", str(COUNT), *where)
    try:
        settings = dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines() if line.startswith("export "))
        hosts = json.loads(typed("trimtab", "host", "list", "-o", "json", **settings))
        assert [host["connectivity"] for host in hosts] == ["up"] * COUNT
        assert f"{COUNT} simulated hosts, up" in typed("trimtab-lab", "status", *where)
        typed("trimtab", "pool", "create", "bench", "--path", "/srv/bench", "--shared", "--wait", **settings)
        typed("trimtab", "volume", "create", "data1", "--size", "16MiB", "--pool", "bench", "--wait", **settings)
        assert processes_in(directory)
    finally:
        typed("trimtab-lab", "down", *where)
    assert processes_in(directory) == []
    assert not directory.exists()
    assert "down" in typed("trimtab-lab", "status", *where)
