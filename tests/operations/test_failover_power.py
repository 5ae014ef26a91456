"""All power is lost and comes back; a host has two power devices."""

from collections.abc import Callable, Iterator

import pytest

from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.api.context import NoSecrets
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.fencing import FencePath
from trimtab_controller.services import fencing
from trimtab_controller.store import hosts

SILENT = (HostConnectivity.SUSPECT, HostConnectivity.LOST)


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def test_after_the_loss_of_all_power_kept_vms_start_by_priority_without_an_operator(story: Story) -> None:
    priorities = {"low": 0, "high": 9, "mid": 5}
    kept = [story.kept_vm(name, priority=priority) for name, priority in priorities.items()]
    loose = story.fleet.running_vm("loose")
    story.rounds(14)
    for host_id in story.fleet.host_ids:
        story.power_cut(host_id)
    for connectivity in SILENT:
        for host_id in story.fleet.host_ids:
            story.silence(host_id, connectivity)
        story.rounds(4)
    before = len(story.fleet.fleet.oracle)
    for host_id in story.fleet.host_ids:
        story.fleet.hypervisor(host_id).boot()
        story.return_of(host_id)
    story.rounds(ROUNDS, until=lambda: all(story.fleet.running_on(vm.id) for vm in kept))
    started = [story.fleet.vm(seen.vm_id).name for seen in story.fleet.fleet.oracle[before:] if seen.event == "start"]
    assert started == ["high", "mid", "low"]
    assert story.fleet.running_on(loose.id) == set(), "it is started by whoever wants it"


def test_the_second_power_device_is_asked_where_the_first_does_not_answer(story: Story) -> None:
    vm = story.kept_vm()

    def configure(session: object) -> None:
        host = hosts.get(session, vm.host_id)  # type: ignore[arg-type]
        paths = [FencePath(name=name, agent="fence_redfish", options={"plug": vm.host_id}) for name in ("first", "second")]
        fencing.configure(session, host, paths, box=NoSecrets(), actor=story.fleet.actor, now=story.fleet.clock.now())  # type: ignore[arg-type]

    story.fleet.db.write(configure)
    story.device.dead = {"first"}
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.is_home_again(vm)
    assert story.device.asked == ["first", "second"]
