"""A project's quota of snapshots: it refuses the one too many, and what is deleted is given back."""

import pytest

from tests.operations import examples_snapshots as snaps
from tests.operations.kit import FleetStory
from trimtab_controller.services import snapshots as service
from trimtab_controller.store import project_quota, schema
from trimtab_controller.store import snapshots as snapshot_store
from trimtab_protos.errors import QuotaExceeded


def used(story: FleetStory) -> int:
    return story.db.read(lambda session: project_quota.get(session, story.project.id)).snapshots_used


def test_one_too_many_is_refused_by_name_and_a_deleted_one_makes_room(story: FleetStory) -> None:
    table = schema.project
    quota = table.update().where(table.c.id == story.project.id).values(snapshots_quota=1)
    story.db.write(lambda session: session.execute(quota))
    vm = story.running_vm("db")
    snaps.snapshotted(story, vm, "first")
    with pytest.raises(QuotaExceeded) as refused:
        snaps.accept_snapshot(story, vm, "second")
    assert "quota of snapshots is 1, 1 are used" in refused.value.message
    assert used(story) == 1, "what was refused took nothing"
    first = story.db.read(lambda session: service.find(session, story.vm(vm.id), "first"))
    for _ in range(2):
        story.db.write(lambda session: snapshot_store.forget(session, first, now=story.clock.now()))
    assert used(story) == 0, "it is given back once"
