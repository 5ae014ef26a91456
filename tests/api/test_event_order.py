"""On PostgreSQL numbers are given out before transactions commit: whatever the order of the commits, no reader loses an event."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.api.kit import Api, running_api
from trimtab_controller.api.settled_events import SettledEvents
from trimtab_controller.store import events, schema

P1 = "/v1/projects/p1/events"
pytestmark = pytest.mark.postgres


@pytest.fixture
async def api(postgres_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(postgres_url, tmp_path) as running:
        yield running


@contextmanager
def open_session(url: str) -> Iterator[Session]:
    """A transaction that is open until the test ends it; nothing is written yet."""
    engine = sa.create_engine(url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def begin_writing(session: Session) -> int:
    """Give the transaction its number, as its first write would; return it."""
    return int(str(session.scalar(sa.select(sa.func.pg_current_xact_id().cast(sa.Text)))))


def tell(session: Session, api: Api, message: str) -> None:
    events.append(session, kind="vm.changed", subject_id="vm-x", message=message, project_id=api.ids["p1"], now=api.clock.now())


async def newest(api: Api) -> int:
    return int(await api.db.read(lambda session: session.scalar(sa.select(sa.func.max(schema.event.c.seq))) or 0))


async def known(api: Api) -> int:
    """Return the newest number after the API has served it: until then it would wait half a minute for whoever writes."""
    before = await newest(api)
    assert await page(api, before) == []
    return before


async def page(api: Api, after: int) -> list[str]:
    answer = (await api.call("p1-viewer", "GET", P1, params={"after": after, "page_size": 1000})).json()
    return [one["message"] for one in answer["items"]]


async def test_a_watcher_sees_an_event_whose_transaction_is_younger_and_whose_number_is_lower(
    api: Api, postgres_url: str
) -> None:
    with open_session(postgres_url) as older, open_session(postgres_url) as younger:
        async with api.stream("p1-viewer", f"{P1}?kind=vm.", accept="text/event-stream") as stream:
            await stream.block()  # it is following
            assert begin_writing(older) < begin_writing(younger)
            tell(younger, api, "first number, commits last")
            tell(older, api, "second number, commits first")
            older.commit()
            await stream.block()  # a heartbeat: the tailer has looked meanwhile
            younger.commit()
            seen = [(await stream.message()).content["message"] for _ in range(2)]
    assert seen == ["first number, commits last", "second number, commits first"]


async def test_a_page_waits_for_numbers_that_may_still_appear(api: Api, postgres_url: str) -> None:
    before = await known(api)
    with open_session(postgres_url) as older, open_session(postgres_url) as younger:
        begin_writing(older)
        tell(younger, api, "late")
        tell(older, api, "early")
        older.commit()
        assert await page(api, before) == []
        younger.commit()
        assert await page(api, before) == ["late", "early"]


async def test_the_newest_page_gives_a_number_from_which_nothing_is_missed(api: Api, postgres_url: str) -> None:
    await known(api)
    with open_session(postgres_url) as older, open_session(postgres_url) as younger:
        begin_writing(older)
        tell(younger, api, "late")
        tell(older, api, "early")
        older.commit()
        shown = (await api.call("p1-viewer", "GET", P1, params={"kind": "vm."})).json()
        younger.commit()
        assert "late" in await page(api, shown["last_seq"])


async def test_a_process_that_knows_nothing_yet_says_so_rather_than_guess(api: Api, postgres_url: str) -> None:
    settled = SettledEvents(api.db, first_wait_s=0.3)
    with open_session(postgres_url) as session:
        tell(session, api, "late")
        assert await settled.newest() == 0
        session.commit()
    assert await settled.newest() == await newest(api)


async def test_a_transaction_that_was_rolled_back_holds_nothing_up(api: Api, postgres_url: str) -> None:
    before = await newest(api)
    with open_session(postgres_url) as session:
        tell(session, api, "never")
        session.rollback()
        tell(session, api, "kept")
        session.commit()
    assert await page(api, before) == ["kept"]


async def test_what_is_committed_is_on_the_next_page_while_others_keep_writing(api: Api) -> None:
    is_over = asyncio.Event()

    async def write_on() -> None:
        while not is_over.is_set():
            await api.write(lambda session: tell(session, api, "noise"))

    writers = [asyncio.create_task(write_on()) for _ in range(3)]
    try:
        for i in range(20):
            before = await newest(api)
            await api.write(lambda session, i=i: tell(session, api, f"mine {i}"))  # type: ignore[misc]
            assert f"mine {i}" in await page(api, before)
    finally:
        is_over.set()
        await asyncio.gather(*writers)
