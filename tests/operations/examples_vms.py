"""One valid operation of every kind that makes, moves, ends or brings back a vm. See `examples.py`."""

from collections.abc import Callable

from tests.operations.example import Example, name_of
from tests.operations.examples_storage import present_volume
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.base import Stamp
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services import recovery
from trimtab_controller.store import (
    claims,
    describe,
    operations,
    schema,
    vms,
)
from trimtab_controller.store.database import Session


def _create(story: FleetStory) -> Operation:
    return story.accept_create(name_of("web"))[1]


def _create_local(story: FleetStory) -> Operation:
    """Its disk is a linked clone on a local pool, so the image is copied there first, each time anew."""
    image = story.add_image(name_of("image"), story.shared)
    return story.accept_create(name_of("web"), pool=story.local, image=image)[1]


def _create_from_volume(story: FleetStory) -> Operation:
    volume_id = present_volume(story)
    return story.accept_create(name_of("web"), image_id="", volume=volume_id, disk_bytes=None, pool_id="")[1]


def created(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.observed_state is ObservedState.RUNNING
    assert story.running_on(vm.id) == {vm.host_id}


def not_created(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == frozenset()
    assert story.db.read(lambda session: vms.find(session, vm.project_id, vm.name, with_deleted=True)) is None, "the name is free"


def _volume_survived(story: FleetStory, operation: Operation) -> None:
    not_created(story, operation)
    free = [volume for volume in _live_volumes(story) if volume.vm_id is None and volume.observed_state == "present"]
    assert free, "the volume that was there before the vm is still there"


def _power(
    verb: str, *, before: Callable[[FleetStory, Vm], None] = lambda _story, _vm: None, **wishes: object
) -> Callable[..., Operation]:
    def arrange(story: FleetStory) -> Operation:
        vm = story.running_vm(name_of("web"))
        before(story, vm)
        return story.accept_power(story.vm(vm.id), verb, **wishes)

    return arrange


def stopped(story: FleetStory, vm: Vm) -> None:
    story.accept_power(vm, "stop", force=True)
    story.settle()


def _recover(story: FleetStory) -> Operation:
    """Its guest is gone for certain: its holders were proven gone before a recovery is accepted."""
    vm = story.running_vm(name_of("web"))
    stopped(story, vm)
    story.wish(vm.id, DesiredPower.RUNNING)
    present = story.vm(vm.id)
    return story.db.write(
        lambda session: recovery.recover(session, present, because="a test", now=story.clock.now(), actor=story.actor)
    )


def _settle_move(story: FleetStory) -> Operation:
    """Its target is proven gone before it was prepared; the guest runs on at the source."""
    vm = story.running_vm(name_of("web"))
    target = next(host_id for host_id in story.host_ids if host_id != vm.host_id)
    (made,) = story.db.read(lambda session: operations.page(session, limit=1, subject_id=vm.id))
    values = {"operation_id": made.id, "source_host_id": vm.host_id, "target_host_id": target, "copied_volume_ids": ()}

    def work(session: Session) -> Operation:
        now = story.clock.now()
        claims.begin_migration(session, vm_id=vm.id, epoch=vm.epoch, now=now, **values)
        return recovery.settle_move(session, vms.get(session, vm.id), vm.host_id, now=now, actor=story.actor)

    return story.db.write(work)


def _move_settled(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == {vm.host_id}
    assert story.db.read(lambda session: claims.migration_of(session, vm.id)) is None


def _clean_copy(story: FleetStory) -> Operation:
    """A stopped definition of it lies on a host where it is no more."""
    vm = story.running_vm(name_of("web"))
    other = next(host_id for host_id in story.host_ids if host_id != vm.host_id)
    spec = story.db.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm.id), other))
    story.hypervisor(other).define_domain(spec, Stamp(epoch=vm.epoch, turn=1))
    operation = story.db.write(
        lambda session: recovery.clean_copy(session, vm, other, kill=False, now=story.clock.now(), actor=story.actor)
    )
    assert operation is not None
    return operation


