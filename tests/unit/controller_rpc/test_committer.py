"""Group commits: many hosts at once cost few transactions, and one bad piece fails alone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from trimtab_controller.rpc.committer import BATCH_MAX, GroupCommitter
from trimtab_controller.store import migrate, schema
from trimtab_controller.store.database import Database
from trimtab_protos.errors import Conflict, Unavailable


class CountingDatabase(Database):
    """Counts what is committed."""

    transactions = 0

    def write(self, transaction: Any, *, durable: bool = True) -> Any:
        self.transactions += 1
        return super().write(transaction, durable=durable)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[CountingDatabase]:
    url = f"sqlite:///{tmp_path}/trimtab.db"
    migrate.upgrade(url)
    opened = CountingDatabase(url)
    yield opened
    opened.close()


@pytest.fixture
async def committer(database: CountingDatabase) -> AsyncIterator[GroupCommitter]:
    made = GroupCommitter(database)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def put(subject_id: str) -> Any:
    def work(session: Any) -> str:
        session.execute(schema.turn.insert().values(subject_id=subject_id, value=1))
        return subject_id

    return work


def count(database: Database) -> int:
    return int(database.read(lambda session: session.execute(sa.select(sa.func.count()).select_from(schema.turn)).scalar_one()))


async def test_what_arrives_together_is_committed_together(database: CountingDatabase, committer: GroupCommitter) -> None:
    names = [f"vm-{number}" for number in range(500)]
    assert await asyncio.gather(*(committer.commit(put(name)) for name in names)) == names
    assert count(database) == 500
    assert database.transactions <= 500 / BATCH_MAX + 1


async def test_a_piece_that_fails_fails_alone(database: CountingDatabase, committer: GroupCommitter) -> None:
    def refuse(_session: Any) -> None:
        raise Conflict("not-now", "not now")

    outcomes = await asyncio.gather(
        committer.commit(put("vm-1")), committer.commit(refuse), committer.commit(put("vm-2")), return_exceptions=True
    )
    assert outcomes[0] == "vm-1"
    assert isinstance(outcomes[1], Conflict)
    assert outcomes[2] == "vm-2"
    assert count(database) == 2


async def test_nothing_of_a_failed_piece_is_written(database: CountingDatabase, committer: GroupCommitter) -> None:
    def half(session: Any) -> None:
        put("vm-half")(session)
        raise Conflict("not-now", "not now")

    with pytest.raises(Conflict):
        await committer.commit(half)
    assert count(database) == 0


async def test_a_database_that_is_gone_is_told_to_everybody_who_waits(
    database: CountingDatabase, committer: GroupCommitter, tmp_path: Path
) -> None:
    database.engine.dispose()
    for path in tmp_path.glob("trimtab.db*"):
        path.unlink()
    (tmp_path / "trimtab.db").mkdir()
    outcomes = await asyncio.gather(*(committer.commit(put(name)) for name in ("a", "b")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]


async def test_the_stop_of_the_gateway_leaves_nobody_waiting(database: CountingDatabase) -> None:
    committer = GroupCommitter(database)
    waiting = asyncio.create_task(committer.commit(put("vm-1")))
    await asyncio.sleep(0)
    running = asyncio.create_task(committer.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
    assert outcome == "vm-1" or isinstance(outcome, asyncio.CancelledError)
