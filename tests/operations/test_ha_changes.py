"""A vm that is to be kept is known to its host's warden before SQL says so, and until after SQL says that it is not."""

import pytest

from tests.operations.backup_kit import made_backup, ready_repo
from tests.operations.examples_changes import accept_ha
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.base import DomainChange
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.store import schema, volumes
from trimtab_protos.errors import Conflict


@pytest.mark.parametrize(("before", "after"), [("none", "restart"), ("restart", "none")])
def test_sql_says_that_a_vm_is_kept_only_while_its_host_knows(story: FleetStory, before: str, after: str) -> None:
    vm = story.running_vm("db", ha=before)
    told: list[tuple[bool, str]] = []

    def listen(change: DomainChange) -> None:
        if change.domain.vm_id == vm.id:
            told.append((change.domain.restarts_elsewhere, story.vm(vm.id).ha))

    story.hypervisor(vm.host_id).subscribe(listen)
    operation = accept_ha(story, vm, after)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    assert told[0] == (after == "restart", "none")
    assert story.vm(vm.id).ha == after
    assert len(story.running_on(vm.id)) == 1


def test_a_vm_of_a_host_that_is_gone_is_let_go_of_without_it(story: FleetStory) -> None:
    vm = story.running_vm("db", ha="restart")
    table = schema.host
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == vm.host_id).values(connectivity="lost")))
    operation = accept_ha(story, vm, "none")
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state, ended.result) == (OperationState.DONE, {"is_host_told": False})
    assert story.vm(vm.id).ha == "none"


def test_a_vm_of_which_only_the_order_changes_is_not_touched(story: FleetStory) -> None:
    vm = story.running_vm("db", ha="restart")
    seen: list[DomainChange] = []
    story.hypervisor(vm.host_id).subscribe(seen.append)
    accept_ha(story, vm, None, priority=7)
    story.settle()
    assert (story.vm(vm.id).ha, story.vm(vm.id).priority, seen) == ("restart", 7, [])


def test_a_vm_that_runs_on_a_backup_is_not_kept(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    backup = made_backup(story, vm)
    volume_id = story.volumes(vm.id)[0].id
    story.db.write(lambda session: volumes.set_filling(session, volume_id, backup_id=backup.id, disk="vda"))
    with pytest.raises(Conflict, match=r"kind=vm\.fill") as refused:
        accept_ha(story, vm, "restart")
    assert refused.value.code == "vm-filling"


@pytest.mark.parametrize(
    ("before", "after", "state"), [("restart", "none", OperationState.DONE), ("none", "restart", OperationState.FAILED)]
)
def test_one_that_a_forced_stop_supersedes_is_done_where_its_acceptance_was_all_of_it(
    story: FleetStory, before: str, after: str, state: OperationState
) -> None:
    vm = story.running_vm("db", ha=before)
    operation = accept_ha(story, vm, after)
    story.accept_power(vm, "stop", force=True)
    story.settle()
    ended = story.operation(operation.id)
    assert (ended.state, story.vm(vm.id).ha) == (state, "none")
    assert ended.result == ({"is_host_told": False} if state is OperationState.DONE else None)
    assert story.running_on(vm.id) == frozenset()
