"""A PostgreSQL server whose disk is full: leases go on in space that was kept for them, what would change something is refused."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from tests.databases import PostgresServer
from tests.unit.controller_rpc.test_full_disk import fill_up
from trimtab_controller.clock import SystemClock
from trimtab_controller.store import ballast_table, schema
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Unavailable

pytestmark = pytest.mark.postgres


class Tiny(NamedTuple):
    database: Database
    disk: Path


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    """A database on a server of its own, whose files are on a file system that can be filled up."""
    disk = Path(tempfile.mkdtemp(prefix="tt-tiny-"))  # the server is another user's, who must get there
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], check=True, timeout=10)
    with ExitStack() as ends:
        ends.callback(disk.rmdir)
        ends.callback(subprocess.run, ["umount", "--lazy", disk], check=True, timeout=10)
        server = PostgresServer(disk)
        ends.callback(server.stop)
        database = Database(server.new_database())
        ends.callback(database.close)
        has_written_for_a_while(database)
        yield Tiny(database, disk)


def has_written_for_a_while(database: Database) -> None:
    """As a server has that is up for long: segments of its log are there to be written over. One that must make another while its disk
    is full ends, whatever is kept elsewhere."""
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _segment in range(3):
            connection.execute(sa.text("CREATE TABLE written AS SELECT 1"))
            connection.execute(sa.text("DROP TABLE written"))
            connection.execute(sa.text("SELECT pg_switch_wal()"))
            connection.execute(sa.text("CHECKPOINT"))


def renews(session: Session) -> None:
    """What keeps a lease: one row, written over and over."""
    now, table = SystemClock().now(), schema.lease
    its_row = {"name": "engine", "owner": "engine-1", "term": 1, "ttl_ms": 5000, "context": {}, "beat": 1, "renewed_at": now}
    again = {"beat": table.c.beat + 1, "renewed_at": now}
    session.execute(insert(table).values(its_row).on_conflict_do_update(index_elements=["name"], set_=again))


def grows(mebibytes: int) -> Callable[[Session], None]:
    """Work that takes so much space for good."""

    def work(session: Session) -> None:
        session.execute(sa.text("CREATE TABLE IF NOT EXISTS grown (filler BYTEA)"))
        for _piece in range(mebibytes):
            session.execute(sa.text("INSERT INTO grown VALUES (:filler)"), {"filler": bytes(range(256)) * 4096})

    return work


def is_refused(database: Database) -> bool:
    try:
        database.read(database.reserve.refuse_if_spent)
    except Unavailable as error:
        return error.code == "database-full"
    return False


def test_leases_go_on_where_the_disk_is_full_and_mutations_wait_until_there_is_room(tiny: Tiny) -> None:
    database = tiny.database
    database.write(renews)
    assert not is_refused(database), "before anything was laid down"
    database.reserve.fill()
    filler = fill_up(tiny.disk)
    database.write(grows(4))  # an operation under way; it meets the full disk and goes on in what was kept
    assert is_refused(database)
    for _time in range(200):
        database.write(renews)
    assert database.read(lambda session: session.scalar(sa.select(schema.lease.c.beat))) == 201
    filler.unlink()
    refilled = ballast_table.TableReserve(database.engine)
    refilled.fill()
    assert not is_refused(database)
    assert database.read(lambda session: session.scalar(sa.select(sa.func.count()).select_from(schema.ballast))) == 32


def test_without_what_was_kept_the_disk_is_really_full(tiny: Tiny) -> None:
    """So the test before shows something."""
    fill_up(tiny.disk)
    with pytest.raises(Unavailable, match="disk of the controller's database is full"):
        tiny.database.write(grows(4))


def test_what_does_not_fit_is_not_laid_down_and_leaves_the_disk_as_it_was(tiny: Tiny) -> None:
    filler = fill_up(tiny.disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - (8 << 20))
    tiny.database.reserve.fill()
    assert is_refused(tiny.database), "there is no space kept"
    tiny.database.write(renews)


def test_a_server_that_crashed_has_an_empty_one_which_is_filled_again(tiny: Tiny) -> None:
    database = tiny.database
    database.reserve.fill()
    database.write(lambda session: session.execute(sa.text("DELETE FROM ballast")))  # as it is after a crash: it is unlogged
    database.reserve.fill()
    assert database.read(lambda session: session.scalar(sa.select(sa.func.count()).select_from(schema.ballast))) == 32
    unlogged = sa.text("SELECT relpersistence FROM pg_class WHERE relname = 'ballast'")
    assert database.read(lambda session: session.scalar(unlogged)) == "u"
