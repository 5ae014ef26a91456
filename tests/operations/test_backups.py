"""Backups through every layer but libvirt: a repository is made, a vm backed up, changed, backed up, deleted, restored elsewhere."""

from tests.operations.backup_kit import (
    accept_restore,
    content_of,
    made_backup,
    ready_repo,
    write_to,
)
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.store import backups


def test_a_vm_that_was_backed_up_changed_and_deleted_comes_back_on_another_host_as_it_was(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db", pool=story.local)
    write_to(story, vm.id, 0, b"first" * 1000)
    full = made_backup(story, vm)
    assert (full.state, full.consistency, full.level) == ("ready", "filesystem", 0)
    assert full.full_reason == "vda: first backup"
    write_to(story, vm.id, 512 * 1024, b"second" * 1000)
    before = content_of(story, vm.id)
    increment = made_backup(story, vm)
    assert (increment.base_id, increment.full_reason) == (full.id, "")
    assert increment.read_bytes < increment.size_bytes
    story.accept_power(vm, "delete")
    story.settle()
    elsewhere = next(host_id for host_id in story.host_ids if host_id != vm.host_id)

    restored = accept_restore(story, increment, "db2", to_host=elsewhere)
    story.settle()

    assert story.operation(restored.id).state is OperationState.DONE, story.operation(restored.id).error
    again = story.vm(restored.subject_id)
    assert (again.host_id, again.name, again.vcpus) == (elsewhere, "db2", vm.vcpus)
    assert again.uuid != vm.uuid
    assert story.running_on(again.id) == {elsewhere}
    assert content_of(story, again.id) == before
    assert story.db.read(lambda session: backups.get(session, increment.id)).level == 2, "it was read back and compared"
    assert audit_invariants(story) == []
