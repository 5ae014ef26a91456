"""One valid operation of every kind that takes a domain of somebody's under control or gives one back. See `examples.py`."""

import itertools
import uuid
from dataclasses import replace

from tests.operations.example import Example, name_of
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.drift_fields import Difference
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Operation
from trimtab_controller.services import adoption
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import adoptions
from trimtab_protos.adoption_messages import DescribedDisk, DescribedNic, DomainDescription
from trimtab_protos.messages import DomainState

_macs = itertools.count(0x525400AA0000)


def stranger(story: FleetStory, name: str, *, state: DomainState = DomainState.RUNNING) -> tuple[str, DomainDescription]:
    """Let a domain of somebody's be on the first host; return the host and what the domain is."""
    number = f"{next(_macs):012x}"
    described = DomainDescription(
        uuid=str(uuid.uuid4()),
        name=name,
        state=state,
        has_autostart=True,
        machine="pc-q35-7.2",
        cpu_mode="custom",
        cpu_model="qemu64",
        vcpus=2,
        vcpus_max=2,
        memory_mib=512,
        memory_max_mib=512,
        disks=(DescribedDisk(target="vda", path=f"{story.local.path}/{name}.qcow2", format="qcow2", size_bytes=GIB),),
        nics=(DescribedNic(mac=":".join(number[i : i + 2] for i in range(0, 12, 2)), bridge="br0"),),
        kept=("devices/sound (ich9)",),
        original_xml=f"<domain><name>{name}</name></domain>",
    )
    host_id = story.host_ids[0]
    story.hypervisor(host_id).foreign[described.uuid] = described
    return host_id, described


def accept_adopt(story: FleetStory, host_id: str, described: DomainDescription) -> Operation:
    spec = adoption.AdoptSpec(host=host_id, domain=described.name, networks={})
    _vm, operation, _plan = story.db.write(
        lambda session: adoption.adopt(
            session, spec, described, host_id, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    return operation


def accept_release(story: FleetStory, vm_id: str, *, has_autostart: bool = True) -> Operation:
    vm = story.vm(vm_id)
    caller = Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    return story.db.write(lambda session: adoption.release(session, vm, caller, has_autostart=has_autostart))


def _adopt(story: FleetStory) -> Operation:
    return accept_adopt(story, *stranger(story, name_of("legacy")))


def _adopt_stopped(story: FleetStory) -> Operation:
    return accept_adopt(story, *stranger(story, name_of("legacy"), state=DomainState.STOPPED))


def _adopted(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    domain = story.hypervisor(vm.host_id).domains[vm.id]
    assert (domain.own_name, domain.starts) == (vm.name, int(vm.observed_state is ObservedState.RUNNING)), "it was not restarted"
    kept = story.db.read(lambda session: adoptions.find(session, vm.id))
    assert kept is not None
    assert (kept.ended_at, kept.kept) == (None, ["devices/sound (ich9)"])


def _not_adopted(story: FleetStory, operation: Operation) -> None:
    """The domain is as it was, autostart too, and can be adopted once more."""
    kept = story.db.read(lambda session: adoptions.find(session, operation.subject_id))
    assert kept is not None
    plain = next(one for one in story.hypervisor(kept.host_id).foreign.values() if one.name == kept.domain_name)
    assert plain.has_autostart
    again = accept_adopt(story, kept.host_id, plain)
    story.settle()
    assert story.operation(again.id).state.value == "done"


def _release(story: FleetStory) -> Operation:
    return accept_release(story, story.running_vm(name_of("web")).id)


def _release_adopted(story: FleetStory) -> Operation:
    host_id, described = stranger(story, name_of("legacy"))
    operation = accept_adopt(story, host_id, described)
    story.settle()
    return accept_release(story, operation.subject_id)


def _released(story: FleetStory, operation: Operation) -> None:
    plain = [
        one
        for host_id in story.host_ids
        for one in story.hypervisor(host_id).foreign.values()
        if one.name in (operation.subject_name, f"trimtab-{operation.subject_id}")
    ]
    assert [(one.state, one.has_autostart, one.vm_id) for one in plain] == [(DomainState.RUNNING, True, "")]
    assert story.vm(operation.subject_id).deleted_at is not None


def _reconcile(story: FleetStory) -> Operation:
    """Somebody gave its guest other vcpus with virsh."""
    vm = story.running_vm(name_of("web"))
    domain = story.hypervisor(vm.host_id).domains[vm.id]
    domain.spec = replace(domain.spec, vcpus=1)
    found = (Difference("vcpus", "2", "1", "1"),)
    caller = Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    seen = DomainDescription(uuid=vm.uuid, name=vm.name)
    return story.db.write(
        lambda session: adoption.reconcile(session, vm, caller, found, seen, project=story.project, accept_as_is=False)
    )


def _reconciled(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.hypervisor(vm.host_id).domains[vm.id].spec.vcpus == 2


EXAMPLES: dict[str, Example] = {
    "vm.adopt": Example(kind="vm.adopt", arrange=_adopt, done=_adopted, undone=_not_adopted),
    "vm.adopt of a stopped domain": Example(kind="vm.adopt", arrange=_adopt_stopped, done=_adopted, undone=_not_adopted),
    "vm.reconcile": Example(kind="vm.reconcile", arrange=_reconcile, done=_reconciled, takes_place=frozenset({"revert"})),
    "vm.release": Example(kind="vm.release", arrange=_release, done=_released),
    "vm.release of an adopted vm": Example(kind="vm.release", arrange=_release_adopted, done=_released),
}
