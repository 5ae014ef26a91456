"""What somebody changes by hand at a domain is seen by itself, shown beside the vm, told by the doctor, and gone once it is settled."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_controller.agents.client import AgentClient
from trimtab_controller.core.doctor import vms as concern
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.hand_changes import HandChanges
from trimtab_controller.store import doctor_rows, events
from trimtab_protos.adoption_messages import Described


def look(story: FleetStory) -> None:
    HandChanges(db=story.db, clock=story.clock, agents=story.client).look(story.term)


def change(story: FleetStory, vm: Vm, **fields: int) -> None:
    domain = story.hypervisor(vm.host_id).domains[vm.id]
    domain.spec = replace(domain.spec, **fields)  # type: ignore[arg-type]


def test_a_change_by_hand_is_seen_told_once_and_gone_when_it_is_undone(story: FleetStory) -> None:
    vm, other = story.running_vm("web1"), story.running_vm("web2")
    look(story)
    assert story.vm(vm.id).hand_changes == ()
    change(story, vm, vcpus=1, memory_mib=256)
    look(story)
    look(story)
    assert story.vm(vm.id).hand_changes == ("memory_mib", "vcpus")
    assert story.vm(other.id).hand_changes == ()
    facts = story.db.read(lambda session: doctor_rows.read(session, story.clock.now()))
    (finding,) = concern.changed_by_hand(facts)
    assert (finding.kind, finding.cure) == ("vm-changed-by-hand", f"trimtab vm diff web1 --project {story.project.name}")
    change(story, vm, vcpus=vm.vcpus, memory_mib=vm.memory_mib)
    look(story)
    assert story.vm(vm.id).hand_changes == ()
    assert told(story, vm) == ["vm.changed_by_hand", "vm.hand_changes_ended"]


def test_a_host_that_does_not_answer_and_an_operation_under_way_leave_what_was_known(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    change(story, vm, vcpus=1)
    look(story)
    change(story, vm, vcpus=vm.vcpus)
    story.fleet.plan_fault("describe_domain", Fault(FaultKind.FAIL_BEFORE))
    look(story)
    assert story.vm(vm.id).hand_changes == ("vcpus",)
    story.accept_power(vm, "reboot")
    look(story)
    assert story.vm(vm.id).hand_changes == ("vcpus",), "while it is worked on, it differs for a moment"
    story.settle()
    look(story)
    assert story.vm(vm.id).hand_changes == ()


class Between:
    """Hosts that answer, after which something happens before the answer is looked at."""

    def __init__(self, agents: AgentClient, happens: Callable[[], object]) -> None:
        self._agents, self._happens = agents, happens

    def describe_domain(self, host_id: str, *, domain: str = "", vm_id: str = "") -> Described:
        seen = self._agents.describe_domain(host_id, domain=domain, vm_id=vm_id)
        self._happens()
        return seen


def test_what_an_operation_changed_between_look_and_record_is_not_taken_for_a_hand_made_change(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    change(story, vm, vcpus=1)
    agents = Between(story.client, lambda: story.accept_power(vm, "reboot"))
    HandChanges(db=story.db, clock=story.clock, agents=cast(AgentClient, agents)).look(story.term)
    assert story.vm(vm.id).hand_changes == (), "it is worked on by now"


def told(story: FleetStory, vm: Vm) -> list[str]:
    found = story.db.read(lambda session: events.page_after(session, 0, limit=1000))
    return [one.kind for one in found if "hand" in one.kind and one.subject_id == vm.id]
