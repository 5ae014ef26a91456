"""Statements that come again run straight on the driver; whoever executes them must not notice anything but the speed."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, NoResultFound

from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.schema.base import Json, UtcDateTime

THING = sa.Table(
    "thing",
    sa.MetaData(),
    sa.Column("id", sa.String(10), primary_key=True),
    sa.Column("facts", Json),
    sa.Column("at", UtcDateTime()),
    sa.Column("is_good", sa.Boolean()),
    sa.Column("count", sa.Integer(), server_default="7"),
)
NOW = datetime(2026, 11, 25, 12, 0, 0, 123456, tzinfo=UTC)
INSERT = THING.insert()
BY_ID = sa.select(THING).where(THING.c.id == sa.bindparam("wanted"))
MARK = THING.update().where(THING.c.id == sa.bindparam("wanted")).returning(THING.c.count, THING.c.facts)
RAISE = THING.update().where(THING.c.is_good).values(count=THING.c.count + 1)
SOME = sa.select(THING.c.id).where(THING.c.id.in_(sa.bindparam("ids", expanding=True))).order_by(THING.c.id)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'lean.db'}")
    opened.write(lambda session: session.connection().execute(sa.schema.CreateTable(THING)))
    yield opened
    opened.close()


def thrice(db: Database, work: Callable[[Session, int], Any]) -> list[Any]:
    """Run it as SQLAlchemy does, as it is prepared, and prepared."""
    return [db.write(lambda session, i=i: work(session, i)) for i in range(3)]  # type: ignore[misc]


def values(i: int, **others: Any) -> dict[str, Any]:
    return {"id": f"t{i}", "facts": {"i": [i, None]}, "at": NOW, "is_good": i != 1, **others}


def test_what_was_written_is_read_with_its_types_each_time(db: Database) -> None:
    thrice(db, lambda session, i: session.execute(INSERT, values(i)))
    rows = thrice(db, lambda session, i: session.execute(BY_ID, {"wanted": f"t{i}"}).one())
    for i, row in enumerate(rows):
        assert tuple(row) == (f"t{i}", {"i": [i, None]}, NOW, i != 1, 7)
        assert (row.facts, row.at, row.is_good) == ({"i": [i, None]}, NOW, i != 1)
        assert dict(row._mapping) == values(i, count=7)


def test_none_and_defaults_of_the_database_are_kept_apart(db: Database) -> None:
    thrice(db, lambda session, i: session.execute(INSERT, values(i, facts=None, at=None, count=None)))
    thrice(db, lambda session, i: session.execute(INSERT, values(i + 3)))
    nothing = thrice(db, lambda session, i: session.execute(BY_ID, {"wanted": f"t{i}"}).one())
    assert [(row.facts, row.at, row.count) for row in nothing] == [(None, None, None)] * 3  # type: ignore[comparison-overlap]


def test_an_update_writes_what_it_is_given_and_returns_what_it_says(db: Database) -> None:
    thrice(db, lambda session, i: session.execute(INSERT, values(i)))
    found = thrice(db, lambda session, i: session.execute(MARK, {"wanted": f"t{i}", "count": i, "facts": {"n": i}}).one_or_none())
    assert [tuple(row) for row in found] == [(i, {"n": i}) for i in range(3)]
    assert thrice(db, lambda session, _i: session.execute(MARK, {"wanted": "t9", "count": 1}).one_or_none()) == [None] * 3
    assert thrice(db, lambda session, _i: session.execute(RAISE).rowcount) == [2, 2, 2]  # type: ignore[attr-defined]


def test_another_set_of_values_is_another_statement(db: Database) -> None:
    thrice(db, lambda session, i: session.execute(INSERT, values(i)))
    for changes in ({"count": 5}, {"is_good": False}, {"count": 6, "is_good": True}):
        thrice(db, lambda session, _i, changes=changes: session.execute(MARK, {"wanted": "t0", **changes}).one())  # type: ignore[misc]
        row = db.read(lambda session: session.execute(BY_ID, {"wanted": "t0"}).one())
        assert dict(row._mapping).items() >= changes.items()


def test_errors_are_sqlalchemys(db: Database) -> None:
    def twice(session: Session, i: int) -> None:
        session.execute(INSERT, values(i))
        with pytest.raises(IntegrityError, match="UNIQUE"):
            session.execute(INSERT, values(i))
        with pytest.raises(NoResultFound):
            session.execute(BY_ID, {"wanted": "t9"}).one()

    thrice(db, twice)


def test_lists_of_parameters_take_the_other_way(db: Database) -> None:
    thrice(db, lambda session, i: session.execute(INSERT, values(i)))
    for ids in (["t0"], ["t0", "t2"], [], ["t1", "t0"]):
        found = thrice(db, lambda session, _i, ids=ids: list(session.scalars(SOME, {"ids": ids})))  # type: ignore[misc]
        assert found == [sorted(ids)] * 3
    db.write(lambda session: session.execute(INSERT, [values(i) for i in range(3, 6)]))
    assert len(db.read(lambda session: session.execute(sa.select(THING)).all())) == 6
