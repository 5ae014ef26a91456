"""A private PostgreSQL server on a unix socket, with a migrated template: for fixtures and campaigns."""

import os
import pwd
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import psycopg
import sqlalchemy as sa

from trimtab_controller.store import migrate

START_TIMEOUT_S = 60.0
TEMPLATE = "trimtab_template"
USER = "trimtab"
# initdb refuses root.
UNPRIVILEGED_USER = "nobody"
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "300",
    "autovacuum": "off",
}


class PostgresServer:
    """Runs in a directory of its own below `parent`, whose path must be short: a socket's has at most 107 characters."""

    def __init__(self, parent: Path) -> None:
        self._directory = parent / "pg"
        self._directory.mkdir()
        self._log = parent / "postgres.log"
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED_USER)
            parent.chmod(0o711)
            os.chown(self._directory, user.pw_uid, user.pw_gid)
            as_user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        programs, data = _programs(), self._directory / "data"
        initdb = [programs / "initdb", "-D", data, "-A", "trust", "-U", USER, "-N", "-E", "UTF8", "--locale=C"]
        subprocess.run(["setpriv", *as_user, *initdb], check=True, capture_output=True, cwd="/", timeout=START_TIMEOUT_S)
        options = [f"-c{name}={value}" for name, value in SETTINGS.items()] + [f"-cunix_socket_directories={self._directory}"]
        with self._log.open("wb") as log:
            # The server ends with this process, however that ends.
            command = ["setpriv", *as_user, "--pdeathsig=SIGINT", programs / "postgres", "-D", data, *options]
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        self._wait()
        self._execute(f"CREATE DATABASE {TEMPLATE}")
        migrate.upgrade(self.url(TEMPLATE))

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://{USER}@/{name}?host={self._directory}"

    def new_database(self) -> str:
        """Return the URL of a fresh, migrated database."""
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self._execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def stop(self) -> None:
        self._server.terminate()
        self._server.wait(timeout=START_TIMEOUT_S)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self._directory), user=USER, dbname="postgres", autocommit=True, connect_timeout=5
        ) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._server.poll() is None:
            try:
                self._execute("SELECT 1")
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"PostgreSQL did not start: {self._log.read_text()[-2000:]}")


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise RuntimeError("these tests need a PostgreSQL server's programs: install the Debian package `postgresql`")
    return found[-1].parent if found else Path(str(on_path)).parent
