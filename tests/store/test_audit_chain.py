"""The audit trail's chain of seals: a row that is changed or taken away afterwards is found, at the row whose seal does not fit."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tests.placement_rows import NOW
from trimtab_controller.store import audit, schema, upkeep
from trimtab_controller.store.database import Database

_table = schema.audit
LATER = NOW + timedelta(hours=1)


def append(database: Database, count: int) -> None:
    for number in range(count):
        database.write(
            lambda session, one=number: audit.append(  # type: ignore[misc]
                session,
                at=NOW + timedelta(seconds=one),
                actor="alice",
                request_id=f"req-{one}",
                project_id="",
                verb="vm.stop",
                resource=f"web{one}",
                outcome="accepted",
                context={"force": True, "grace_s": one},
            )
        )


@pytest.fixture
def sealed(database: Database) -> list[int]:
    """Three sealed rows, by two rounds of the leader."""
    append(database, 2)
    assert database.write(lambda session: upkeep.seal_audit(session, before=LATER, limit=10)) == 2
    append(database, 1)
    assert database.write(lambda session: upkeep.seal_audit(session, before=LATER, limit=10)) == 1
    assert database.read(upkeep.verify_audit) is None
    return list(database.read(lambda session: session.scalars(sa.select(_table.c.seq).order_by(_table.c.seq)).all()))


@pytest.mark.parametrize(
    "change",
    [
        {"actor": "mallory"},
        {"at": NOW + timedelta(days=1)},
        {"outcome": "denied"},
        {"resource": "web9"},
        {"cause": "x"},
        {"context": {"force": False, "grace_s": 1}},
        {"chain_sha256": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_that_was_changed_is_named(database: Database, sealed: list[int], change: dict[str, Any]) -> None:
    first, second, third = sealed
    for seq in (second, third):
        write = _table.update().where(_table.c.seq == seq)
        kept = database.read(lambda session, one=seq: session.execute(sa.select(_table).where(_table.c.seq == one)).one())  # type: ignore[misc]
        database.write(lambda session, now=write.values(**change): session.execute(now))  # type: ignore[misc]
        assert database.read(upkeep.verify_audit) == seq
        back = write.values(**{name: getattr(kept, name) for name in change})
        database.write(lambda session, now=back: session.execute(now))  # type: ignore[misc]
    assert database.read(upkeep.verify_audit) is None, f"{first} to {third} are as they were"


def test_a_row_that_was_taken_away_is_missed_by_the_next(database: Database, sealed: list[int]) -> None:
    _first, second, third = sealed
    database.write(lambda session: session.execute(_table.delete().where(_table.c.seq == second)))
    assert database.read(upkeep.verify_audit) == third


def test_two_rows_that_changed_places_do_not_fit(database: Database, sealed: list[int]) -> None:
    _first, second, third = sealed
    for seq, resource in ((second, "web2"), (third, "web1")):
        write = _table.update().where(_table.c.seq == seq).values(resource=resource)
        database.write(lambda session, now=write: session.execute(now))  # type: ignore[misc]
    assert database.read(upkeep.verify_audit) == second


def test_what_retention_leaves_and_what_is_not_sealed_yet_is_no_break(database: Database, sealed: list[int]) -> None:
    append(database, 1)
    assert database.read(upkeep.verify_audit) is None, "nothing stands against what has no seal yet"
    database.write(lambda session: upkeep.delete_audit_before(session, NOW + timedelta(seconds=1), limit=10))
    left = database.read(lambda session: session.scalars(sa.select(_table.c.seq)).all())
    assert sealed[0] not in left
    assert database.write(lambda session: upkeep.seal_audit(session, before=LATER, limit=10)) == 1, (
        "the chain goes on from what is left"
    )
    assert database.read(upkeep.verify_audit) is None


def test_retention_takes_no_row_from_between_two_that_stay(database: Database, sealed: list[int]) -> None:
    """Where the clocks of two controllers differ a row may look older than the one before it."""
    _first, second, _third = sealed
    append(database, 3)
    ahead = _table.update().where(_table.c.seq == second + 2).values(at=NOW + timedelta(days=1))
    database.write(lambda session: session.execute(ahead))
    assert database.write(lambda session: upkeep.seal_audit(session, before=NOW + timedelta(days=2), limit=10)) == 3
    database.write(lambda session: upkeep.delete_audit_before(session, NOW + timedelta(hours=2), limit=10))
    left = database.read(lambda session: session.scalars(sa.select(_table.c.seq).order_by(_table.c.seq)).all())
    assert left == [second + 2, second + 3, second + 4], "what came after the one that is to stay stays with it"
    assert database.read(upkeep.verify_audit) is None


def test_a_row_that_looks_older_than_one_before_it_is_sealed_after_that_one(database: Database) -> None:
    """Numbers are drawn in another order than clocks are read, and the clocks of two controllers differ."""
    append(database, 2)
    first, second = database.read(lambda session: session.scalars(sa.select(_table.c.seq).order_by(_table.c.seq)).all())
    ahead = _table.update().where(_table.c.seq == first).values(at=NOW + timedelta(seconds=30))
    database.write(lambda session: session.execute(ahead))
    soon = NOW + timedelta(seconds=10)
    sealed = database.write(lambda session: upkeep.seal_audit(session, before=soon, limit=10))
    assert sealed == 0, f"{second} would come before {first}"
    assert database.write(lambda session: upkeep.seal_audit(session, before=LATER, limit=10)) == 2
    assert database.read(upkeep.verify_audit) is None
