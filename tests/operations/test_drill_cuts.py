"""A drill that an operator asked for really cuts a host's power, by its device, once; what follows is failover's."""

from collections.abc import Callable, Iterator

import pytest

from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller.fencing import Power
from trimtab_controller.loops.drill_cuts import DrillCuts
from trimtab_controller.store import power_cuts


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=5))


def cuts_of(story: Story) -> DrillCuts:
    return DrillCuts(db=story.fleet.db, clock=story.fleet.clock, fencer=story.device, open_secret=lambda sealed, _place: sealed)


def ask(story: Story, host_id: str) -> None:
    story.fleet.db.write(lambda session: power_cuts.ask(session, host_id, asked_by="user:alice", now=story.fleet.clock.now()))


def test_the_power_is_cut_once_and_the_vm_runs_elsewhere(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    ask(story, vm.host_id)
    cuts = cuts_of(story)
    cuts.run(story.fleet.term)
    cuts.run(story.fleet.term)
    assert story.device.asked == [f"bmc-{vm.host_id}"]
    assert "drill.power_cut" in story.kinds()
    story.lose(vm.host_id)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.is_home_again(vm)


def test_a_cut_that_came_too_late_or_failed_is_told_and_not_tried_again(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    ask(story, vm.host_id)
    story.fleet.clock.advance(120)
    cuts_of(story).run(story.fleet.term)
    assert story.device.asked == []
    assert story.kinds()[-1] == "drill.failed"
    story.device.answer = Power.UNKNOWN
    ask(story, vm.host_id)
    cuts_of(story).run(story.fleet.term)
    cuts_of(story).run(story.fleet.term)
    assert len(story.device.asked) == 1
    assert story.kinds()[-1] == "drill.failed"
    assert story.fleet.running_on(vm.id) == {vm.host_id}
