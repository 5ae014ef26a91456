"""A process that was frozen inside a transaction finds it ended by the server: what it did is done again, by itself."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from trimtab_controller.store.database import Database, Session

pytestmark = pytest.mark.postgres


@pytest.fixture
def opened(postgres_url: str) -> Iterator[Database]:
    database = Database(postgres_url)
    yield database
    database.close()


class Frozen:
    """Work whose first transaction idles until the server has ended it."""

    def __init__(self, other: sa.Engine) -> None:
        self._other = other
        self.tries = 0

    def __call__(self, session: Session) -> int:
        self.tries += 1
        if self.tries == 1:
            process_id = session.scalar(sa.text("SELECT pg_backend_pid()"))
            session.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
            with self._other.connect() as watcher:
                while watcher.scalar(sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": process_id}):
                    watcher.rollback()  # its view of the activity is one transaction's
        return int(session.scalar(sa.text("SELECT 41 + 1")))


class FrozenInAPart(Frozen):
    """The same within a part that is to be undone alone, which the end of its transaction leaves nothing of."""

    def __call__(self, session: Session) -> int:
        with session.begin_nested():
            return super().__call__(session)


@pytest.mark.parametrize("kind", [Frozen, FrozenInAPart])
@pytest.mark.parametrize("how", ["read", "write"])
def test_a_transaction_that_the_server_ended_for_idling_is_run_again(
    opened: Database, postgres_url: str, how: str, kind: type[Frozen]
) -> None:
    other = sa.create_engine(postgres_url)
    work = kind(other)
    assert getattr(opened, how)(work) == 42
    assert work.tries == 2
    other.dispose()
