"""Encrypted volumes: who is told their keys and when, where no key ever is, and what is refused of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services import adoption, snapshots, vm_power, volume_moves, volumes
from trimtab_controller.store import describe, schema, volume_keys
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, InvalidRequest


def encrypted_vm(story: FleetStory, name: str = "vault") -> Vm:
    return story.running_vm(name, is_encrypted=True)


def keys_of(story: FleetStory, subject_id: str) -> dict[str, str]:
    sealed = story.db.read(lambda session: volume_keys.of_subject(session, subject_id))
    return {volume_id: story.secrets.open(text, place=volume_id) for volume_id, text in sealed.items()}


def forget_everywhere(story: FleetStory) -> None:
    """As when agents begin anew: what was lent is gone."""
    for host in story.fleet.hosts.values():
        host.volume_keys.clear()


def test_a_host_that_lost_a_key_is_given_it_again_with_the_command_that_needs_it(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    story.accept_power(vm, "stop", force=True)
    story.settle()
    forget_everywhere(story)
    started = story.accept_power(vm, "start")
    story.settle()
    assert story.operation(started.id).state is OperationState.DONE, story.operation(started.id).error
    assert story.hypervisor(story.vm(vm.id).host_id).volume_keys == keys_of(story, vm.id)


def test_the_target_of_a_live_migration_is_given_the_keys_and_no_third_host_is(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    source = story.vm(vm.id).host_id
    forget_everywhere(story)
    moved = story.accept_power(vm, "migrate")
    story.settle()
    assert story.operation(moved.id).state is OperationState.DONE, story.operation(moved.id).error
    target = story.vm(vm.id).host_id
    assert target != source
    assert [one.host_id for one in story.fleet.hosts.values() if one.volume_keys] == [target]


def test_a_command_brings_the_keys_of_its_own_vm_and_of_no_other(story: FleetStory) -> None:
    first, second = encrypted_vm(story, "one"), encrypted_vm(story, "two")
    assert keys_of(story, first.id).keys().isdisjoint(keys_of(story, second.id))
    forget_everywhere(story)
    story.accept_power(first, "stop", force=True)
    story.settle()
    story.accept_power(first, "start")
    story.settle()
    lent = {volume_id for host in story.fleet.hosts.values() for volume_id in host.volume_keys}
    assert lent == keys_of(story, first.id).keys()


def test_no_key_is_in_any_row_nor_in_an_agents_journal(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    story.accept_power(vm, "migrate")
    story.settle()
    (key,) = keys_of(story, vm.id).values()
    rows = story.db.read(
        lambda session: "\n".join(
            str(tuple(row)) for table in schema.metadata.sorted_tables for row in session.execute(sa.select(table))
        )
    )
    assert vm.id in rows
    assert key not in rows
    journals = [path for path in Path(story.directory).rglob("*") if path.is_file() and path.name != "secrets.key"]
    assert all(key.encode() not in path.read_bytes() for path in journals)


def test_a_disk_made_from_an_image_stands_alone_and_frees_the_image(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    (root,) = story.volumes(vm.id)
    assert (root.is_encrypted, root.base_image_id, root.observed_state) == (True, None, "present")
    (disk,) = story.hypervisor(story.vm(vm.id).host_id).domains[vm.id].spec.disks
    assert disk.is_encrypted


def test_the_key_of_a_purged_volume_is_gone(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    (root,) = story.volumes(vm.id)
    story.accept_power(vm, "delete")
    story.settle()
    assert keys_of(story, root.id), "undelete needs it"
    story.accept("vm.purge", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=story.project.id)
    story.settle()
    assert keys_of(story, root.id) == {}


def _refused(story: FleetStory, vm: Vm, what: str) -> Callable[[Session], object]:
    caller = vm_power.Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    (root,) = story.volumes(vm.id)
    wish = volume_moves.MoveWish(to_pool=story.local.name)

    def move(session: Session) -> Operation:
        return volume_moves.move(
            session, root.id, wish, project=story.project, expected_version=None, actor=story.actor, now=story.clock.now()
        )

    return {
        "snapshot": lambda session: snapshots.create(session, story.vm(vm.id), caller, name="before"),
        "move": move,
        "release": lambda session: adoption.release(session, story.vm(vm.id), caller, has_autostart=False),
    }[what]


@pytest.mark.parametrize("what", ["snapshot", "move", "release"])
def test_what_would_copy_an_encrypted_volume_in_the_clear_is_refused(story: FleetStory, what: str) -> None:
    vm = encrypted_vm(story)
    with pytest.raises(Conflict) as refused:
        story.db.write(_refused(story, vm, what))
    assert refused.value.code == "volume-encrypted"
    assert "vault-root" in refused.value.message


def test_an_encrypted_volume_is_qcow2(story: FleetStory) -> None:
    spec = volumes.VolumeSpec(name="data", size_bytes=GIB, pool=story.shared.name, format="raw", image="", is_encrypted=True)
    with pytest.raises(InvalidRequest) as refused:
        story.db.write(
            lambda session: volumes.create(
                session, spec, project=story.project, actor=story.actor, now=story.clock.now(), box=story.secrets
            )
        )
    assert (refused.value.code, refused.value.context["field"]) == ("format-wrong", "format")


def test_a_grown_encrypted_volume_is_opened_with_its_key(story: FleetStory) -> None:
    vm = encrypted_vm(story)
    (root,) = story.volumes(vm.id)
    grown = story.db.write(
        lambda session: volumes.resize(
            session, root.id, 4 * GIB, project=story.project, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    assert story.operation(grown.id).state is OperationState.DONE
    assert story.db.read(lambda session: describe.get_volume(session, root.id)).size_bytes == 4 * GIB
