"""A guest agent that went silent: its host sees it, the row keeps since when, the doctor names it once that is long."""

from datetime import timedelta

from tests.operations.kit import FleetStory
from trimtab_controller.core.doctor import examine
from trimtab_controller.core.doctor.guest_agents import MISSED_AFTER
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.drift import Drift
from trimtab_controller.store import doctor_rows


def findings(story: FleetStory, vm: Vm, *, after: timedelta = timedelta()) -> list[str]:
    """What the doctor says of the vm's agent, that much later."""
    fleet = story.db.read(lambda session: doctor_rows.read(session, story.clock.now() + after))
    return [one.cure for one in examine(fleet) if one.kind == "guest-agent-stale" and vm.name in one.subject]


def test_an_agent_that_was_heard_and_is_silent_is_named_until_it_is_heard_again(story: FleetStory) -> None:
    vm, other = story.running_vm("web1"), story.running_vm("web2")
    drift = Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)
    drift.observe_hosts(story.term)
    assert findings(story, vm, after=2 * MISSED_AFTER) == []
    story.fleet.silent_agents.add(vm.id)
    drift.observe_hosts(story.term)
    drift.observe_hosts(story.term)
    assert findings(story, vm) == []
    cure = "trimtab vm ssh web1 --project default -- sudo systemctl restart qemu-guest-agent"
    assert findings(story, vm, after=MISSED_AFTER) == [cure]
    assert findings(story, other, after=MISSED_AFTER) == []
    story.fleet.silent_agents.clear()
    drift.observe_hosts(story.term)
    assert findings(story, vm, after=2 * MISSED_AFTER) == []


def test_a_guest_that_never_had_one_is_left_in_peace(story: FleetStory) -> None:
    drift = Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)
    vm = story.accept_create("web1")[0]
    story.fleet.silent_agents.add(vm.id)
    story.settle()
    drift.observe_hosts(story.term)
    assert findings(story, vm, after=2 * MISSED_AFTER) == []


def test_one_that_does_not_come_back_with_its_guests_next_run_is_missed(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    drift = Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)
    drift.observe_hosts(story.term)
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    drift.observe_hosts(story.term)
    assert findings(story, vm, after=2 * MISSED_AFTER) == []
    story.fleet.silent_agents.add(vm.id)
    story.accept_power(story.vm(vm.id), "start")
    story.settle()
    drift.observe_hosts(story.term)
    assert len(findings(story, vm, after=MISSED_AFTER)) == 1
