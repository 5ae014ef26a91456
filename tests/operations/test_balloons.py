"""What a balloon leaves a guest is seen at the host, shown beside the vm, and told where it changed."""

from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.drift import Drift
from trimtab_controller.services import vm_resources
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import events


def told(story: FleetStory, vm: Vm) -> list[str]:
    found = story.db.read(lambda session: events.page_after(session, 0, limit=1000))
    return [one.message for one in found if one.kind == "vm.balloon_changed" and one.subject_id == vm.id]


def test_what_a_balloon_leaves_a_guest_is_shown_and_told_where_it_changed(story: FleetStory) -> None:
    vm = story.running_vm("web1", memory_mib=512)
    caller = Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    story.db.write(lambda session: vm_resources.change(session, story.vm(vm.id), caller, balloon_min_mib=256, cpu_class=None))
    story.settle()
    drift = Drift(db=story.db, clock=story.clock, agents=story.client, nudger=story.nudger)
    for left_mib in (512, 512, 460, 460):
        story.hypervisor(vm.host_id).balloons[vm.id] = left_mib
        drift.observe_hosts(story.term)
        assert story.vm(vm.id).observed_balloon_mib == left_mib
    assert told(story, vm) == ["the balloon of web1 leaves it 460 of 512 MiB"]
