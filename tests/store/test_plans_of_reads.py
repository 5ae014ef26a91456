"""What is asked for many rows, or by name, is found by an index: on a fleet of thousands a scan is most of an answer's time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from trimtab_controller.store import keyset, lookup, operations, schema, vm_groups, vm_listing, vms, volumes
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.migrate import upgrade

READS = {
    "vm by name": lambda session: vms.find(session, "prj-1", "web1"),
    "vms' disks": lambda session: volumes.of_vms(session, ["vm-1", "vm-2"]),
    "vms' nics": lambda session: vms.nics_of(session, ["vm-1", "vm-2"]),
    "vms' operations": lambda session: operations.live_by_subject(session, ["vm-1", "vm-2"]),
    "vms' groups": lambda session: vm_groups.names_of(session, ["vm-1", "vm-2"]),
    "names": lambda session: lookup.names_in(session, {schema.host: ["host-1"], schema.image: ["img-1"]}),
    "page of vms": lambda session: vm_listing.page(session, keyset.Page(after=("web1", "vm-1")), project_ids=["prj-1"]),
    "page of operations": lambda session: operations.page(session, limit=10, before_id="op-9"),
}
# Of any size: each is found by its index, and what it holds is short.
SMALL = ("json_each", "vm_group ")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    directory: Path = tmp_path_factory.mktemp("plans")
    url = f"sqlite:///{directory / 'plans.db'}"
    upgrade(url)
    opened = Database(url)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", READS)
def test_it_is_found_by_an_index(db: Database, name: str) -> None:
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        asked.append((statement, parameters))

    def explain(session: Session) -> list[str]:
        driver: Any = session.connection().connection.dbapi_connection
        plans = [driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall() for statement, parameters in asked]
        return [row[3] for plan in plans for row in plan]

    sa.event.listen(db.engine, "before_cursor_execute", note)
    try:
        db.read(READS[name])
    finally:
        sa.event.remove(db.engine, "before_cursor_execute", note)
    steps = db.read(explain)
    assert steps, "it asked nothing"
    assert [step for step in steps if step.startswith("SCAN") and not any(small in f"{step} " for small in SMALL)] == []
