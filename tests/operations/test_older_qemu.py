"""A guest moves to the series of QEMU that it runs on or to a newer one; an older one may not take its state."""

from dataclasses import replace

from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Vm
from trimtab_controller.store import host_reports, hosts


def gets_qemu(story: FleetStory, host_id: str, version: str) -> None:
    hypervisor = story.hypervisor(host_id)
    hypervisor.host = replace(hypervisor.host, qemu_version=version)


def is_heard(story: FleetStory, host_id: str) -> None:
    """Take the host's word for what it is."""
    inventory = story.agents.agent(host_id).inventory.read()
    story.db.write(lambda session: host_reports.store_inventory(session, host_id, inventory, now=story.clock.now()))


def name_of(story: FleetStory, host_id: str) -> str:
    return story.db.read(lambda session: hosts.get(session, host_id)).name


def moved(story: FleetStory, vm: Vm, **wishes: str) -> tuple[str, str]:
    """Ask for a move; return where the vm is then, and the code and words that refused it."""
    operation = story.accept_power(vm, "migrate", **wishes)
    story.settle()
    error = story.operation(operation.id).error
    return story.vm(vm.id).host_id, f"{error.code}: {error.message}" if error else ""


def test_the_scheduler_takes_a_host_whose_qemu_is_as_new(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    older, newer = (host_id for host_id in story.host_ids if host_id != vm.host_id)
    for host_id in (vm.host_id, newer):
        gets_qemu(story, host_id, "8.2.1")
        is_heard(story, host_id)
    home, refusal = moved(story, vm, to_host=name_of(story, older))
    assert (home, refusal.partition(":")[0]) == (vm.host_id, "no-host-fits")
    assert "its QEMU is 7.2, the guest runs on 8.2; an older one may not take its state" in refusal
    assert moved(story, vm) == (newer, "")


def test_a_guest_that_its_host_s_upgrade_left_on_its_own_qemu_may_still_go_to_an_older_one(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    gets_qemu(story, vm.host_id, "8.2.1")
    story.hypervisor(vm.host_id).older_qemus[vm.id] = "7.2.0"
    is_heard(story, vm.host_id)
    home, refusal = moved(story, vm)
    assert (home != vm.host_id, refusal) == (True, "")


def test_a_host_that_got_an_older_qemu_meanwhile_is_asked_before_anything_moves(story: FleetStory) -> None:
    vm = story.running_vm("web1")
    other = next(host_id for host_id in story.host_ids if host_id != vm.host_id)
    gets_qemu(story, other, "6.2.0")
    operation = story.accept_power(vm, "migrate", to_host=name_of(story, other))
    story.settle()
    ended = story.operation(operation.id)
    assert ended.error is not None
    assert (ended.state, ended.error.code) == (OperationState.FAILED, "migration-refused")
    assert "node" in ended.error.message
    assert "has QEMU 6.2, the guest runs on 7.2" in ended.error.message
    assert story.vm(vm.id).host_id == vm.host_id
    assert not {"do prepare", "do move"} & set(story.journal(operation.id))
