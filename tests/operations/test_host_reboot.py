"""host.reboot: the host is emptied first, or its guests are stopped and started again; it is open again afterwards."""

from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity, OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services import host_reboots
from trimtab_controller.store import hosts, plans, schema


def reboot(story: FleetStory, host_id: str, *, force: bool = False) -> Operation:
    return story.db.write(
        lambda session: host_reboots.reboot(
            session, hosts.get(session, host_id), force=force, actor=story.actor, now=story.clock.now()
        )
    )


def settled(story: FleetStory, operation: Operation) -> Operation:
    story.settle()
    return story.operation(operation.id)


def is_open(story: FleetStory, host_id: str) -> bool:
    is_held = bool(story.db.read(lambda session: plans.maintenance_of(session, [host_id])))
    return not is_held and not story.db.read(lambda session: hosts.get(session, host_id)).is_cordoned


def local_vm(story: FleetStory) -> Vm:
    return story.running_vm("pinned", pool=story.local)


def test_vms_are_moved_away_before_their_host_restarts(story: FleetStory) -> None:
    vm = story.running_vm()
    ended = settled(story, reboot(story, vm.host_id))
    assert ended.state is OperationState.DONE
    assert story.rebooted == [vm.host_id]
    moved = story.vm(vm.id)
    assert moved.host_id != vm.host_id
    assert story.running_on(vm.id) == {moved.host_id}, "it ran all the time"
    assert is_open(story, vm.host_id)


def test_a_host_that_cannot_be_emptied_does_not_restart_and_is_open_again(story: FleetStory) -> None:
    vm, table = local_vm(story), schema.host
    elsewhere = table.update().where(table.c.id != vm.host_id)
    story.db.write(lambda session: session.execute(elsewhere.values(is_cordoned=True)))
    ended = settled(story, reboot(story, vm.host_id))
    assert ended.state is OperationState.FAILED
    assert ended.error is not None
    assert ended.error.code == "host-not-empty"
    assert "pinned" in ended.error.message
    assert story.rebooted == []
    assert story.running_on(vm.id) == {vm.host_id}
    assert is_open(story, vm.host_id)


def test_force_stops_what_is_there_and_starts_it_again_once_the_host_is_back(story: FleetStory) -> None:
    vm = local_vm(story)
    ended = settled(story, reboot(story, vm.host_id, force=True))
    assert ended.state is OperationState.DONE
    assert story.rebooted == [vm.host_id]
    assert story.running_on(vm.id) == {vm.host_id}
    assert story.vm(vm.id).desired_power is DesiredPower.RUNNING
    assert is_open(story, vm.host_id)


def test_a_hold_that_an_operator_began_outlives_the_restart(story: FleetStory) -> None:
    host_id = story.host_ids[0]
    story.db.write(
        lambda session: plans.hold_host(
            session, host_id, plan_id="", was_cordoned=False, created_by="alice", now=story.clock.now()
        )
    )
    assert settled(story, reboot(story, host_id)).state is OperationState.DONE
    assert story.db.read(lambda session: plans.maintenance_of(session, [host_id]))


def test_a_host_that_does_not_come_back_keeps_its_hold_and_somebody_is_asked(story: FleetStory) -> None:
    host_id, table = story.host_ids[0], schema.host
    lost = table.update().where(table.c.id == host_id).values(connectivity=HostConnectivity.LOST.value)
    story.agents.on_reboot = lambda _host_id: story.db.write(lambda session: session.execute(lost))
    operation = reboot(story, host_id)
    story.settle()
    assert story.operation(operation.id).state is OperationState.NEEDS_ATTENTION
    assert not is_open(story, host_id)
