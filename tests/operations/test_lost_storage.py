"""A host that lost its storage: a guest that stands still for it starts elsewhere once its process is gone; nothing else is touched."""

from collections.abc import Callable, Iterator

import pytest

from tests.operations.failover_kit import Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.failover import LEADERS_WINDOW_S
from trimtab_controller.store import schema

LED = int(LEADERS_WINDOW_S) + 4
GRACE = int(FailoverSettings().storage_grace_s)


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def lose_storage(story: Story, vm: Vm) -> None:
    """The host's own way to the pool is cut; QEMU pauses the guest at its first write."""
    story.heartbeats(LED)
    story.cut_storage(vm.host_id)
    story.fleet.hypervisor(vm.host_id).fail_disk(vm.id)
    story.hear()
    assert story.fleet.vm(vm.id).observed_state is ObservedState.PAUSED


def test_a_guest_that_waits_for_lost_storage_starts_elsewhere_once_it_is_gone(story: Story) -> None:
    vm = story.kept_vm()
    lose_storage(story, vm)
    story.heartbeats(GRACE - 2)
    assert story.fleet.running_on(vm.id) == {vm.host_id}, "the storage may come back within the grace"
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]
    story.heartbeats(40)
    assert story.is_home_again(vm)
    assert not story.fleet.fleet.double_runs
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create", "vm.stop", "vm.recover"]
    assert not story.device.asked
    assert story.fleet.vm(vm.id).problem == ""


def test_nothing_starts_elsewhere_while_its_process_does_not_go(story: Story) -> None:
    vm = story.kept_vm()
    lose_storage(story, vm)
    story.fleet.hypervisor(vm.host_id).stop_answering()
    story.heartbeats(GRACE + 60)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert "vm.recover" not in [one.kind for one in story.operations(vm.id)]


def test_a_guest_whose_storage_comes_back_in_time_stays(story: Story) -> None:
    vm = story.kept_vm()
    lose_storage(story, vm)
    story.heartbeats(20)
    story.cut_storage()
    story.heartbeats(GRACE + 30)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]


def test_a_guest_that_waits_for_a_pool_which_is_down_for_all_stays(story: Story) -> None:
    vm = story.kept_vm()
    lose_storage(story, vm)
    story.cut_storage(*story.fleet.host_ids)
    story.heartbeats(GRACE + 40)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]


def test_a_guest_that_its_owner_paused_is_nobodys_to_move(story: Story) -> None:
    vm = story.kept_vm()
    paused = story.fleet.accept_power(vm, "pause")
    story.fleet.settle()
    assert story.fleet.operation(paused.id).error is None
    story.heartbeats(LED)
    story.cut_storage(vm.host_id)
    story.hear()
    story.heartbeats(GRACE + 30)
    assert story.troubles()
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create", "vm.pause"]


@pytest.mark.parametrize("is_stopped", [False, True], ids=["before the kill", "after the kill"])
def test_a_leader_that_dies_in_the_middle_leaves_no_vm_behind(story: Story, is_stopped: bool) -> None:
    vm = story.kept_vm()
    lose_storage(story, vm)

    def has_begun() -> bool:
        kinds = [one.kind for one in story.operations(vm.id)]
        return "vm.stop" in kinds and (not is_stopped or not story.fleet.running_on(vm.id))

    for _second in range(GRACE + 30):
        if has_begun():
            break
        story.heartbeats(1)
    assert has_begun()
    story.new_leader()
    story.heartbeats(LED + 60)
    assert story.is_home_again(vm)
    assert not story.fleet.fleet.double_runs


def test_a_host_without_one_pool_takes_vms_of_others(story: Story) -> None:
    other = story.fleet.add_pool("other", is_shared=True)
    first, second, third = story.fleet.host_ids
    story.kept_vm("here", to_host_id=first)
    vm = story.kept_vm("there", to_host_id=second, pool=other, image=story.fleet.add_image("small", other))
    story.fleet.db.write(
        lambda session: session.execute(schema.host.update().where(schema.host.c.id == third).values(is_cordoned=True))
    )
    story.arm(second)
    story.heartbeats(LED)
    story.cut_storage(first)
    story.heartbeats(12)
    assert not story.loop.state.hosts[first].has_storage
    story.silence(second, HostConnectivity.SUSPECT)
    story.heartbeats(2)
    story.silence(second, HostConnectivity.LOST)
    story.heartbeats(30)
    assert story.is_home_again(vm)
    assert story.fleet.vm(vm.id).host_id == first
