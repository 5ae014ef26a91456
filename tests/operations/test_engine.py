"""The engine on both databases: it drives, waits, turns round, gives up, and never lets two drivers act."""

from tests.operations.kit import FleetStory, claims_of
from trimtab_controller.core.lifecycle import ObservedState, OperationState


def test_an_accepted_vm_ends_up_running_where_it_was_placed(story: FleetStory) -> None:
    vm, operation = story.accept_create("web1")
    story.settle()
    ended = story.operation(operation.id)
    assert ended.state is OperationState.DONE, ended.error
    seen = story.vm(vm.id)
    assert (seen.observed_state, seen.host_id) == (ObservedState.RUNNING, ended.result["host_id"])
    assert story.running_on(vm.id) == {seen.host_id}
    assert claims_of(story, vm.id) == {seen.host_id: "home"}
