"""Migrations make exactly what the tables in `store/schema` say, on both databases."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from trimtab_controller.store import migrate, schema
from trimtab_controller.store.database import Database, migration_engine

REFLECTED = (
    "get_multi_columns",
    "get_multi_pk_constraint",
    "get_multi_foreign_keys",
    "get_multi_unique_constraints",
    "get_multi_indexes",
    "get_multi_check_constraints",
)


def reflect(url: str) -> dict[tuple[str, str], str]:
    """Everything that the database says of its tables, by kind of thing and table, in an order of ours."""
    engine = migration_engine(url)
    try:
        inspector = sa.inspect(engine)
        found = {what: getattr(inspector, what)() for what in REFLECTED}
    finally:
        engine.dispose()
    return {
        (what, name): str(ordered(value))
        for what, tables in found.items()
        for (_schema, name), value in tables.items()
        if name != "alembic_version"
    }


def ordered(found: Any) -> Any:
    return sorted(plain(one) for one in found) if isinstance(found, list) else plain(found)


def plain(value: Any) -> str:
    """A text that two reflections of the same thing share; clauses are compared as SQL."""
    if isinstance(value, dict):
        return str(sorted((str(key), plain(one)) for key, one in value.items()))
    return str(value) if isinstance(value, sa.ClauseElement) else repr(value)


def create_all(url: str) -> None:
    engine = migration_engine(url)
    try:
        schema.metadata.create_all(engine)
    finally:
        engine.dispose()


def empty(url: str) -> None:
    engine = migration_engine(url)
    try:
        metadata = sa.MetaData()
        metadata.reflect(engine)
        metadata.drop_all(engine)
    finally:
        engine.dispose()


def differences(url: str) -> list[Any]:
    engine = migration_engine(url)
    try:
        with engine.connect() as connection:
            return list(compare_metadata(MigrationContext.configure(connection), schema.metadata))
    finally:
        engine.dispose()


def test_the_migrations_make_the_tables_of_the_schema(database_url: str) -> None:
    assert migrate.current(database_url) == migrate.head()
    assert differences(database_url) == []
    migrated = reflect(database_url)
    assert {name for _what, name in migrated} == set(schema.metadata.tables)
    empty(database_url)
    create_all(database_url)
    # Checks and partial indexes too, which Alembic's own comparison does not see.
    assert reflect(database_url) == migrated


def test_a_database_that_is_up_to_date_is_left_alone(database_url: str) -> None:
    before = reflect(database_url)
    migrate.upgrade(database_url)
    assert reflect(database_url) == before


def test_there_is_one_head_and_every_migration_says_what_it_does() -> None:
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(migrate._config())
    assert len(scripts.get_heads()) == 1
    for script in scripts.walk_revisions():
        assert script.doc
        assert Path(script.path).name.startswith(f"{script.revision}_")


def test_the_constraints_hold(database: Database) -> None:
    from datetime import UTC, datetime

    now = datetime(2026, 1, 1, tzinfo=UTC)
    bad_class = schema.host.insert().values(
        id="host-1",
        name="n",
        host_class_id="hc-none",
        labels={},
        agent_address="",
        migration_address="",
        machine_id="m",
        smbios_uuid="s",
        connectivity="up",
        connectivity_at=now,
        created_at=now,
    )
    with pytest.raises(sa.exc.IntegrityError):
        database.write(lambda session: session.execute(bad_class))
    unnamed_state = schema.placement_request.insert().values(
        operation_id="op-1", vm_id="vm-1", project_id="proj-1", kind="create", requirement={}, state="maybe", created_at=now
    )
    with pytest.raises(sa.exc.IntegrityError):
        database.write(lambda session: session.execute(unnamed_state))
