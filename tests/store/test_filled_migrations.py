"""Migrations over rows: whatever stood in a database of the first release stands in it after all of them, and is read."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from tests.store.test_migrations import empty
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.store import audit, describe, fleet, hosts, migrate, operations, pools, routers, schema, upkeep, vms
from trimtab_controller.store.database import Database, migration_engine

FIRST = "0001"
DROPPED = {"backup"}
"""0011 makes it anew: nothing had ever written to it."""
ROWS = 3
THEN = datetime(2025, 6, 1, 12, tzinfo=UTC)

Rows = dict[str, list[dict[str, Any]]]

VALUES: dict[str, dict[str, Any]] = {
    "image": {"format": "qcow2", "kind": "disk", "project_id": ""},
    "network": {"kind": "overlay", "mtu": 1500, "vlan": 0, "project_id": "project-id-0", "settings": {"router": "edge"}},
    "operation": {"state": "done", "is_exclusive": False, "kind": "vm.create"},
    "pool": {"is_shared": True},
    "volume": {"format": "qcow2", "bus": "virtio", "project_id": "project-id-0"},
    "vm": {
        "arch": "x86_64",
        "project_id": "project-id-0",
        "labels": {"tier": "web"},
        "cpu_features": [],
        "observed_addresses": [],
        "observed_state": "running",
        "purge_after": None,
    },
    "vm_group": {"rule": {"rules": []}},
}
"""What the store reads as more than a text or a number; by table and column."""


def first_tables(connection: sa.Connection) -> list[sa.Table]:
    metadata = sa.MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def allowed(connection: sa.Connection, table: str) -> dict[str, str]:
    """Return the first value of each column that may have certain ones only."""
    found = {}
    for check in sa.inspect(connection).get_check_constraints(table):
        words = re.match(r"\(*(\w+)\)*(?:::text)? (?:IN|=)[^']*'(\w+)'", check["sqltext"])
        if words:
            found[words[1]] = words[2]
    return found


def value_of(column: sa.Column[Any], number: int) -> Any:
    """Return something that fits the column, another one for each row."""
    for key in column.foreign_keys:
        return value_of(key.column, number)
    kind = column.type
    if isinstance(kind, sa.JSON):
        return {"number": number}
    if isinstance(kind, sa.DateTime):
        return THEN.replace(minute=number)
    if isinstance(kind, sa.Boolean):
        return number % 2 == 0
    if isinstance(kind, (sa.Integer, sa.Float, sa.Numeric)):
        return 64 + number
    length = getattr(kind, "length", None) or 40
    return f"{column.table.name}-{column.name}-{number}".replace("_", "-")[-length:]


def fill(connection: sa.Connection) -> None:
    """Write some rows into each table: of every column that needs a value, and of those that are named."""
    for table in first_tables(connection):
        certain = {**allowed(connection, table.name), **VALUES.get(table.name, {})}
        for number in range(ROWS):
            needed = [one for one in table.columns if (not one.nullable and one.server_default is None) or one.foreign_keys]
            row = {one.name: value_of(one, number) for one in needed}
            row |= {name: value for name, value in certain.items() if name in table.columns}
            connection.execute(table.insert().values(**row))


def read(connection: sa.Connection) -> Rows:
    """Return what is in each table, whichever its columns are now."""
    found = {}
    for table in first_tables(connection):
        rows = connection.execute(sa.select(table).order_by(*table.primary_key.columns)).mappings()
        found[table.name] = [dict(row) for row in rows]
    return found


@pytest.fixture
def filled(database_url: str) -> Iterator[tuple[str, Rows]]:
    """A database of the first release with rows in each of its tables, and these."""
    empty(database_url)
    migrate.upgrade(database_url, FIRST)
    engine = migration_engine(database_url)
    with engine.begin() as connection:
        fill(connection)
        before = read(connection)
    assert all(len(rows) == ROWS for rows in before.values())
    yield database_url, before
    engine.dispose()


def test_every_row_of_the_first_release_outlives_all_migrations(filled: tuple[str, Rows]) -> None:
    url, before = filled
    migrate.upgrade(url)
    assert migrate.current(url) == migrate.head()
    engine = migration_engine(url)
    with engine.connect() as connection:
        after = read(connection)
        if connection.dialect.name == "sqlite":
            assert connection.execute(sa.text("PRAGMA integrity_check")).scalar() == "ok"
            assert connection.execute(sa.text("PRAGMA foreign_key_check")).all() == []
    engine.dispose()
    assert set(after) == set(schema.metadata.tables)
    for name in before.keys() - DROPPED:
        kept = [{column: row[column] for column in before[name][0]} for row in after[name]]
        assert kept == before[name], name


def test_the_store_reads_what_the_first_release_wrote(filled: tuple[str, Rows]) -> None:
    url, _before = filled
    migrate.upgrade(url)
    database = Database(url)
    try:
        vm = database.read(lambda session: vms.get(session, "vm-id-0"))
        assert (vm.name, vm.labels, vm.vcpus) == ("vm-name-0", {"tier": "web"}, 64)
        volume = database.read(lambda session: describe.get_volume(session, "volume-id-1"))
        assert (volume.size_bytes, volume.layer_id, volume.purge_after) == (65, "", None)
        pool = database.read(lambda session: describe.get_pool(session, "pool-id-2"))
        assert (pool.name, pool.kind.value, pool.is_shared) == ("pool-name-2", "dir", True)
        (space,) = database.read(lambda session: pools.spaces_of(session, [pool.id])[pool.id])
        assert (space.claimed_bytes, space.written_bytes) == (0, None)
        ended = database.read(lambda session: operations.get(session, "operation-id-0"))
        assert (ended.state, ended.kind) == (OperationState.DONE, "vm.create")
        journal = database.read(lambda session: operations.journal_of(session, "operation-id-0"))
        assert [(entry.step, entry.result) for entry in journal] == [("operation-journal-step-0", {})]
        assert [host.name for host in database.read(hosts.live)] == [f"host-name-{number}" for number in range(ROWS)]
        rows = database.read(fleet.read_rows)
        assert (len(rows.hosts), len(rows.pools), len(rows.classes)) == (ROWS, ROWS, ROWS)
        trail = database.read(lambda session: audit.page(session, limit=10, before_seq=None, filters={}))
        assert [record.actor for record in trail] == [f"audit-actor-{number}" for number in reversed(range(ROWS))]
        assert (
            database.write(lambda session: upkeep.seal_audit(session, before=datetime.max.replace(tzinfo=UTC), limit=10)) == ROWS
        )
    finally:
        database.close()


def test_what_migrations_write_themselves_follows_from_the_rows_before_them(filled: tuple[str, Rows]) -> None:
    """0025 counts the snapshots that are there, 0027 gives the router that networks of a project name a row of its own, once."""
    url, _before = filled
    migrate.upgrade(url)
    database = Database(url)
    try:
        project = schema.project
        used = database.read(lambda session: session.execute(sa.select(project.c.id, project.c.snapshots_used)).all())
        assert dict(tuple(row) for row in used) == {"project-id-0": ROWS, "project-id-1": 0, "project-id-2": 0}
        router = database.read(lambda session: routers.find(session, "project-id-0", "edge"))
        assert router is not None
        assert [one.id for one in database.read(lambda session: routers.networks_behind(session, ["project-id-0"]))] == [
            f"network-id-{number}" for number in range(ROWS)
        ]
        count = sa.select(sa.func.count()).select_from(schema.router)
        assert database.read(lambda session: session.scalar(count)) == 1
    finally:
        database.close()
