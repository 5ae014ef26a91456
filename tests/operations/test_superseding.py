"""A delete or a forced stop takes over from whatever is under way with its vm, at any step."""

import pytest

from tests.operations.endings import ended
from tests.operations.faults import DriverDied
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation

JOIN_TIMEOUT_S = 20.0


@pytest.mark.parametrize("step", ["own", "place", "bring_images", "make_volumes", "define", "power_on"])
def test_a_delete_supersedes_a_create_at_any_step(story: FleetStory, step: str) -> None:
    vm, operation = story.accept_create("web1")
    stop_after(story, operation, step)
    deletion = story.accept_power(story.vm(vm.id), "delete")
    story.settle()
    ended(story, operation, OperationState.FAILED)
    ended(story, deletion, OperationState.DONE)
    assert story.running_on(vm.id) == frozenset()
    purge = story.accept("vm.purge", vm.id, {"vm_id": vm.id})
    story.settle()
    ended(story, purge, OperationState.DONE)
    assert all(not store.volumes for store in stores(story)), "no disk is left"


@pytest.mark.parametrize("step", ["place", "check", "prepare", "move", "switch", "settle"])
@pytest.mark.parametrize("pool", ["shared", "local"])
def test_a_delete_supersedes_a_migration_at_any_step(story: FleetStory, step: str, pool: str) -> None:
    vm = story.running_vm("web1", pool=getattr(story, pool))
    operation = story.accept_power(vm, "migrate")
    stop_after(story, operation, step)
    deletion = story.accept_power(story.vm(vm.id), "delete")
    story.settle()
    ended(story, operation, OperationState.FAILED)
    ended(story, deletion, OperationState.DONE)
    assert story.running_on(vm.id) == frozenset()
    restored = story.accept_power(story.vm(vm.id), "undelete")
    story.settle()
    ended(story, restored, OperationState.DONE)
    started = story.accept_power(story.vm(vm.id), "start")
    story.settle()
    ended(story, started, OperationState.DONE)


@pytest.mark.parametrize("step", ["place", "check", "prepare", "move", "switch", "settle"])
@pytest.mark.parametrize("pool", ["shared", "local"])
def test_a_forced_stop_supersedes_a_migration_at_any_step(story: FleetStory, step: str, pool: str) -> None:
    vm = story.running_vm("web1", pool=getattr(story, pool))
    operation = story.accept_power(vm, "migrate")
    stop_after(story, operation, step)
    stop = story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    ended(story, operation, OperationState.FAILED)
    ended(story, stop, OperationState.DONE)
    assert story.running_on(vm.id) == frozenset()
    started = story.accept_power(story.vm(vm.id), "start")
    story.settle()
    ended(story, started, OperationState.DONE)


@pytest.mark.parametrize("verb", ["delete", "stop"])
def test_who_supersedes_a_migration_keeps_the_disk_that_the_guest_wrote_to_last(story: FleetStory, verb: str) -> None:
    """It had moved, and only the engine did not know yet: the source's disk is stale by then."""
    vm = story.running_vm("web1", pool=story.local)
    operation = story.accept_power(vm, "migrate")
    switched = story.hold("migrate.switched", Fault(FaultKind.HANG))
    story.settle(until=switched.met.is_set)
    assert switched.met.wait(JOIN_TIMEOUT_S)
    assert story.journal(operation.id)[-1] == "do prepare"
    target = next(iter(story.running_on(vm.id)))
    superseding = story.accept_power(vm, verb, **({"force": True} if verb == "stop" else {}))
    switched.released.set()
    story.settle()
    ended(story, superseding, OperationState.DONE)
    assert target != vm.host_id
    assert {volume.host_id for volume in story.volumes(vm.id)} == {target}


def test_a_delete_ends_the_guest_on_both_sides_while_it_is_copied(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    copying = story.hold("migrate.copying", Fault(FaultKind.HANG))
    operation = story.accept_power(vm, "migrate")
    story.settle(until=copying.met.is_set)
    assert copying.met.wait(JOIN_TIMEOUT_S)
    deletion = story.accept_power(vm, "delete")
    story.settle(until=lambda: story.operation(deletion.id).state is OperationState.DONE)
    assert story.running_on(vm.id) == frozenset()
    copying.released.set()
    story.wait_for_jobs()
    story.settle()
    ended(story, operation, OperationState.FAILED)
    ended(story, deletion, OperationState.DONE)
    assert story.running_on(vm.id) == frozenset(), "the migration that ended late brought nothing back"


def stop_after(story: FleetStory, operation: Operation, step: str) -> None:
    """Drive until `step` is recorded and let the driver die there."""

    def on_step(_kind: str, name: str, outcome: str, _seconds: float) -> None:
        if name == step and outcome == "succeeded":
            raise DriverDied

    with pytest.raises(DriverDied):
        story.settle(story.new_engine(on_step=on_step))
    assert story.journal(operation.id)[-1] == f"do {step}"


def stores(story: FleetStory) -> list[object]:
    from trimtab_controller.store import describe

    return [
        story.fleet.store(host_id, describe.pool_spec(pool)) for pool in (story.shared, story.local) for host_id in story.host_ids
    ]
