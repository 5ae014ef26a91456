"""Databases for tests: a fresh, migrated SQLite file or PostgreSQL database for each test that asks for one.

Both are copies of a template that is migrated once per session. They live in memory where the machine has a memory file system:
what these tests show is not durability against a power cut, and an fsync per commit would cost minutes.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from trimtab_controller.store import migrate
from trimtab_controller.store.database import Database

START_TIMEOUT_S = 60.0
TEMPLATE = "trimtab_template"
# initdb refuses root.
UNPRIVILEGED_USER = "nobody"


@pytest.fixture(scope="session")
def memory_directory() -> Iterator[Path]:
    """A directory of this session whose files cost no disk writes where that is possible."""
    shm = Path("/dev/shm")
    parent = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    # Short: PostgreSQL's socket lies below, and such paths have at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="trimtab-", dir=parent))
    directory.chmod(0o711)
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
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def postgres_server(memory_directory: Path) -> Iterator[str]:
    """A private PostgreSQL server on a unix socket, with a migrated template; the value is its URL without a database."""
    directory = memory_directory / "pg"
    directory.mkdir()
    as_user: list[str] = []
    if os.geteuid() == 0:
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        os.chown(directory, user.pw_uid, user.pw_gid)
        as_user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    bin_directory = _postgres_bin()
    initdb = [
        bin_directory / "initdb",
        "-D",
        directory / "data",
        "-A",
        "trust",
        "-U",
        "trimtab",
        "-N",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(["setpriv", *as_user, *initdb], check=True, capture_output=True, cwd="/", timeout=START_TIMEOUT_S)
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(directory),
        "fsync": "off",
        "full_page_writes": "off",
        "shared_buffers": "64MB",
        "max_connections": "200",
        "autovacuum": "off",
    }
    options = [f"-c{name}={value}" for name, value in settings.items()]
    with (memory_directory / "postgres.log").open("wb") as log:
        # The server ends with this process, however that ends.
        command = ["setpriv", *as_user, "--pdeathsig=SIGINT", bin_directory / "postgres", "-D", directory / "data", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        _wait_for_server(server, directory, memory_directory / "postgres.log")
        _execute(directory, f"CREATE DATABASE {TEMPLATE}")
        migrate.upgrade(_url(directory, TEMPLATE))
        yield str(directory)
    finally:
        server.terminate()
        server.wait(timeout=START_TIMEOUT_S)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A migrated PostgreSQL database of this test's own."""
    directory = Path(postgres_server)
    name = f"test_{uuid.uuid4().hex}"
    _execute(directory, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield _url(directory, name)
    _execute(directory, f"DROP DATABASE {name} WITH (FORCE)")


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


def _postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise RuntimeError("these tests need a PostgreSQL server's programs: install the Debian package `postgresql`")
    return found[-1].parent if found else Path(str(on_path)).parent


def _url(directory: Path, name: str) -> str:
    return f"postgresql+psycopg://trimtab@/{name}?host={directory}"


def _execute(directory: Path, statement: str) -> None:
    with psycopg.connect(
        host=str(directory), user="trimtab", dbname="postgres", autocommit=True, connect_timeout=5
    ) as connection:
        connection.execute(statement)  # type: ignore[call-overload]


def _wait_for_server(server: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            _execute(directory, "SELECT 1")
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-2000:]}")
