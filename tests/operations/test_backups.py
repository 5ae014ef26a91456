"""Backups through every layer but libvirt: a repository is made, a vm backed up, changed, backed up, deleted, restored elsewhere."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.operations.backup_kit import (
    accept_backup,
    accept_repo,
    accept_restore,
    accept_rotation,
    backup_of,
    content_of,
    give_policy,
    made_backup,
    ready_repo,
    repo_spec,
    write_to,
)
from tests.operations.emptied import empty
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller import repository_keys
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.loops import backups as backup_loops
from trimtab_controller.loops.backups import BackupLoop
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backup_restore, backup_status
from trimtab_controller.services import backups as backup_service
from trimtab_controller.store import backup_repos, backups, hosts, operations, vms
from trimtab_protos.errors import Conflict, NoCapacity
from trimtab_protos.messages import CommandKey, Direction


def test_a_vm_that_was_backed_up_changed_and_deleted_comes_back_on_another_host_as_it_was(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db", pool=story.local, start_group="shop", start_order=2, start_delay_s=20)
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
    assert (again.start_group, again.start_order, again.start_delay_s) == ("shop", 2, 20)
    assert again.uuid != vm.uuid
    assert story.running_on(again.id) == {elsewhere}
    assert content_of(story, again.id) == before
    assert story.db.read(lambda session: backups.get(session, increment.id)).level == 2, "it was read back and compared"
    assert audit_invariants(story) == []


# --- what bad input and bad luck get -----------------------------------------------------------------------------------------


def error_of(story: FleetStory, operation_id: str) -> str:
    error = story.operation(operation_id).error
    assert error is not None
    return error.code


def test_a_repository_opened_with_another_key_or_by_another_fleet_or_that_is_not_there_says_so(story: FleetStory) -> None:
    spec = repo_spec(story, "main")
    accept_repo(story, spec)
    story.settle()
    story.db.write(lambda session: repo_service.delete(session, "main", expected_version=None, now=story.clock.now()))
    wrong = accept_repo(story, repo_spec(story, "wrong", url=spec.url, key=repository_keys.new_key()))
    story.settle()
    assert error_of(story, wrong.id) == "repository-key-wrong"
    assert "is locked with the key" in story.db.read(lambda session: backup_repos.get(session, wrong.subject_id)).problem
    key = story.secrets.open(spec.wrapped_key, place=spec.repo_id)
    story.db.write(lambda session: repo_service.delete(session, "wrong", expected_version=None, now=story.clock.now()))
    foreign = accept_repo(story, repo_spec(story, "foreign", url=spec.url, key=key, fleet_id="fleet-of-somebody-else"))
    story.settle()
    assert error_of(story, foreign.id) == "repository-of-another-fleet"
    absent = accept_repo(story, repo_spec(story, "absent", key=key))
    story.settle()
    assert error_of(story, absent.id) == "repository-not-found", "one that is opened with a key is never made"


def test_backups_go_on_while_a_key_is_rotated_and_other_hosts_take_the_new_key_up(story: FleetStory) -> None:
    repo = ready_repo(story)
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, b"before")
    first = made_backup(story, vm)
    before = content_of(story, vm.id)
    rotation, key = accept_rotation(story, repo.name)
    with pytest.raises(Conflict) as again:
        accept_rotation(story, repo.name)
    assert again.value.code == "key-rotation-running", "a key that may count already is never replaced"
    # The lock changed and the row did not yet: whatever opens the repository now finds that the next key is the one.
    present = story.db.read(lambda session: backup_repos.get(session, repo.id))
    for host_id in story.host_ids:
        story.client.open_repository(host_id, _open_key(rotation, host_id), present)
    story.client.rotate_key(story.host_ids[0], _open_key(rotation, "rotate"), present)
    during = accept_backup(story, vm)
    story.settle()
    assert {story.operation(one.id).state for one in (rotation, during)} == {OperationState.DONE}
    after = story.db.read(lambda session: backup_repos.get(session, repo.id))
    assert (after.key_id, after.next_key_id) == (repository_keys.key_id(key), "")
    assert story.secrets.open(after.wrapped_key, place=repo.id) == key
    restored = accept_restore(story, first, "db2", to_host=_another(story, vm.host_id))
    story.settle()
    assert story.operation(restored.id).state is OperationState.DONE, story.operation(restored.id).error
    assert content_of(story, restored.subject_id) == before
    assert audit_invariants(story) == []


def _another(story: FleetStory, host_id: str) -> str:
    other = next(one for one in story.host_ids if one != host_id)
    return story.db.read(lambda session: hosts.get(session, other)).name


def _open_key(operation: Operation, part: str) -> CommandKey:
    return CommandKey(
        operation_id=operation.id, step=f"test/{part}", direction=Direction.DO, turn=1, subject_id=operation.id, epoch=0
    )


def test_a_node_with_another_secret_opens_no_repository_and_says_what_to_do(story: FleetStory) -> None:
    spec = repo_spec(story, "main")
    (story.directory / "secrets.key").write_bytes(bytes(32))
    with pytest.raises(Conflict) as refused:
        story.secrets.open(spec.wrapped_key, place=spec.repo_id)
    assert refused.value.code == "secret-unreadable"
    assert "repo create" in refused.value.message


def test_a_vm_that_is_deleted_during_its_backup_ends_the_backup_and_harms_no_earlier_one(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    earlier = made_backup(story, vm)
    running = accept_backup(story, vm)
    story.accept_power(vm, "delete")
    story.settle()
    assert story.operation(running.id).state is OperationState.CANCELLED
    assert backup_of(story, running).state == "failed"
    assert story.db.read(lambda session: backups.get(session, earlier.id)).state == "ready"
    restored = accept_restore(story, earlier, "db2")
    story.settle()
    assert story.operation(restored.id).state is OperationState.DONE, story.operation(restored.id).error
    assert audit_invariants(story) == []


def test_a_full_target_fails_the_backup_with_what_to_do_and_the_guest_runs_on(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    source: Any = story.agents.agent(vm.host_id).parts.backups
    source.look_at(vm.id).disks["vda"].write(0, b"x")
    source.fails_with = NoCapacity("repository-full", "the repository's storage has no room left; `trimtab backup prune`")
    operation = accept_backup(story, vm)
    story.settle()
    assert error_of(story, operation.id) == "repository-full"
    backup = backup_of(story, operation)
    assert (backup.state, "prune" in backup.problem) == ("failed", True)
    assert story.running_on(vm.id) == {vm.host_id}
    source.fails_with = None
    assert made_backup(story, vm).state == "ready"


def test_what_does_not_go_beside_a_backup_is_refused_and_names_it(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    running = accept_backup(story, vm)
    with pytest.raises(Conflict) as refused:
        story.accept_power(vm, "migrate")
    assert running.id in refused.value.message
    with pytest.raises(Conflict) as second:
        accept_backup(story, vm)
    assert running.id in second.value.message
    paused = story.accept_power(vm, "pause")
    story.settle()
    assert {story.operation(one.id).state for one in (running, paused)} == {OperationState.DONE}
    moving = story.accept_power(story.vm(vm.id), "resume")
    story.settle()
    moving = story.accept_power(story.vm(vm.id), "migrate")
    with pytest.raises(Conflict) as busy:
        accept_backup(story, story.vm(vm.id))
    assert moving.id in busy.value.message
    story.settle()


def test_an_increment_after_a_migration_is_right_whatever_it_had_to_read(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    full = made_backup(story, vm)
    story.accept_power(vm, "migrate")
    story.settle()
    write_to(story, vm.id, 0, b"after the move")
    after = made_backup(story, story.vm(vm.id))
    assert after.base_id == full.id
    assert "does not know the checkpoint" in after.full_reason, "its checkpoints stayed on the other host, and it says so"
    restored = accept_restore(story, after, "db2")
    story.settle()
    assert content_of(story, restored.subject_id) == content_of(story, vm.id)


def test_another_fleet_brings_a_vm_back_from_the_repository_and_its_key_alone(new_story: Callable[..., FleetStory]) -> None:
    story = new_story()
    spec = repo_spec(story, "main")
    accept_repo(story, spec)
    story.settle()
    vm = story.running_vm("db", labels={"tier": "data"})
    write_to(story, vm.id, 0, b"what counts")
    before = content_of(story, vm.id)
    made_backup(story, vm)
    key = story.secrets.open(spec.wrapped_key, place=spec.repo_id)
    empty(story.db)
    other = new_story()
    (other.directory / "secrets.key").unlink(missing_ok=True)
    assert other.secrets.fleet_id != spec.fleet_id

    accept_repo(other, repo_spec(other, "found", url=spec.url, key=key, fleet_id=spec.fleet_id))
    other.settle()
    other.db.write(lambda session: repo_service.rebuild(session, "found", actor=other.actor, now=other.clock.now()))
    other.settle()
    (found,) = other.db.read(lambda session: backups.of_repo(session, backup_repos.live(session)[0].id))
    restored = accept_restore(other, found, "db")
    other.settle()
    assert other.operation(restored.id).state is OperationState.DONE, other.operation(restored.id).error
    again = other.vm(restored.subject_id)
    assert (again.labels, again.vcpus, again.memory_mib) == ({"tier": "data"}, vm.vcpus, vm.memory_mib)
    assert content_of(other, again.id) == before


def test_a_guest_that_does_not_come_up_fails_no_operation_and_the_backup_shows_it(story: FleetStory) -> None:
    ready_repo(story)
    backup = made_backup(story, story.running_vm("db"))
    operation = story.db.write(
        lambda session: backup_restore.boot_test(
            session, backup, project=story.project, pattern="login:", timeout_s=30, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    shown = story.db.read(lambda session: backups.get(session, backup.id))
    assert (shown.level, shown.booted_at) == (2, None)
    assert "did not show `login:`" in shown.problem
    assert audit_invariants(story) == []


# --- policies ------------------------------------------------------------------------------------------------------------------


def night(story: FleetStory, loop: BackupLoop) -> None:
    """Let a day pass: what a policy wants of it is asked for and done."""
    story.clock.advance(86400)
    for job in (loop.ask, loop.verify, loop.retain):
        job(story.term)
        story.settle()


def test_a_policy_backs_up_each_night_verifies_and_keeps_as_many_as_it_says(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    give_policy(story, vm, keep_daily=3, verify="read", max_age_s=90_000)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    loop.ask(story.term)
    story.settle()
    assert story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id] == [], "not before its time"
    for number in range(5):
        write_to(story, vm.id, 65536 * number, b"night")
        night(story, loop)
    listed = story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]
    assert [one.level for one in listed] == [1, 1, 1]
    in_repository, _ = story.client.list_backups(story.host_ids[0], listed[0].repo_id)
    assert {one.backup_id for one in in_repository} == {one.id for one in listed}
    (status,) = story.db.read(lambda session: backup_status.status(session, project_ids=None, now=story.clock.now()))
    assert (status.protection.problem, status.protection.last_verified) == ("", listed[-1])
    loop.measure(story.term)
    story.clock.advance(2 * 86400)
    (late,) = story.db.read(lambda session: backup_status.status(session, project_ids=None, now=story.clock.now()))
    assert "at most" in late.protection.problem


def test_what_was_read_long_ago_is_read_again_the_longest_first_and_one_at_a_time(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger, read_again_after=timedelta(days=30))

    def reading() -> list[str]:
        found = story.db.read(lambda session: operations.page(session, limit=10, kind="backup.verify", is_done=False))
        return [one.subject_id for one in found]

    made = []
    for _ in range(3):
        made.append(made_backup(story, vm))
        story.clock.advance(3600)
    for backup in (made[1], made[0]):
        story.db.write(
            lambda session, one=backup: backup_service.accept_verify(session, one, actor=story.actor, now=story.clock.now())
        )
        story.settle()
        story.clock.advance(3600)
    loop.read_again(story.term)
    assert reading() == []
    story.clock.advance(30 * 86400)
    for expected in (made[1], made[0]):
        loop.read_again(story.term)
        loop.read_again(story.term)
        assert reading() == [expected.id]
        story.settle()
    loop.read_again(story.term)
    assert reading() == [], "the third was never read: that is for its policy to say"
    BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger, read_again_after=timedelta()).read_again(story.term)
    assert reading() == []


def test_a_backup_that_could_not_be_asked_for_is_asked_for_again_soon(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    give_policy(story, vm)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    story.clock.advance(86400)
    story.accept_power(vm, "migrate")
    loop.ask(story.term)
    assert backup_loops.RETRY.total_seconds() < 600
    story.settle()
    story.clock.advance(backup_loops.RETRY.total_seconds())
    loop.ask(story.term)
    story.settle()
    assert len(story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]) == 1


def test_a_held_backup_stays_whatever_the_policy_says(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    give_policy(story, vm, keep_last=1)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    night(story, loop)
    (held,) = story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]
    until = story.clock.now() + timedelta(days=365)
    story.db.write(lambda session: backup_service.hold(session, held.id, until, project=story.project))
    for _ in range(3):
        night(story, loop)
    kept = [one.id for one in story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]]
    assert (len(kept), kept[0]) == (2, held.id)
    with pytest.raises(Conflict, match="held until"):
        story.db.write(
            lambda session: backup_service.delete(
                session, held.id, project=story.project, actor=story.actor, now=story.clock.now()
            )
        )


def test_uefi_variables_come_back_beside_the_disk_that_a_vm_boots_from(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db", firmware="uefi")
    backup = made_backup(story, vm)
    restored = accept_restore(story, backup, "db2")
    story.settle()
    again = story.vm(restored.subject_id)
    source: Any = story.agents.agent(again.host_id).parts.backups
    assert source.nvrams == {again.id: vm.id.encode()}
    assert again.firmware == "uefi"


@pytest.mark.parametrize(("asked", "restored"), [("", "Haswell"), ("auto", ""), ("qemu64", "qemu64")])
def test_a_vm_comes_back_with_its_cpu_model_another_or_whatever_its_new_host_has(
    story: FleetStory, asked: str, restored: str
) -> None:
    ready_repo(story)
    vm = story.running_vm("db", cpu_model="Haswell")
    backup = made_backup(story, vm)
    operation = accept_restore(story, backup, "db2", cpu_model=asked)
    accepted = story.vm(operation.subject_id)
    assert accepted.cpu_model == restored
    story.settle()
    assert story.operation(operation.id).state.value == "done", story.operation(operation.id).error


def test_the_backup_after_a_vm_was_taken_back_in_place_is_full_and_says_why(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, b"first" * 1000)
    backup = made_backup(story, vm)
    write_to(story, vm.id, 0, b"other" * 1000)
    later = made_backup(story, vm)
    story.accept_power(story.vm(vm.id), "stop")
    story.settle()
    operation = story.db.write(
        lambda session: backup_restore.replace(
            session, backup.id, vms.get(session, vm.id), project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    assert content_of(story, vm.id).startswith(b"first" * 1000)
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    after = made_backup(story, story.vm(vm.id))
    assert after.full_reason == f"vda: it is another volume than in {later.id}"
    assert after.read_bytes >= backup.read_bytes
    assert made_backup(story, story.vm(vm.id)).full_reason == ""
    restored = accept_restore(story, after, "db2")
    story.settle()
    assert content_of(story, restored.subject_id) == content_of(story, vm.id)
