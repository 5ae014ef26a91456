"""What others have written to a pool is not claimed again, and what our own volumes have written is not counted twice."""

import sqlalchemy as sa

from tests.placement_rows import GIB, NOW, ask, found
from trimtab_controller.core.model import Pool
from trimtab_controller.operations import placement_snapshot
from trimtab_controller.store import describe, fleet, host_reports, schema, volume_claims
from trimtab_controller.store.database import Database, Session
from trimtab_protos.messages import PoolObservation

HOST = "host-00000"


def a_pool_with_claims(database: Database, *, claimed_gib: int) -> Pool:
    """Insert a shared pool of 100 GiB without a reserve, and volumes of 10 GiB each that claim so much of it."""
    _term, ids = found(database, 1)
    database.write(lambda session: session.execute(schema.pool.update().values(reserve_permille=0)))
    pool = database.read(lambda session: describe.get_pool(session, ids["pool"]))
    report(database, pool, available_gib=100, written_gib=0)
    for number in range(claimed_gib // 10):
        ask(database, ids, number, vcpus=1, memory_mib=64)
    volumes = database.read(lambda session: session.scalars(sa.select(schema.volume.c.id)).all())
    assert [take(database, pool, volume_id) for volume_id in volumes] == [True] * (claimed_gib // 10)
    ask(database, ids, 99, vcpus=1, memory_mib=64)
    return pool


def take(database: Database, pool: Pool, volume_id: str) -> bool:
    def work(session: Session) -> bool:
        return volume_claims.take_place(session, describe.get_volume(session, volume_id), pool, "")

    return database.write(work)


def take_one_more(database: Database, pool: Pool) -> bool:
    volume, claim = schema.volume, schema.disk_claim
    query = sa.select(volume.c.id).where(volume.c.id.not_in(sa.select(claim.c.volume_id)))
    return take(database, pool, str(database.read(lambda session: session.scalar(query))))


def report(database: Database, pool: Pool, *, available_gib: int, written_gib: int | None) -> None:
    written_bytes = None if written_gib is None else written_gib * GIB
    seen = PoolObservation(
        pool_id=pool.id, capacity_bytes=100 * GIB, available_bytes=available_gib * GIB, written_bytes=written_bytes
    )
    database.write(lambda session: host_reports.store_pools(session, [host_reports.PoolReport(HOST, seen)], now=NOW))


def limit_gib(database: Database, pool: Pool) -> int:
    """Ask both who bound claims: the rows and placement's snapshot."""

    def both(session: Session) -> set[int | None]:
        rows = fleet.read_rows(session)
        snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
        return {
            volume_claims.limit_bytes_at(session, pool, schema.SHARED),
            snapshot.pools[pool.id].claim_limit_bytes(HOST),
        }

    (limit_bytes,) = database.read(both)
    assert limit_bytes is not None
    return limit_bytes // GIB


def test_what_a_stranger_wrote_is_not_promised_to_a_volume_once_more(database: Database) -> None:
    pool = a_pool_with_claims(database, claimed_gib=50)
    report(database, pool, available_gib=50, written_gib=0)
    assert limit_gib(database, pool) == 50
    assert not take_one_more(database, pool), "50 are claimed and will be written, 50 are a stranger's"
    report(database, pool, available_gib=60, written_gib=0)
    assert limit_gib(database, pool) == 60, "the stranger left 10"
    assert take_one_more(database, pool)
    assert limit_gib(database, pool) == 60, "a claim is no room"


def test_what_our_volumes_wrote_is_not_counted_twice(database: Database) -> None:
    pool = a_pool_with_claims(database, claimed_gib=50)
    for written_gib in (0, 20, 50):
        report(database, pool, available_gib=100 - written_gib, written_gib=written_gib)
        assert limit_gib(database, pool) == 100
    report(database, pool, available_gib=40, written_gib=60)
    assert limit_gib(database, pool) == 90, "files of volumes that claim nothing are not theirs"
    assert take_one_more(database, pool)


def test_an_agent_that_cannot_tell_whose_bytes_they_are_is_believed_as_before(database: Database) -> None:
    pool = a_pool_with_claims(database, claimed_gib=50)
    report(database, pool, available_gib=50, written_gib=0)
    report(database, pool, available_gib=50, written_gib=None)
    assert limit_gib(database, pool) == 100, "all that is claimed is taken as written"
    assert take_one_more(database, pool)
