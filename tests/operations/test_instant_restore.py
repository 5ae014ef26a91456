"""A vm that runs on a backup: what is refused until its disks stand alone, what goes on, and that nothing ends the filling but its end."""

from typing import Any

import pytest

from tests.operations.backup_kit import accept_restore, content_of, made_backup, ready_repo, write_to
from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Backup, Operation, Vm
from trimtab_controller.operations.background import admit_backup
from trimtab_controller.services import backups as backup_service
from trimtab_controller.store import operations, volumes
from trimtab_protos.errors import Conflict


def instants(story: FleetStory, vm: Vm) -> Any:
    source: Any = story.agents.agent(vm.host_id).parts.backups
    return source.instants


def running_on_a_backup(story: FleetStory) -> tuple[Backup, Vm, Operation]:
    """Return a vm whose disk is not whole, and the operation that waits to fill it."""
    ready_repo(story)
    source_vm = story.running_vm("db", ha="restart")
    write_to(story, source_vm.id, 0, source_vm.id.encode())
    backup = made_backup(story, source_vm)
    for host_id in story.host_ids:
        source: Any = story.agents.agent(host_id).parts.backups
        source.instants.may_fill = False
    restore = accept_restore(story, backup, "again", is_instant=True)
    story.settle(until=lambda: story.operation(restore.id).state.value == "done")
    fill = story.db.read(lambda session: operations.live_background(session, restore.subject_id, "vm.fill"))
    assert fill is not None
    return backup, story.vm(restore.subject_id), fill


def test_it_runs_before_its_disk_is_whole_and_gets_its_ha_afterwards(story: FleetStory) -> None:
    backup, vm, fill = running_on_a_backup(story)
    assert story.running_on(vm.id) == {vm.host_id}
    assert content_of(story, vm.id).startswith(backup.vm_id.encode())
    assert vm.ha == "none"
    instants(story, vm).may_fill = True
    story.settle()
    assert story.operation(fill.id).state.value == "done"
    assert story.db.read(volumes.that_fill) == ()
    assert story.vm(vm.id).ha == story.vm(backup.vm_id).ha


def test_what_needs_whole_disks_is_refused_and_names_what_fills_them(story: FleetStory) -> None:
    backup, vm, fill = running_on_a_backup(story)
    with pytest.raises(Conflict) as refused:
        story.accept_power(vm, "migrate")
    assert refused.value.code == "vm-filling"
    assert fill.id in refused.value.message
    assert backup.id in refused.value.message
    with pytest.raises(Conflict, match="stand alone"):
        story.db.read(lambda session: admit_backup(session, vm_id=vm.id, vm_name=vm.name))
    with pytest.raises(Conflict, match="still reads"):
        story.db.write(
            lambda session: backup_service.delete(
                session, backup.id, project=story.project, actor=story.actor, now=story.clock.now()
            )
        )


def test_it_may_be_stopped_and_started_in_the_middle_and_the_backup_is_served_before_it_starts(story: FleetStory) -> None:
    _backup, vm, fill = running_on_a_backup(story)
    stop = story.accept_power(vm, "stop", force=True)
    story.settle(until=lambda: story.operation(stop.id).state.value == "done")
    for host_id in story.host_ids:
        source: Any = story.agents.agent(host_id).parts.backups
        source.instants.served.clear()
    start = story.accept_power(story.vm(vm.id), "start")
    story.settle(until=lambda: story.operation(start.id).state.value == "done")
    now = story.vm(vm.id)
    (volume,) = story.volumes(vm.id)
    assert volume.id in instants(story, now).served
    instants(story, now).may_fill = True
    story.settle()
    assert story.operation(fill.id).state.value == "done"


def test_deleting_the_vm_ends_the_filling(story: FleetStory) -> None:
    _backup, vm, fill = running_on_a_backup(story)
    story.accept_power(vm, "delete")
    story.settle()
    assert story.operation(fill.id).state.value == "done"
    assert story.operation(fill.id).result == {"is_whole": False}
