"""A private PostgreSQL server with the durability of production: fsync on, on the disk that the benchmark is about."""

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_TIMEOUT_S = 60.0
# initdb refuses root.
UNPRIVILEGED_USER = "nobody"
SETTINGS = {
    "listen_addresses": "",
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "128MB",
    "max_connections": "200",
}


@contextmanager
def private_server(directory: Path) -> Iterator[str]:
    """Run a server below `directory` (made here, removed at the end); the value is the URL of an empty database in it."""
    directory.mkdir(mode=0o711)
    as_user: list[str] = ["setpriv", *_drop_privileges(directory)]
    programs = _programs()
    initdb = [str(programs / "initdb"), "-D", str(directory / "data"), "-A", "trust", "-U", "trimtab", "-E", "UTF8", "--locale=C"]
    subprocess.run([*as_user, *initdb], check=True, capture_output=True, cwd="/", timeout=START_TIMEOUT_S)
    options = [f"-c{name}={value}" for name, value in {**SETTINGS, "unix_socket_directories": directory}.items()]
    with (directory / "log").open("wb") as log:
        command = [*as_user, "--pdeathsig=SIGINT", str(programs / "postgres"), "-D", str(directory / "data"), *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        _wait_for(server, directory)
        with connect(directory) as connection:
            connection.execute("CREATE DATABASE trimtab")
        yield f"postgresql+psycopg://trimtab@/trimtab?host={directory}"
    finally:
        server.terminate()
        server.wait(timeout=START_TIMEOUT_S)
        shutil.rmtree(directory, ignore_errors=True)


def connect(directory: Path, *, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(host=str(directory), user="trimtab", dbname=database, autocommit=True, connect_timeout=5)


def _drop_privileges(directory: Path) -> list[str]:
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    os.chown(directory, user.pw_uid, user.pw_gid)
    return [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise SystemExit("this benchmark needs a PostgreSQL server's programs: install the Debian package `postgresql`")
    return found[-1].parent if found else Path(str(on_path)).parent


def _wait_for(server: "subprocess.Popen[bytes]", directory: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            connect(directory).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"PostgreSQL did not start: {(directory / 'log').read_text()[-2000:]}")
