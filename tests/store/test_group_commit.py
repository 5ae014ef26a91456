"""Transactions of several threads share a commit on SQLite; none of them may notice anything but the speed."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from trimtab_controller.store.database import AsyncDatabase, Database, Session
from trimtab_controller.store.group_commit import GroupCommit, Piece
from trimtab_protos.errors import Conflict, Unavailable

INSERT = sa.text("INSERT INTO t VALUES (:name)")
PATIENCE_S = 20.0


class Group:
    """A database whose writers can be made to meet in one commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits: list[int] = []
        self.db = Database(f"sqlite:///{path}", pool_size=16, on_commit=self.commits.append)
        self.db.write(lambda session: session.execute(sa.text("CREATE TABLE t (name TEXT PRIMARY KEY)")))
        self.commits.clear()

    def together(self, works: Sequence[Callable[[Session], Any]]) -> list[Future[Any]]:
        """Run these as one group: they queue up, in this order, behind a transaction that waits until all of them do."""
        queue = self.db._group
        assert queue is not None
        begun, go_on = threading.Event(), threading.Event()

        def block(_session: Session) -> None:
            begun.set()
            assert go_on.wait(PATIENCE_S)

        with ThreadPoolExecutor(len(works) + 1) as threads:
            first = threads.submit(self.db.write, block)
            assert begun.wait(PATIENCE_S)
            futures = []
            for work in works:
                futures.append(threads.submit(self.db.write, work))
                until(lambda: len(queue._waiting) == len(futures))
            go_on.set()
        first.result()
        return futures

    def names(self) -> set[str]:
        """Return what another process would find."""
        connection = sqlite3.connect(self.path)
        try:
            return {name for (name,) in connection.execute("SELECT name FROM t")}
        finally:
            connection.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def insert(name: str) -> Callable[[Session], str]:
    def work(session: Session) -> str:
        session.execute(INSERT, {"name": name})
        return name

    return work


def insert_then(name: str, error: Exception) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        session.execute(INSERT, {"name": name})
        raise error

    return work


def insert_then_run(name: str, statement: str) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        session.execute(INSERT, {"name": name})
        session.execute(sa.text(statement))

    return work


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path / "group.db")
    yield made
    made.db.close()


def test_writers_that_wait_share_one_commit_and_get_their_own_results(group: Group) -> None:
    futures = group.together([insert(f"n{i}") for i in range(8)])
    assert [future.result() for future in futures] == [f"n{i}" for i in range(8)]
    assert group.commits == [1, 8]
    assert group.names() == {f"n{i}" for i in range(8)}


def test_a_member_that_fails_is_undone_alone(group: Group) -> None:
    works = [insert("a"), insert_then("b", Conflict("no", "not this one")), insert("a"), insert("c")]
    good, refused, twice, last = group.together(works)
    assert good.result() == "a"
    assert last.result() == "c"
    assert isinstance(refused.exception(), Conflict)
    assert isinstance(twice.exception(), IntegrityError)
    assert group.names() == {"a", "c"}


def test_a_statement_that_the_database_refuses_is_one_members_trouble(group: Group) -> None:
    good, broken, last = group.together([insert("a"), insert_then_run("b", "SELECT * FROM nowhere"), insert("c")])
    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(broken.exception(), Unavailable)
    assert group.names() == {"a", "c"}


def test_a_member_that_ends_the_transaction_of_all_takes_nobody_with_it(group: Group) -> None:
    good, broken, last = group.together(
        [insert("a"), insert_then_run("b", "INSERT OR ROLLBACK INTO t VALUES ('b')"), insert("c")]
    )
    assert (good.result(), last.result()) == ("a", "c")
    assert isinstance(broken.exception(), IntegrityError)
    assert group.names() == {"a", "c"}


def test_nobody_is_answered_before_the_commit(group: Group) -> None:
    def write_and_look(i: int) -> bool:
        name = group.db.write(insert(f"n{i}"))
        return name in group.names()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write_and_look, range(100)))
    assert len(group.commits) < 100, "some of them met"


def test_a_commit_that_fails_is_everybodys() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def write(pieces: Sequence[Piece]) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        for piece in pieces:
            piece.result = "never committed"
        if len(pieces) > 1:
            raise Unavailable("database-full", "the disk is full")

    commits = GroupCommit(write)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(commits.run, lambda _session: None, durable=True)
        assert begun.wait(PATIENCE_S)
        rest = [threads.submit(commits.run, lambda _session: None, durable=True) for _ in range(3)]
        until(lambda: len(commits._waiting) == 3)
        go_on.set()
    assert first.exception() is None
    assert all(isinstance(future.exception(), Unavailable) for future in rest)


def test_a_leader_that_is_interrupted_hands_on(group: Group) -> None:
    def interrupted(_session: Session) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.db.write(interrupted)
    assert group.db.write(insert("after")) == "after"


def test_a_transaction_inside_of_another_is_refused_instead_of_waiting_for_itself(group: Group) -> None:
    with pytest.raises(RuntimeError, match="inside of another"):
        group.db.write(lambda _session: group.db.write(insert("inner")))
    assert group.names() == set()


CHILD = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import sqlalchemy as sa
from trimtab_controller.store.database import Database
db = Database(f"sqlite:///{sys.argv[1]}", pool_size=16)
def write(i):
    db.write(lambda session: session.execute(sa.text("INSERT INTO t VALUES (:name)"), {"name": f"n{i}"}))
    os.write(1, b"n%d\\n" % i)
with ThreadPoolExecutor(8) as threads:
    list(threads.map(write, range(100_000)))
"""


def test_a_killed_process_loses_only_what_it_had_not_answered(group: Group) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(group.path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        answered = [child.stdout.readline() for _ in range(200)]
        os.kill(child.pid, signal.SIGKILL)
        answered += child.stdout.read().splitlines(keepends=True)
    whole = {line.decode().strip() for line in answered if line.endswith(b"\n")}
    assert whole
    assert whole <= group.names()


# --- for an event loop ---------------------------------------------------------------------------------------------------------


async def test_writers_of_an_event_loop_share_one_commit_and_fail_alone(tmp_path: Path) -> None:
    commits: list[int] = []
    db = AsyncDatabase(f"sqlite:///{tmp_path / 'loop.db'}", on_commit=commits.append)
    await db.write(lambda session: session.execute(sa.text("CREATE TABLE t (name TEXT PRIMARY KEY)")))
    held, go_on = threading.Event(), threading.Event()

    def block(_session: Session) -> None:
        held.set()
        assert go_on.wait(PATIENCE_S)

    blocking = asyncio.create_task(db.write(block))
    await asyncio.to_thread(held.wait, PATIENCE_S)
    commits.clear()
    works = [insert("a"), insert_then("b", Conflict("no", "not this one")), insert("a"), insert("c")]
    waiting = [asyncio.create_task(db.write(work)) for work in works]
    given_up = asyncio.create_task(db.write(insert("d")))
    await asyncio.sleep(0)  # all of them are in the queue
    given_up.cancel()
    go_on.set()
    await blocking
    good, refused, twice, last = await asyncio.gather(*waiting, return_exceptions=True)
    assert (good, last) == ("a", "c")
    assert isinstance(refused, Conflict)
    assert isinstance(twice, IntegrityError)
    assert commits == [1, 5]
    names = await db.read(lambda session: {name for (name,) in session.execute(sa.text("SELECT name FROM t"))})
    assert names == {"a", "c", "d"}, "one whose caller gave up is committed nevertheless"
    await db.close()
