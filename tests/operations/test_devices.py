"""Disks and cards that come and go: nothing belongs to two vms, and nothing is free that a guest still holds."""

from dataclasses import replace

import pytest

from tests.operations.examples_changes import accept_attach, accept_detach, accept_volume_resize, has_devices
from tests.operations.faults import Behaviour, Misbehaving, StepFault
from tests.operations.invariants import audit_invariants
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Volume
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import describe, networks
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound
from trimtab_protos.messages import Direction

MAC = "52:54:00:00:00:77"


def settled(story: FleetStory, operation: Operation, expected: OperationState = OperationState.DONE) -> Operation:
    story.settle()
    found = story.operation(operation.id)
    assert found.state is expected, (found.error, story.journal(operation.id))
    assert audit_invariants(story) == []
    return found


def free_volume(story: FleetStory, name: str, *, pool: str = "shared") -> Volume:
    spec = volume_service.VolumeSpec(name=name, size_bytes=GIB, pool=pool, format="", image="")
    _view, operation = story.db.write(
        lambda session: volume_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    settled(story, operation)
    return story.db.read(lambda session: describe.get_volume(session, operation.subject_id))


def test_a_volume_of_another_vm_is_refused_with_the_way_to_free_it(story: FleetStory) -> None:
    first, second = story.running_vm("web1"), story.running_vm("web2")
    data = free_volume(story, "data")
    settled(story, accept_attach(story, first, volume="data"))
    with pytest.raises(Conflict, match="trimtab vm detach web1 --volume data"):
        accept_attach(story, second, volume="data")
    settled(story, accept_detach(story, first, volume="data"))
    settled(story, accept_attach(story, second, volume="data"))
    assert [volume.id for volume in story.volumes(second.id)][1:] == [data.id]


def test_a_guest_that_keeps_a_disk_keeps_it_and_the_refusal_says_what_to_do(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    free_volume(story, "data")
    settled(story, accept_attach(story, vm, volume="data"))
    story.fleet.stubborn_vms.add(vm.id)
    failed = settled(story, accept_detach(story, vm, volume="data"), OperationState.FAILED)
    assert failed.error is not None
    assert failed.error.code == "guest-keeps-device"
    assert "stop vm web1" in failed.error.message
    assert len(story.volumes(vm.id)) == 2
    settled(story, story.accept_power(story.vm(vm.id), "stop", force=True))
    settled(story, accept_detach(story, story.vm(vm.id), volume="data"))
    assert len(story.volumes(vm.id)) == 1


def test_the_boot_disk_stays_and_what_is_not_there_cannot_be_taken(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    (root,) = story.volumes(vm.id)
    with pytest.raises(Conflict, match="boots from"):
        accept_detach(story, vm, volume=root.id)
    free_volume(story, "data")
    with pytest.raises(NotFound):
        accept_detach(story, vm, volume="data")
    with pytest.raises(NotFound, match="its nics: nic-"):
        accept_detach(story, vm, nic="nic-none")


def test_a_local_volume_of_another_host_is_refused_with_the_way_there(story: FleetStory) -> None:
    data = free_volume(story, "data", pool="local")
    elsewhere = next(host_id for host_id in story.host_ids if host_id != data.host_id)
    vm = story.running_vm("web1", to_host_id=elsewhere)
    with pytest.raises(Conflict, match="trimtab vm migrate web1 --to") as refused:
        accept_attach(story, vm, volume="data")
    assert refused.value.code == "volume-elsewhere"


def test_a_mac_and_an_address_stay_unique_and_are_free_again_after(story: FleetStory) -> None:
    first, second = story.running_vm("web1"), story.running_vm("web2")
    attached = settled(story, accept_attach(story, first, wish=NicWish(network=story.network.id, mac=MAC)))
    with pytest.raises(AlreadyExists, match="vm web1"):
        accept_attach(story, second, wish=NicWish(network=story.network.id, mac=MAC))
    settled(story, accept_detach(story, first, nic=MAC))
    assert story.db.read(lambda session: networks.mac_holder(session, MAC)) == ""
    again = settled(story, accept_attach(story, second, wish=NicWish(network=story.network.id, mac=MAC)))
    assert again.params["nic_id"] != attached.params["nic_id"]


def attach_both(story: FleetStory) -> Operation:
    """Accept that a running vm gets a free volume and a card, in one operation."""
    vm = story.running_vm("web1")
    free_volume(story, "data")
    return accept_attach(story, story.vm(vm.id), volume="data", wish=NicWish(network=story.network.id, mac=MAC))


def test_a_card_that_fails_takes_its_disk_off_again(story: FleetStory) -> None:
    operation = attach_both(story)
    fault = StepFault("vm.attach", "apply", Behaviour.FAIL_AFTER)
    story.settle(story.new_engine(saga_of=Misbehaving(fault)))
    failed = settled(story, operation, OperationState.FAILED)
    has_devices(1, 1)(story, failed)
    assert story.db.read(lambda session: networks.mac_holder(session, MAC)) == ""
    data = story.db.read(lambda session: describe.get_volume(session, failed.params["volume_id"]))
    assert data.vm_id is None, "it is free for another vm"


def test_a_disk_that_the_guest_keeps_is_told_apart_from_the_card_that_it_let_go(story: FleetStory) -> None:
    operation = attach_both(story)

    def let_go_of_the_card() -> None:
        domain = story.hypervisor(story.vm(operation.subject_id).host_id).domains[operation.subject_id]
        domain.spec = replace(domain.spec, nics=domain.spec.nics[:1])
        story.fleet.stubborn_vms.add(operation.subject_id)

    failure = StepFault("vm.attach", "apply", Behaviour.FAIL_AFTER)
    meanwhile = StepFault("vm.attach", "apply", Behaviour.MEANWHILE, direction=Direction.UNDO, meanwhile=let_go_of_the_card)
    story.settle(story.new_engine(saga_of=Misbehaving(failure, meanwhile)))
    done = settled(story, operation)
    has_devices(2, 1)(story, done)
    assert done.result == {"not_attached": [done.params["nic_id"]]}
    assert story.db.read(lambda session: networks.mac_holder(session, MAC)) == ""


def test_what_was_attached_moves_and_grows_with_its_vm(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    data = free_volume(story, "data")
    settled(story, accept_attach(story, vm, volume="data"))
    settled(story, story.accept_power(story.vm(vm.id), "migrate"))
    settled(story, accept_volume_resize(story, data.id, 2 * GIB))
    assert [volume.size_bytes for volume in story.volumes(vm.id)] == [2 * GIB, 2 * GIB]


def test_a_deleted_vm_lets_go_of_what_was_attached(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    data = free_volume(story, "data")
    settled(story, accept_attach(story, vm, volume="data"))
    settled(story, story.accept_power(story.vm(vm.id), "delete"))
    settled(story, story.accept("vm.purge", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=vm.project_id))
    kept = story.db.read(lambda session: describe.get_volume(session, data.id))
    assert (kept.vm_id, kept.deleted_at, kept.observed_state) == (None, None, "present")
