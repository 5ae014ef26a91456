"""host.remove gives back exactly what the vms and volumes it lets go of were charged for, and every process knows the operation."""

import subprocess
import sys
from collections.abc import Mapping

import sqlalchemy as sa

from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.services import hosts_admin, volumes
from trimtab_controller.services.volumes import VolumeSpec
from trimtab_controller.store import operations, schema

USED = ("vms_used", "vcpus_used", "memory_mib_used", "disk_bytes_used")


def used(story: FleetStory) -> Mapping[str, int]:
    table = schema.project
    row = story.db.read(lambda session: session.execute(sa.select(*(table.c[name] for name in USED))).one())
    return {name: int(row._mapping[name]) for name in USED}


def remove(story: FleetStory, name: str, *, force: bool = False) -> Operation:
    """Remove a host as the API does, leaving its guests."""
    operation = story.db.write(
        lambda session: hosts_admin.remove(
            session, name, keep_guests=True, force=force, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    return story.operation(operation.id)


def make_volume(story: FleetStory, name: str, host_id: str) -> str:
    spec = VolumeSpec(name=name, size_bytes=GIB, image="", pool=story.local.id, format="qcow2")
    view, operation = story.db.write(
        lambda session: volumes.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    params = {"volume_id": view.volume.id, "to_host_id": host_id}
    table = schema.operation
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == operation.id).values(params=params)))
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE
    return view.volume.id


def test_what_is_left_behind_is_given_back_once_and_nothing_else(story: FleetStory) -> None:
    """A running vm, a deleted one in its grace, one that boots from a volume, and a volume apart; what is elsewhere stays."""
    host_id = story.host_ids[0]
    stays = story.running_vm("stays", to_host_id=story.host_ids[1])
    expected = used(story)
    story.running_vm("web1", pool=story.local, to_host_id=host_id)
    deleted = story.running_vm("web2", pool=story.local, to_host_id=host_id)
    story.accept_power(deleted, "delete")
    story.settle()
    volume_id = make_volume(story, "disk1", host_id)
    story.running_vm("web3", image_id="", volume=volume_id, pool_id="", disk_bytes=None, to_host_id=host_id)
    make_volume(story, "disk2", host_id)
    ended = remove(story, "node1")
    assert ended.state is OperationState.DONE, ended.error
    assert used(story) == expected
    assert story.running_on(stays.id)


def test_a_deleted_vm_whose_disks_are_shared_can_be_brought_back_after_its_host_left(story: FleetStory) -> None:
    vm = story.running_vm("web1", to_host_id=story.host_ids[0])
    charged = used(story)
    story.accept_power(vm, "delete")
    story.settle()
    assert remove(story, "node1").state is OperationState.DONE
    assert used(story) == charged, "its disk is still there, and still its project's"
    story.accept_power(vm, "undelete")
    story.settle()
    started = story.accept_power(vm, "start")
    story.settle()
    assert story.operation(started.id).state is OperationState.DONE, story.operation(started.id).error
    assert story.vm(vm.id).host_id in story.host_ids[1:]


def test_a_volume_whose_deletion_waits_for_the_host_is_given_back_once(story: FleetStory) -> None:
    before = used(story)
    volume_id = make_volume(story, "disk1", story.host_ids[0])
    story.accept("volume.delete", volume_id, {"volume_id": volume_id}, project_id=story.project.id)
    story.settle()
    story.wire.cut_hosts.add(story.host_ids[0])
    deletion = story.accept("volume.purge", volume_id, {"volume_id": volume_id}, project_id=story.project.id)
    story.settle()
    assert story.operation(deletion.id).state is OperationState.NEEDS_ATTENTION
    ended = remove(story, "node1", force=True)
    assert ended.state is OperationState.DONE, ended.error
    story.db.write(lambda session: operations.retry(session, deletion.id, actor="alice", now=story.clock.now()))
    story.settle()
    assert used(story) == before


def test_a_host_that_does_not_answer_leaves_only_by_force(story: FleetStory) -> None:
    story.wire.cut_hosts.add(story.host_ids[0])
    refused = remove(story, "node1")
    assert refused.state is OperationState.FAILED
    assert refused.error is not None
    assert "--force" in refused.error.message
    assert remove(story, "node1", force=True).state is OperationState.DONE


def test_every_thread_of_a_process_that_starts_knows_every_saga() -> None:
    """In a process of its own: this one has them all."""
    program = (
        "import threading\n"
        "from trimtab_controller.operations import registry\n"
        "found = []\n"
        "threads = [threading.Thread(target=lambda: found.append(registry.saga_named('host.remove'))) for _ in range(16)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert len(found) == 16, len(found)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
