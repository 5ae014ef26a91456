"""What a guest's hook comes to in a backup's row, and what a policy that demands one keeps."""

from typing import Any

import pytest

from tests.operations.backup_kit import accept_backup, accept_together, backup_of, give_policy, made_backup, ready_repo
from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.loops.backups import BackupLoop
from trimtab_controller.store import backup_instants, backups, vms


@pytest.fixture
def db(story: FleetStory) -> Vm:
    ready_repo(story)
    return story.running_vm("db")


def guest(story: FleetStory, vm: Vm) -> Any:
    source: Any = story.agents.agent(vm.host_id).parts.backups
    return source.look_at(vm.id)


def ended(story: FleetStory, operation: Operation) -> Operation:
    story.settle()
    return story.operation(operation.id)


def test_a_backup_says_what_the_guests_hook_came_to(story: FleetStory, db: Vm) -> None:
    guest(story, db).hook_exits = 0
    held = made_backup(story, db)
    assert (held.consistency, held.downgrade, held.problem) == ("application", "", "")
    guest(story, db).hook_exits, guest(story, db).hook_says = 9, "no room for the log"
    failed = made_backup(story, db)
    assert (failed.state, failed.consistency) == ("ready", "filesystem")
    assert failed.downgrade == "the guest's hook failed with exit code 9: no room for the log"
    assert guest(story, db).hooked == ["freeze", "thaw"] * 2


def test_applications_that_may_be_held_still_are_the_problem_of_a_good_backup(story: FleetStory, db: Vm) -> None:
    guest(story, db).hook_exits, guest(story, db).hook_thaw_says = 0, "thaw failed with exit code 1: still locked"
    made = made_backup(story, db)
    assert (made.state, made.consistency) == ("ready", "application")
    assert made.problem == "thaw failed with exit code 1: still locked"


def test_a_policy_that_demands_it_keeps_nothing_less(story: FleetStory, db: Vm) -> None:
    give_policy(story, db, needs_application=True)
    refused = ended(story, accept_backup(story, story.vm(db.id), repo=""))
    assert refused.error is not None
    assert (refused.state.value, refused.error.code) == ("failed", "backup-not-hooked")
    assert "the guest has no hook" in refused.error.message
    assert backup_of(story, refused).state == "failed"
    guest(story, db).hook_exits = 0
    assert made_backup(story, story.vm(db.id), repo="").consistency == "application"
    guest(story, db).hook_exits = 1
    less = made_backup(story, story.vm(db.id), repo="", needs_application=False)
    assert less.consistency == "filesystem", "asked for by hand"


def test_an_instant_that_demands_it_is_broken_by_the_member_whose_hook_fails(story: FleetStory, db: Vm) -> None:
    web = story.running_vm("web")
    guest(story, db).hook_exits = guest(story, web).hook_exits = 0
    for exits, state in ((0, "consistent"), (3, "broken")):
        guest(story, web).hook_exits = exits
        operation = accept_together(story, [db, web], needs_application=True)
        story.settle()
        instant = story.db.read(lambda session, one=operation: backup_instants.get(session, one.subject_id))
        assert instant.state == state, instant.problem
        made = {row["vm_name"]: story.db.read(lambda s, row=row: backups.get(s, row["backup_id"])) for row in instant.members}
        assert made["db"].consistency == "application"
        assert made["web"].consistency == ("application" if not exits else "")


def test_a_policy_that_takes_its_vms_together_demands_it_of_all_of_them(story: FleetStory, db: Vm) -> None:
    web = story.running_vm("web")
    guest(story, db).hook_exits, guest(story, web).hook_exits = 0, 3
    give_policy(story, db, needs_application=True, is_together=True)
    policy_id = story.vm(db.id).backup_policy_id
    story.db.write(
        lambda session: [vms.update(session, one.id, backup_policy_id=policy_id, backup_asked_at=None) for one in (db, web)]
    )
    BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger).ask(story.term)
    story.settle()
    instant = story.db.read(lambda session: backup_instants.find(session, story.project.id, "nightly"))
    assert instant is not None
    assert instant.state == "broken"
    states = {row["vm_name"]: story.db.read(lambda s, row=row: backups.get(s, row["backup_id"])).state for row in instant.members}
    assert states == {"db": "ready", "web": "failed"}