def _copy_cleaned(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.id not in story.hypervisor(operation.params["host_id"]).domains
    assert story.running_on(vm.id) == {vm.host_id}


def _redefine(story: FleetStory) -> Operation:
    """Somebody undefined it at its home while it was off."""
    vm = story.running_vm(name_of("web"))
    stopped(story, vm)
    del story.hypervisor(vm.host_id).domains[vm.id]
    return story.accept("vm.redefine", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=vm.project_id)


def _redefined(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.id in story.hypervisor(vm.host_id).domains
    assert story.running_on(vm.id) == frozenset()


def _paused(story: FleetStory, vm: Vm) -> None:
    story.accept_power(vm, "pause")
    story.settle()


def _deleted(story: FleetStory, vm: Vm) -> None:
    story.accept_power(vm, "delete")
    story.settle()


def _ends_as(state: ObservedState) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        assert story.vm(operation.subject_id).observed_state is state

    return check


def _still_wants(power: DesiredPower) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        assert story.vm(operation.subject_id).desired_power is power

    return check


def _purge(story: FleetStory) -> Operation:
    vm = story.running_vm(name_of("web"))
    _deleted(story, vm)
    return story.accept("vm.purge", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=vm.project_id)


def _purged(story: FleetStory, operation: Operation) -> None:
    assert story.volumes(operation.subject_id) == ()


def _migrate(story: FleetStory) -> Operation:
    return story.accept_power(story.running_vm(name_of("web")), "migrate")


def _migrate_local(story: FleetStory) -> Operation:
    return story.accept_power(story.running_vm(name_of("web"), pool=story.local), "migrate")


def _moved(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert operation.result is not None
    assert vm.host_id == operation.result["target_host_id"] != operation.result["source_host_id"]
    assert story.running_on(vm.id) == {vm.host_id}


def _stayed(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.observed_state is ObservedState.RUNNING
    assert story.running_on(vm.id) == {vm.host_id}


def _live_volumes(story: FleetStory) -> list[object]:
    def read(session: Session) -> list[object]:
        table = schema.volume
        ids = session.scalars(table.select().with_only_columns(table.c.id).where(table.c.deleted_at.is_(None)))
        return [describe.get_volume(session, volume_id) for volume_id in ids]

    return story.db.read(read)


EXAMPLES: dict[str, Example] = {
    "vm.create": Example(kind="vm.create", arrange=_create, done=created, undone=not_created),
    "vm.create on a local pool": Example(kind="vm.create", arrange=_create_local, done=created, undone=not_created),
    "vm.create from a volume": Example(kind="vm.create", arrange=_create_from_volume, done=created, undone=_volume_survived),
    "vm.delete": Example(kind="vm.delete", arrange=_power("delete"), done=_ends_as(ObservedState.ABSENT)),
    "vm.undelete": Example(kind="vm.undelete", arrange=_power("undelete", before=_deleted), done=_ends_as(ObservedState.STOPPED)),
    "vm.start": Example(
        kind="vm.start",
        arrange=_power("start", before=stopped),
        done=_ends_as(ObservedState.RUNNING),
        undone=_still_wants(DesiredPower.STOPPED),
    ),
    "vm.stop": Example(
        kind="vm.stop",
        arrange=_power("stop"),
        done=_ends_as(ObservedState.STOPPED),
        undone=_still_wants(DesiredPower.RUNNING),
        takes_place=frozenset({"ask", "off"}),
    ),
    "vm.stop by force": Example(
        kind="vm.stop",
        arrange=_power("stop", force=True),
        done=_ends_as(ObservedState.STOPPED),
        undone=_still_wants(DesiredPower.RUNNING),
        takes_place=frozenset({"off"}),
    ),
    "vm.reboot": Example(kind="vm.reboot", arrange=_power("reboot"), done=_ends_as(ObservedState.RUNNING)),
    "vm.pause": Example(
        kind="vm.pause",
        arrange=_power("pause"),
        done=_ends_as(ObservedState.PAUSED),
        undone=_still_wants(DesiredPower.RUNNING),
        takes_place=frozenset({"act"}),
    ),
    "vm.resume": Example(
        kind="vm.resume",
        arrange=_power("resume", before=_paused),
        done=_ends_as(ObservedState.RUNNING),
        undone=_still_wants(DesiredPower.PAUSED),
        takes_place=frozenset({"act"}),
    ),
    "vm.migrate": Example(kind="vm.migrate", arrange=_migrate, done=_moved, undone=_stayed, takes_place=frozenset({"move"})),
    "vm.migrate with its disk": Example(
        kind="vm.migrate", arrange=_migrate_local, done=_moved, undone=_stayed, takes_place=frozenset({"move"})
    ),
    "vm.recover": Example(kind="vm.recover", arrange=_recover, done=_ends_as(ObservedState.RUNNING)),
    "vm.settle_move": Example(kind="vm.settle_move", arrange=_settle_move, done=_move_settled),
    "vm.redefine": Example(kind="vm.redefine", arrange=_redefine, done=_redefined),
    "vm.clean_copy": Example(kind="vm.clean_copy", arrange=_clean_copy, done=_copy_cleaned),
    "vm.purge": Example(kind="vm.purge", arrange=_purge, done=_purged),
}
