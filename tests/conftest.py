"""Databases for tests: a fresh, migrated SQLite file or PostgreSQL database for each test that asks for one.

Both are copies of a template that is migrated once per session. They live in memory where the machine has a memory file system:
what these tests show is not durability against a power cut, and an fsync per commit would cost minutes.
"""

import gc
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.databases import PostgresServer
from tests.run import ON_HOSTS
from trimtab_controller.store import migrate
from trimtab_controller.store.database import Database

WHOLE_FLEET = ("tests/lab/test_fleet", "tests/lab/test_prometheus", "tests/lab/test_snapshots")
"""Files that share one fleet: the fixture `fleet` of `tests/lab`."""
SECOND_HALF = tuple(
    f"tests/lab/test_{name}"
    for name in ("fleet_iso", "fleet_moves", "fleet_o", "fleet_p", "fleet_re", "fleet_storage", "prometheus", "snapshots")
)
"""Those that may have a fleet of their own, where another worker is free. The smaller half, so that xdist begins it after the first,
whose test of hosts that join wants pools that nobody broke yet."""

LAST_WORDS = 1_500

# How fast an example is made or tried is the machine's matter, and no test's: benchmarks measure.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


class TwoLabs(LoadScopeScheduling):
    """Gives tests on real hosts to two workers: most of their time guests boot and leases run out, so two labs fit beside each other;
    more would starve. The whole fleet's tests are two pieces, those of a hypervisor another, of the others each file is one, generated
    requests one for each database: whoever has ended its own helps with those. pytest 9 ignores `xdist_group`.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(WHOLE_FLEET):
            return "fleet, second half" if nodeid.startswith(SECOND_HALF) else "fleet"
        if nodeid.startswith("tests/lab/test_kvm") or "[kvm" in nodeid:
            return "kvm"
        if nodeid.startswith("tests/api/test_fuzz"):
            return "fuzz, PostgreSQL" if "[postgres]" in nodeid else "fuzz, SQLite"
        return nodeid if nodeid.startswith("tests/operations/") else nodeid.split("::", maxsplit=1)[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> TwoLabs:
    return TwoLabs(config, log)


class AsItHappens:
    """Tells at once what failed and why: whoever stops a run before its end, or whose time runs out, shall know what it saw."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self._config.get_terminal_writer()
            terminal.line(f"\n-- failed in {report.when}, after {report.duration:.0f} s: {report.nodeid}", red=True)
            terminal.line(report.longreprtext[-LAST_WORDS:])


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AsItHappens(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real hosts first: they are the longest stretch."""
    items.sort(key=lambda item: item.get_closest_marker("lab") is None)
    astray = [item.nodeid for item in items if item.get_closest_marker("lab") and not item.nodeid.startswith(ON_HOSTS)]
    if astray:
        raise pytest.UsageError(f"`make test` looks for tests marked lab only in {ON_HOSTS}: {astray}")


def pytest_collection_finish() -> None:
    """Modules and collected tests live until the end: that the collector walks through them again and again took an eighth of the
    matrix of faults. What tests make is collected as ever, in larger portions."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def memory_directory() -> Iterator[Path]:
    """A directory of this session whose files cost no disk writes where that is possible; its path is short."""
    shm = Path("/dev/shm")
    parent = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="trimtab-", dir=parent))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(memory_directory: Path) -> Path:
    path = memory_directory / "template.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, memory_directory: Path) -> Iterator[str]:
    """A migrated SQLite database of this test's own."""
    path = memory_directory / f"{uuid.uuid4().hex}.db"
    shutil.copyfile(sqlite_template, path)
    yield f"sqlite:///{path}"
    for suffix in ("", "-wal", "-shm", ".reserve"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB of this test's own, to be filled up; mounting takes root."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", directory], check=True, timeout=10)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True, timeout=10)


@pytest.fixture
def tiny_url(sqlite_template: Path, tiny_disk: Path) -> str:
    """A migrated SQLite database on a small disk."""
    shutil.copyfile(sqlite_template, tiny_disk / "fleet.db")
    return f"sqlite:///{tiny_disk}/fleet.db"


@pytest.fixture(scope="session")
def postgres_server(memory_directory: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(memory_directory)
    yield server
    server.stop()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated PostgreSQL database of this test's own."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop(url)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open database of each kind in turn."""
    opened = Database(database_url)
    yield opened
    opened.close()
