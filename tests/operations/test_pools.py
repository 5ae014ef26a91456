"""Pools of files as hosts find them: shared ones that are not, and bytes that somebody else has written there."""

import pytest
import sqlalchemy as sa

from tests.operations.examples_storage import name_of
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Pool
from trimtab_controller.services import pools as pool_service
from trimtab_controller.store import describe, host_reports, schema

NOT_SEEN = "not the same storage: it does not see what"


def created(story: FleetStory, *, own_on: tuple[str, ...]) -> Pool:
    """Create a pool that is said to be shared, and is a folder of its own on these hosts."""
    name = name_of("lie")
    story.fleet.own_folders |= {(host_id, f"/srv/{name}") for host_id in own_on}
    spec = pool_service.PoolSpec(name=name, kind="dir", path=f"/srv/{name}", is_shared=True, is_default=False)
    _view, operation = story.db.write(
        lambda session: pool_service.create(session, spec, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    return story.db.read(lambda session: describe.get_pool(session, operation.subject_id))


def findings(story: FleetStory, pool: Pool) -> dict[str, tuple[str, str]]:
    """Return (state, problem) by host."""
    table = schema.pool_host
    rows = story.db.read(lambda session: session.execute(sa.select(table).where(table.c.pool_id == pool.id)).all())
    return {row.host_id: (row.state, row.problem) for row in rows}


def refused(story: FleetStory, pool: Pool, name: str) -> str:
    """Return why no host can take a vm whose disk is in the pool."""
    _vm, operation = story.accept_create(name, pool=pool)
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state, ended.error.code if ended.error else "") == (OperationState.FAILED, "no-host-fits")
    return str(ended.error)


def test_a_pool_that_is_not_the_same_storage_on_every_host_is_not_taken_for_shared(story: FleetStory) -> None:
    writer, other, third = sorted(story.host_ids)
    pool = created(story, own_on=(other,))
    found = findings(story, pool)
    assert (found[writer], found[third]) == (("ready", ""), ("ready", ""))
    assert found[other][0] == "failed"
    assert found[other][1].startswith(NOT_SEEN)
    assert pool.path in found[other][1]
    assert pool.sharing_proven_at is None
    assert "must read what another wrote" in refused(story, pool, "web1")


def test_a_host_that_comes_later_is_held_against_those_that_have_the_pool(story: FleetStory) -> None:
    first, *_others, late = sorted(story.host_ids)
    pool = created(story, own_on=())
    assert pool.sharing_proven_at is not None
    story.fleet.own_folders.add((late, pool.path))
    table = schema.pool_host
    unknown = table.update().where(table.c.pool_id == pool.id, table.c.host_id == late).values(state="unknown")
    story.db.write(lambda session: session.execute(unknown))
    story.accept("host.prepare", late, {"host_id": late}, name="node3")
    story.settle()
    found = findings(story, pool)
    assert found[first] == ("ready", "")
    assert found[late][0] == "failed"
    assert found[late][1].startswith(NOT_SEEN)
    # The path answers there all the same: no heartbeat makes it the pool.
    report(story, pool, late)
    assert findings(story, pool)[late] == found[late]


def report(story: FleetStory, pool: Pool, host_id: str) -> None:
    """Let a heartbeat of the host say what it sees of the pool."""
    seen = story.hypervisor(host_id).observe_pool(describe.pool_spec(pool))
    at_host = [host_reports.PoolReport(host_id, seen)]
    story.db.write(lambda session: host_reports.store_pools(session, at_host, now=story.clock.now()))


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_pool_that_a_stranger_fills_takes_no_more_than_there_is_beside_him(story: FleetStory, is_shared: bool) -> None:
    """10 GiB: a vm of 2 that has written next to nothing, and 7 of a stranger's: another 2 would be promised twice."""
    pool = story.add_pool("small", is_shared=is_shared)
    (host_id,) = story.host_ids[:1]
    store = story.fleet.store(host_id, describe.pool_spec(pool))
    store.capacity_bytes = 10 * GIB
    story.running_vm("web1", pool=pool, to_host_id=host_id)
    report(story, pool, host_id)
    story.running_vm("web2", pool=pool, to_host_id=host_id)
    store.foreign_bytes = 5 * GIB
    report(story, pool, host_id)
    _vm, operation = story.accept_create("web3", pool=pool, to_host_id=host_id)
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state, ended.error.code if ended.error else "") == (OperationState.FAILED, "no-host-fits")
    store.foreign_bytes = 2 * GIB
    report(story, pool, host_id)
    story.running_vm("web4", pool=pool, to_host_id=host_id)
