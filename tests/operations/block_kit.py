"""Pools without files on a simulated fleet, and vms whose disk is there; what is lost or kept of such disks, for the matrix of faults."""

import sqlalchemy as sa

from tests.operations import examples_snapshots as snaps
from tests.operations.backup_kit import content_of, made_backup, ready_repo, write_to
from tests.operations.example import Example, name_of
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, Pool, Vm
from trimtab_controller.services import backup_restore
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.store import pools, schema, vms
from trimtab_protos.pool_messages import IscsiSource, RbdSource

KEY = "AQCceph-key-that-nobody-reads=="


def block_pool(story: FleetStory, name: str, behind: RbdSource | IscsiSource) -> Pool:
    kind = "rbd" if isinstance(behind, RbdSource) else "iscsi"
    if (there := story.db.read(lambda session: pools.find(session, name))) is not None:
        return there
    spec = pool_service.PoolSpec(
        name=name, kind=kind, path="", is_shared=False, is_default=False, behind=behind, secret=KEY if kind == "rbd" else ""
    )
    story.db.write(
        lambda session: pool_service.create(session, spec, actor=story.actor, now=story.clock.now(), box=story.secrets)
    )
    story.settle()
    found = story.db.read(lambda session: pools.find(session, name))
    assert found is not None
    return found


def ceph_pool(story: FleetStory) -> Pool:
    return block_pool(story, "ceph", RbdSource(monitors=("10.0.0.6:6789",), pool="vms", user="trimtab"))


def on_block_pool(story: FleetStory, pool: Pool, name: str, *, unit: str = "") -> Vm:
    """Return a running vm whose only disk is there."""
    spec = volume_service.VolumeSpec(name=f"{name}-root", size_bytes=GIB, pool=pool.name, format="", image="", unit=unit)
    story.db.write(
        lambda session: volume_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    vm, operation = story.accept_create(name, image_id="", pool_id="", volume=f"{name}-root", disk_bytes=None)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    return story.vm(vm.id)


# --- examples ------------------------------------------------------------------------------------------------------------------


def image_with_marks(story: FleetStory) -> Vm:
    vm = on_block_pool(story, ceph_pool(story), name_of("web"))
    snaps.writes(story, vm, "made")
    return vm


def keeps_image(story: FleetStory) -> Operation:
    return snaps.accept_snapshot(story, image_with_marks(story), "before")


def image_goes_back(story: FleetStory) -> Operation:
    vm = image_with_marks(story)
    snaps.snapshotted(story, vm, "before")
    snaps.writes(story, vm, "later")
    return snaps.accept_revert(story, story.vm(vm.id), "before")


def writes_over_a_lun(story: FleetStory) -> Operation:
    """The vm went on after its backup; what it wrote since is to go."""
    ready_repo(story)
    san = block_pool(story, "san", IscsiSource(portal="10.0.0.5:3260", target="iqn.2026-01.example:san"))
    used = story.db.read(lambda session: set(session.scalars(sa.select(schema.volume.c.unit))))
    unit = next(str(number) for number in range(1, 255) if str(number) not in used)
    vm = on_block_pool(story, san, name_of("web"), unit=unit)
    write_to(story, vm.id, 0, vm.id.encode())
    backup = made_backup(story, vm)
    write_to(story, vm.id, 0, b"what nobody wants to keep any more")
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    return story.db.write(
        lambda session: backup_restore.replace(
            session, backup.id, vms.get(session, vm.id), project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def is_written_over(story: FleetStory, operation: Operation) -> None:
    (volume,) = story.volumes(operation.subject_id)
    assert (volume.observed_state, volume.generation) == ("present", 2)
    assert content_of(story, operation.subject_id).startswith(operation.subject_id.encode())


def is_not_written_over(story: FleetStory, operation: Operation) -> None:
    (volume,) = story.volumes(operation.subject_id)
    assert (volume.observed_state, volume.generation) == ("present", 1)
    assert content_of(story, operation.subject_id).startswith(b"what nobody wants")


EXAMPLES: dict[str, Example] = {
    "snapshot.create of a Ceph image": Example(
        kind="snapshot.create", arrange=keeps_image, done=snaps.created("filesystem"), undone=snaps.not_created
    ),
    "snapshot.revert of a Ceph image": Example(
        kind="snapshot.revert",
        arrange=image_goes_back,
        done=snaps.reverted,
        undone=snaps.not_reverted,
        takes_place=frozenset({"off"}),
    ),
    "vm.replace over a LUN": Example(
        kind="vm.replace", arrange=writes_over_a_lun, done=is_written_over, undone=is_not_written_over
    ),
}
