"""Steps that need no agent share the commit of the record before them: fewer commits, and nothing else that anybody could notice."""

import pytest

from tests.operations.faults import Behaviour, DriverDied, Misbehaving, MortalDatabase, StepFault
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState

STEPS_OF_A_CREATE = [
    "do own",
    "do place",
    "do note_images",
    "do bring_images",
    "do make_volumes",
    "do define",
    "do power_on",
    "do finish",
]


def test_a_create_keeps_every_record_and_commits_once_for_each_command(story: FleetStory) -> None:
    story.running_vm("web0")  # its image is where it is needed from now on
    _vm, operation = story.accept_create("web1")
    story.placement.run(story.term)
    database = MortalDatabase(story.db, dies_at_write=0, after_commit=False)
    while story.new_engine(db=database, shares_commits=True).drive_due():
        pass
    assert list(story.journal(operation.id)) == STEPS_OF_A_CREATE
    # One for each of volume, domain and power, one before them; the others are claims of rows.
    drives = database.writes - 4
    assert 1 <= drives <= 2, f"{database.writes} transactions"
    assert story.operation(operation.id).state is OperationState.DONE


def test_a_step_that_fails_in_company_is_undone_alone_and_not_run_again(story: FleetStory) -> None:
    fault = StepFault("vm.create", "finish", Behaviour.UNAVAILABLE, times=1)
    vm, operation = story.accept_create("web1")
    engine = story.new_engine(saga_of=Misbehaving(fault), shares_commits=True)
    story.settle(engine, until=lambda: fault.met == 1)
    assert list(story.journal(operation.id)) == STEPS_OF_A_CREATE[:-1], "what was recorded before it stays recorded"
    assert story.operation(operation.id).attempts == 1, "the failure counts, it was not tried again at once"
    story.settle(engine)
    assert story.operation(operation.id).state is OperationState.DONE
    assert story.running_on(vm.id)
    assert audit_invariants(story) == []


@pytest.mark.parametrize("after_commit", [False, True])
@pytest.mark.parametrize("kind", ["create", "migrate"])
def test_a_driver_that_dies_at_any_shared_commit_is_taken_over(story: FleetStory, kind: str, after_commit: bool) -> None:
    number, has_died = 0, True
    while has_died:
        number += 1
        if kind == "create":
            vm, operation = story.accept_create(f"web{number}")
        else:
            vm = story.running_vm(f"web{number}")
            operation = story.accept_power(vm, "migrate")
        database = MortalDatabase(story.db, number, after_commit)
        try:
            story.settle(story.new_engine(db=database, shares_commits=True))
        except DriverDied:
            story.lose_driver()
            story.settle(story.new_engine(shares_commits=True))
        has_died = database.has_died
        assert story.operation(operation.id).state is OperationState.DONE, number
        assert len(story.running_on(vm.id)) == 1
        assert audit_invariants(story) == []
    assert number > 5, "it died at each of several commits"
