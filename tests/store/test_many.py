"""One statement for many rows says on both databases what a statement for each row says."""

import pytest
import sqlalchemy as sa

from tests.placement_rows import NOW, found
from trimtab_controller.store import claims, schema
from trimtab_controller.store.among import among
from trimtab_controller.store.database import Database
from trimtab_controller.store.many import ManyInsert


def take(host_id: str, vcpus: int, memory_mib: int = 1) -> dict[str, object]:
    return {"at_host": host_id, "more_vcpus": vcpus, "more_memory_mib": memory_mib}


def claimed(database: Database) -> list[tuple[int, int]]:
    table = schema.host
    query = sa.select(table.c.vcpus_claimed, table.c.memory_claimed_mib).order_by(table.c.id)
    return [tuple(row) for row in database.read(lambda session: session.execute(query).all())]


def test_claims_of_many_hosts_are_taken_each_with_its_own_amount(database: Database) -> None:
    found(database, 3, vcpus_limit=8)
    rows = [take("host-00000", 8, 5), take("host-00002", 3, 7)]
    assert database.write(lambda session: claims.TAKE_MANY.run(session, rows)) == 2
    assert claimed(database) == [(8, 5), (0, 0), (3, 7)]


def test_a_host_without_room_is_the_only_one_left_out_and_the_caller_can_see_it(database: Database) -> None:
    found(database, 3, vcpus_limit=8)
    rows = [take("host-00000", 9), take("host-00001", 8), take("host-00009", 1)]
    assert database.write(lambda session: claims.TAKE_MANY.run(session, rows)) == 1
    assert claimed(database) == [(0, 0), (8, 1), (0, 0)]


def test_rows_are_inserted_whole_with_documents_and_times_as_given(database: Database) -> None:
    _, ids = found(database, 1)
    table, context = schema.event, {'a "quoted" key': ["\\", "ü", {"deep": None}]}
    insert = ManyInsert(table, ("at", "kind", "project_id", "subject_id", "operation_id", "actor", "message", "context"))
    told = {"at": NOW, "kind": "vm.placed", "project_id": ids["proj"], "actor": "test", "message": "it's", "context": context}
    rows = [{**told, "subject_id": f"vm-{number}", "operation_id": ""} for number in range(3)]
    database.write(lambda session: insert.run(session, rows))
    query = sa.select(table).where(table.c.actor == "test").order_by(table.c.subject_id)
    stored = database.read(lambda session: session.execute(query).all())
    assert [row.subject_id for row in stored] == ["vm-0", "vm-1", "vm-2"]
    assert {(row.at, row.message) for row in stored} == {(NOW, "it's")}
    assert all(row.context == context for row in stored)


@pytest.mark.parametrize("count", [0, 1, 40_000])
def test_a_condition_on_any_number_of_ids_is_one_parameter(database: Database, count: int) -> None:
    found(database, 2)
    ids = [f"host-{number:05}" for number in range(count)]
    query = sa.select(schema.host.c.id).where(among(schema.host.c.id, ids)).order_by(schema.host.c.id)
    assert database.read(lambda session: session.scalars(query).all()) == ids[:2]
