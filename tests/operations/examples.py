"""One valid operation of every kind, and of the variants that take other paths. A saga without an example fails `test_every_saga`.

`arrange` accepts the operation on a fleet where nothing else is under way, and may be called many times on one fleet. `done` and
`undone` check what this kind promises beyond the invariants that `invariants.audit_invariants` asks for.
"""

import itertools
from collections.abc import Callable

from tests.operations import examples_backups as backup
from tests.operations import examples_changes as changes
from tests.operations import examples_snapshots as snaps
from tests.operations.example import Example
from tests.operations.kit import GIB, FleetStory, NeverCancelled
from trimtab_agent.hypervisor.base import Stamp
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Operation, Vm, Volume
from trimtab_controller.core.planning import PlanKind
from trimtab_controller.core.resize import When
from trimtab_controller.services import images as image_service
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import plans as plan_service
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services import recovery
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.store import (
    claims,
    describe,
    hosts,
    image_replicas,
    images,
    networks,
    operations,
    pools,
    reach,
    schema,
    vms,
    volumes,
)
from trimtab_controller.store.database import Session
from trimtab_protos.messages import DiskFormat, HostFileSource, ImageSpec

_numbers = itertools.count(1)


def _name(noun: str) -> str:
    return f"{noun}{next(_numbers)}"


# --- vms -------------------------------------------------------------------------------------------------------------------


def _create(story: FleetStory) -> Operation:
    return story.accept_create(_name("web"))[1]


def _create_local(story: FleetStory) -> Operation:
    """Its disk is a linked clone on a local pool, so the image is copied there first, each time anew."""
    image = story.add_image(_name("image"), story.shared)
    return story.accept_create(_name("web"), pool=story.local, image=image)[1]


def _create_from_volume(story: FleetStory) -> Operation:
    volume_id = _present_volume(story)
    return story.accept_create(_name("web"), image_id="", volume=volume_id, disk_bytes=None, pool_id="")[1]


def _created(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.observed_state is ObservedState.RUNNING
    assert story.running_on(vm.id) == {vm.host_id}


def _not_created(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == frozenset()
    assert story.db.read(lambda session: vms.find(session, vm.project_id, vm.name, with_deleted=True)) is None, "the name is free"


def _volume_survived(story: FleetStory, operation: Operation) -> None:
    _not_created(story, operation)
    free = [volume for volume in _live_volumes(story) if volume.vm_id is None and volume.observed_state == "present"]
    assert free, "the volume that was there before the vm is still there"


def _power(
    verb: str, *, before: Callable[[FleetStory, Vm], None] = lambda _story, _vm: None, **wishes: object
) -> Callable[..., Operation]:
    def arrange(story: FleetStory) -> Operation:
        vm = story.running_vm(_name("web"))
        before(story, vm)
        return story.accept_power(story.vm(vm.id), verb, **wishes)

    return arrange


def _stopped(story: FleetStory, vm: Vm) -> None:
    story.accept_power(vm, "stop", force=True)
    story.settle()


def _recover(story: FleetStory) -> Operation:
    """Its guest is gone for certain: its holders were proven gone before a recovery is accepted."""
    vm = story.running_vm(_name("web"))
    _stopped(story, vm)
    story.wish(vm.id, DesiredPower.RUNNING)
    present = story.vm(vm.id)
    return story.db.write(
        lambda session: recovery.recover(session, present, because="a test", now=story.clock.now(), actor=story.actor)
    )


def _settle_move(story: FleetStory) -> Operation:
    """Its target is proven gone before it was prepared; the guest runs on at the source."""
    vm = story.running_vm(_name("web"))
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
    vm = story.running_vm(_name("web"))
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
    vm = story.running_vm(_name("web"))
    _deleted(story, vm)
    return story.accept("vm.purge", vm.id, {"vm_id": vm.id}, name=vm.name, project_id=vm.project_id)


def _purged(story: FleetStory, operation: Operation) -> None:
    assert story.volumes(operation.subject_id) == ()


def _migrate(story: FleetStory) -> Operation:
    return story.accept_power(story.running_vm(_name("web")), "migrate")


def _migrate_local(story: FleetStory) -> Operation:
    return story.accept_power(story.running_vm(_name("web"), pool=story.local), "migrate")


def _moved(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert operation.result is not None
    assert vm.host_id == operation.result["target_host_id"] != operation.result["source_host_id"]
    assert story.running_on(vm.id) == {vm.host_id}


def _stayed(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.observed_state is ObservedState.RUNNING
    assert story.running_on(vm.id) == {vm.host_id}


# --- images and volumes ------------------------------------------------------------------------------------------------------


def _import(story: FleetStory, *, is_local: bool) -> Operation:
    spec = image_service.ImageSpec(
        name=_name("image"),
        kind="disk",
        format="qcow2",
        source=image_service.FromHost(host="node1", file_name="disk.qcow2"),
        pool=(story.local if is_local else story.shared).name,
        is_shared=False,
        labels={},
    )
    _view, operation = story.db.write(
        lambda session: image_service.create(
            session, spec, project=story.project, allowed_url_hosts=(), actor=story.actor, now=story.clock.now()
        )
    )
    return operation


def _imported(story: FleetStory, operation: Operation) -> None:
    image = story.db.read(lambda session: describe.get_image(session, operation.subject_id))
    assert (image.state, len(image.stored_sha256), image.virtual_size_bytes) == ("ready", 64, GIB)


def _not_imported(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: images.find(session, story.project.id, operation.subject_name))
    assert found is None, "the name is free"


def _evict_image(story: FleetStory) -> Operation:
    image = story.add_image(_name("image"), story.shared)
    copy_image(story, image.id, story.local, story.host_ids[0])
    params = {"image_id": image.id, "pool_id": story.local.id, "host_id": story.host_ids[0]}
    return story.accept("image.evict", image.id, params, name=image.name)


def _copy_is_gone(story: FleetStory, operation: Operation) -> None:
    (left,) = story.db.read(lambda session: image_replicas.of_image(session, operation.subject_id))
    assert (left.pool_id, left.state) == (story.shared.id, "ready")


def _delete_image(story: FleetStory) -> Operation:
    """One replica on the shared pool, one on a local one."""
    image = story.add_image(_name("image"), story.shared)
    copy_image(story, image.id, story.local, story.host_ids[0])
    return story.db.write(
        lambda session: image_service.delete(
            session,
            image.id,
            project=story.project,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def copy_image(story: FleetStory, image_id: str, pool: object, host_id: str) -> None:
    spec = describe.pool_spec(pool)  # type: ignore[arg-type]
    wanted = ImageSpec(image_id=image_id, pool_id=spec.pool_id, format=DiskFormat.QCOW2)
    story.hypervisor(host_id).import_image(wanted, spec, HostFileSource(file_name="copy"), NeverCancelled())
    place = "" if spec.is_shared else host_id
    story.db.write(
        lambda session: image_replicas.add(session, image_id=image_id, pool_id=spec.pool_id, host_id=place, now=story.clock.now())
    )


def _gone_image(story: FleetStory, operation: Operation) -> None:
    _not_imported(story, operation)


def _create_volume(story: FleetStory, *, is_clone: bool) -> Operation:
    image = story.add_image(_name("image"), story.shared) if is_clone else None
    spec = volume_service.VolumeSpec(
        name=_name("data"),
        size_bytes=2 * GIB,
        pool=(story.local if is_clone else story.shared).name,
        format="",
        image=image.id if image else "",
    )
    _view, operation = story.db.write(
        lambda session: volume_service.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())
    )
    return operation


def _present_volume(story: FleetStory) -> str:
    operation = _create_volume(story, is_clone=False)
    story.settle()
    return operation.subject_id


def _volume_is_there(story: FleetStory, operation: Operation) -> None:
    volume = story.db.read(lambda session: describe.get_volume(session, operation.subject_id))
    assert (volume.observed_state, volume.deleted_at) == ("present", None)


def _volume_is_gone(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: volumes.find(session, story.project.id, operation.subject_name))
    assert found is None, "the name is free"


def _delete_volume(story: FleetStory) -> Operation:
    volume_id = _present_volume(story)
    return story.db.write(
        lambda session: volume_service.delete(
            session,
            volume_id,
            project=story.project,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def _hidden_volume(story: FleetStory) -> Volume:
    deleted = _delete_volume(story)
    story.settle()
    return story.db.read(lambda session: describe.get_volume(session, deleted.subject_id))


def _undelete_volume(story: FleetStory) -> Operation:
    volume = _hidden_volume(story)
    return story.db.write(
        lambda session: volume_service.undelete(
            session, volume.name, project=story.project, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )


def _purge_volume(story: FleetStory) -> Operation:
    volume = _hidden_volume(story)
    return story.accept("volume.purge", volume.id, {"volume_id": volume.id}, name=volume.name, project_id=volume.project_id)


def _volume_is_purged(story: FleetStory, operation: Operation) -> None:
    volume = story.db.read(lambda session: describe.get_volume(session, operation.subject_id))
    assert (volume.observed_state, volume.purge_after) == ("absent", None)


def _live_volumes(story: FleetStory) -> list[object]:
    def read(session: Session) -> list[object]:
        table = schema.volume
        ids = session.scalars(table.select().with_only_columns(table.c.id).where(table.c.deleted_at.is_(None)))
        return [describe.get_volume(session, volume_id) for volume_id in ids]

    return story.db.read(read)


# --- pools, networks, hosts ----------------------------------------------------------------------------------------------------


def _create_pool(story: FleetStory, *, is_shared: bool) -> Operation:
    name = _name("pool")
    spec = pool_service.PoolSpec(name=name, kind="dir", path=f"/srv/{name}", is_shared=is_shared, is_default=False)
    _view, operation = story.db.write(
        lambda session: pool_service.create(session, spec, actor=story.actor, now=story.clock.now())
    )
    return operation


def _pool_is_usable(story: FleetStory, operation: Operation) -> None:
    view = story.db.read(lambda session: pool_service.get(session, operation.subject_id))
    assert {one.state for one in view.hosts.values()} == {"ready"}
    assert view.spaces
    assert (view.pool.sharing_proven_at is not None) == view.pool.is_shared


def _pool_is_gone(story: FleetStory, operation: Operation) -> None:
    assert story.db.read(lambda session: pools.find(session, operation.subject_name)) is None, "the name is free"
    assert story.db.read(lambda session: pools.at_path(session, f"/srv/{operation.subject_name}")) is None, "the path is free"


def _delete_pool(story: FleetStory) -> Operation:
    """Empty but for a copy of an image that is elsewhere too."""
    pool = story.add_pool(_name("pool"), is_shared=False)
    copy_image(story, story.image.id, pool, story.host_ids[1])
    return story.db.write(
        lambda session: pool_service.delete(session, pool.id, expected_version=None, actor=story.actor, now=story.clock.now())
    )


def _create_network(story: FleetStory) -> Operation:
    spec = network_service.NetworkSpec(name=_name("net"), kind="bridge", bridge="br0", bridges={})
    _view, operation = story.db.write(
        lambda session: network_service.create(session, spec, project=None, actor=story.actor, now=story.clock.now())
    )
    return operation


def _network_is_usable(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: networks.hosts_of(session, [operation.subject_id]))[operation.subject_id]
    assert {one.state for one in found} == {"ready"}


def _network_is_gone(story: FleetStory, operation: Operation) -> None:
    assert story.db.read(lambda session: networks.find(session, "", operation.subject_name)) is None, "the name is free"


def _delete_network(story: FleetStory) -> Operation:
    network = story.add_network(_name("net"))
    return story.db.write(
        lambda session: network_service.delete(
            session,
            network.id,
            project=None,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def _prepare(story: FleetStory) -> Operation:
    name = _name("node-")
    host_id = story.add_host(name)
    return story.accept("host.prepare", host_id, {"host_id": host_id}, name=name)


def _prepared(story: FleetStory, operation: Operation) -> None:
    def read(session: Session) -> set[str]:
        states: set[str] = set()
        for table in (schema.pool_host, schema.network_host):
            query = table.select().with_only_columns(table.c.state).where(table.c.host_id == operation.subject_id)
            states |= set(session.scalars(query))
        return states

    assert story.db.read(read) == {"ready"}


def _remove_host(story: FleetStory) -> Operation:
    name = _name("node-")
    host_id = story.add_host(name)
    return story.accept("host.remove", host_id, {"host_id": host_id, "keep_guests": False}, name=name)


def _remove_host_with_guest(story: FleetStory) -> Operation:
    prepared = _prepare(story)
    story.settle()
    host_id = prepared.subject_id
    story.running_vm(_name("web"), pool=story.local, to_host_id=host_id)
    return story.accept("host.remove", host_id, {"host_id": host_id, "keep_guests": True}, name=prepared.subject_name)


def _host_is_gone(story: FleetStory, operation: Operation) -> None:
    assert not _host_is_live(story, operation.subject_id)
    assert story.running_on_host(operation.subject_id) == story.hypervisor(operation.subject_id).domains.keys(), "guests run on"


def _host_stays(story: FleetStory, operation: Operation) -> None:
    assert _host_is_live(story, operation.subject_id)
    table = schema.host
    query = table.select().with_only_columns(table.c.is_cordoned).where(table.c.id == operation.subject_id)
    assert story.db.read(lambda session: session.execute(query).scalar_one()) is False


def _host_is_live(story: FleetStory, host_id: str) -> bool:
    table = schema.host
    query = table.select().with_only_columns(table.c.deleted_at).where(table.c.id == host_id)
    return story.db.read(lambda session: session.execute(query).scalar_one()) is None


# --- plans ---------------------------------------------------------------------------------------------------------------------


def _drain(story: FleetStory) -> Operation:
    """A drain of the one host that has a vm; hosts that earlier plans shut are opened first, and what they moved is deleted."""
    story.db.write(lambda session: [reach.set_cordon(session, one, is_cordoned=False) for one in story.host_ids])
    for vm_id in sorted(story.fleet_vms()):
        story.accept_power(story.vm(vm_id), "delete")
        story.settle()
    vm = story.running_vm(_name("web"))
    wish = plan_service.PlanWish(kind=PlanKind.DRAIN, hosts=(vm.host_id,))

    def work(session: Session) -> Operation:
        view = plan_service.create(session, wish, actor=story.actor, now=story.clock.now())
        return plan_service.apply(session, view.row.id, actor=story.actor, now=story.clock.now())

    return story.db.write(work)


def _drained(story: FleetStory, operation: Operation) -> None:
    view = story.db.read(lambda session: plan_service.get(session, operation.subject_id))
    assert view.row.state == "applied"
    assert [one.state for one in view.steps] == ["done"] * len(view.plan.steps)
    for host_id in view.plan.scope:
        assert story.running_on_host(host_id) == frozenset()
    for step in view.plan.moves:
        assert story.running_on(step.vm_id) == {story.vm(step.vm_id).host_id}


def _called_off(story: FleetStory, operation: Operation) -> None:
    view = story.db.read(lambda session: plan_service.get(session, operation.subject_id))
    assert view.row.state in {"open", "cancelled"}
    assert not any(one.state in {"pending", "running", "stopping"} for one in view.steps)
    assert not any(host.is_cordoned for host in story.db.read(hosts.live)), "what it shut is open again"
    for step in view.plan.moves:
        assert story.running_on(step.vm_id) == {story.vm(step.vm_id).host_id}


EXAMPLES: dict[str, Example] = {
    "plan.apply": Example(kind="plan.apply", arrange=_drain, done=_drained, undone=_called_off),
    "vm.create": Example(kind="vm.create", arrange=_create, done=_created, undone=_not_created),
    "vm.create on a local pool": Example(kind="vm.create", arrange=_create_local, done=_created, undone=_not_created),
    "vm.create from a volume": Example(kind="vm.create", arrange=_create_from_volume, done=_created, undone=_volume_survived),
    "vm.delete": Example(kind="vm.delete", arrange=_power("delete"), done=_ends_as(ObservedState.ABSENT)),
    "vm.undelete": Example(kind="vm.undelete", arrange=_power("undelete", before=_deleted), done=_ends_as(ObservedState.STOPPED)),
    "vm.start": Example(
        kind="vm.start",
        arrange=_power("start", before=_stopped),
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
    "vm.clean_copy": Example(kind="vm.clean_copy", arrange=_clean_copy, done=_copy_cleaned),
    "vm.purge": Example(kind="vm.purge", arrange=_purge, done=_purged),
    "vm.create from an ISO": Example(
        kind="vm.create", arrange=lambda story: changes.installs(story, _name("web")), done=_created, undone=_not_created
    ),
    "vm.change_cdrom": Example(
        kind="vm.change_cdrom",
        arrange=lambda story: changes.changes_cdrom(story, _name("web")),
        done=changes.has_medium("second"),
        undone=changes.has_medium("first"),
    ),
    "vm.resize": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, _name("web"), vcpus=4, memory_mib=2048),
        done=changes.has_shape(4, 2048),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize to less": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, _name("web"), vcpus=1, memory_mib=512),
        done=changes.has_shape(1, 512),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize at its next stop": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, _name("web"), vcpus=8, when=When.NEXT_STOP),
        done=changes.has_shape(2, 1024, later=(8, 0)),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.resize of a stopped vm": Example(
        kind="vm.resize",
        arrange=lambda story: changes.resizes(story, _name("web"), before=_stopped, vcpus=8),
        done=changes.has_shape(8, 1024),
        undone=changes.has_shape(2, 1024),
    ),
    "vm.attach of a volume": Example(
        kind="vm.attach",
        arrange=lambda story: changes.attaches(story, _name("web"), volume_id=_present_volume(story)),
        done=changes.has_devices(2, 1),
        undone=changes.has_devices(1, 1),
    ),
    "vm.attach of a card to a stopped vm": Example(
        kind="vm.attach",
        arrange=lambda story: changes.attaches(story, _name("web"), before=_stopped),
        done=changes.has_devices(1, 2),
        undone=changes.has_devices(1, 1),
    ),
    "vm.detach of a volume": Example(
        kind="vm.detach",
        arrange=lambda story: changes.detaches(story, _name("web"), volume_id=_present_volume(story)),
        done=changes.has_devices(1, 1),
        undone=changes.has_devices(2, 1),
    ),
    "vm.detach of a card": Example(
        kind="vm.detach",
        arrange=lambda story: changes.detaches(story, _name("web")),
        done=changes.has_devices(1, 1),
        undone=changes.has_devices(1, 2),
    ),
    "volume.resize under a guest": Example(
        kind="volume.resize",
        arrange=lambda story: changes.grows_root(story, _name("web")),
        done=changes.root_size(3 * GIB),
        undone=changes.root_size(2 * GIB),
        takes_place=frozenset({"grow"}),
    ),
    "volume.limit under a guest": Example(
        kind="volume.limit",
        arrange=lambda story: changes.limits_root(story, _name("web")),
        done=changes.root_limits(500, 100),
        undone=changes.root_limits(0, 0),
    ),
    "volume.resize of one apart": Example(
        kind="volume.resize",
        arrange=lambda story: changes.accept_volume_resize(story, _present_volume(story), 3 * GIB),
        done=_volume_is_there,
        undone=_volume_is_there,
        takes_place=frozenset({"grow"}),
    ),
    "snapshot.create": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, _name("web")),
        done=snaps.created("filesystem"),
        undone=snaps.not_created,
    ),
    "snapshot.create with memory": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, _name("web"), has_memory=True),
        done=snaps.created("memory"),
        undone=snaps.not_created,
    ),
    "snapshot.create of a stopped vm": Example(
        kind="snapshot.create",
        arrange=lambda story: snaps.creates(story, _name("web"), stopped=True),
        done=snaps.created("stopped"),
        undone=snaps.not_created,
    ),
    "snapshot.delete below another": Example(
        kind="snapshot.delete",
        arrange=lambda story: snaps.deletes(story, _name("web")),
        done=snaps.deleted(1, "after"),
        undone=snaps.not_deleted,
    ),
    "snapshot.delete of the last": Example(
        kind="snapshot.delete",
        arrange=lambda story: snaps.deletes_last(story, _name("web")),
        done=snaps.deleted(0),
        undone=snaps.not_deleted,
    ),
    "snapshot.revert": Example(
        kind="snapshot.revert",
        arrange=lambda story: snaps.reverts(story, _name("web")),
        done=snaps.reverted,
        undone=snaps.not_reverted,
        takes_place=frozenset({"off"}),
    ),
    "snapshot.revert with memory": Example(
        kind="snapshot.revert",
        arrange=lambda story: snaps.reverts(story, _name("web"), has_memory=True),
        done=snaps.reverted,
        undone=snaps.not_reverted,
        takes_place=frozenset({"off"}),
    ),
    "vm.create as a linked clone": Example(
        kind="vm.create",
        arrange=lambda story: snaps.is_cloned(story, _name("web"), is_linked=True),
        done=snaps.cloned,
        undone=snaps.not_cloned,
    ),
    "vm.create as a full clone": Example(
        kind="vm.create",
        arrange=lambda story: snaps.is_cloned(story, _name("web"), is_linked=False),
        done=snaps.cloned,
        undone=snaps.not_cloned,
    ),
    "template.create": Example(
        kind="template.create",
        arrange=lambda story: snaps.makes_template(story, _name("web")),
        done=snaps.template_made,
        undone=snaps.template_gone,
    ),
    "template.delete": Example(
        kind="template.delete",
        arrange=lambda story: snaps.deletes_template(story, _name("web")),
        done=snaps.template_gone,
        undone=snaps.template_made,
    ),
    "template.create-vms": Example(
        kind="template.create-vms", arrange=lambda story: snaps.makes_vms(story, _name("web")), done=snaps.vms_made
    ),
    "image.import": Example(
        kind="image.import", arrange=lambda story: _import(story, is_local=False), done=_imported, undone=_not_imported
    ),
    "image.import on a local pool": Example(
        kind="image.import", arrange=lambda story: _import(story, is_local=True), done=_imported, undone=_not_imported
    ),
    "image.evict": Example(kind="image.evict", arrange=_evict_image, done=_copy_is_gone),
    "image.delete": Example(kind="image.delete", arrange=_delete_image, done=_gone_image),
    "volume.create": Example(
        kind="volume.create",
        arrange=lambda story: _create_volume(story, is_clone=False),
        done=_volume_is_there,
        undone=_volume_is_gone,
    ),
    "volume.create as a clone on a local pool": Example(
        kind="volume.create",
        arrange=lambda story: _create_volume(story, is_clone=True),
        done=_volume_is_there,
        undone=_volume_is_gone,
    ),
    "volume.delete": Example(kind="volume.delete", arrange=_delete_volume, done=_volume_is_gone, undone=_volume_is_there),
    "volume.undelete": Example(kind="volume.undelete", arrange=_undelete_volume, done=_volume_is_there, undone=_volume_is_gone),
    "volume.purge": Example(kind="volume.purge", arrange=_purge_volume, done=_volume_is_purged, undone=_volume_is_gone),
    "pool.create": Example(
        kind="pool.create",
        arrange=lambda story: _create_pool(story, is_shared=True),
        done=_pool_is_usable,
        undone=_pool_is_gone,
    ),
    "pool.create of a local one": Example(
        kind="pool.create",
        arrange=lambda story: _create_pool(story, is_shared=False),
        done=_pool_is_usable,
        undone=_pool_is_gone,
    ),
    "pool.delete": Example(kind="pool.delete", arrange=_delete_pool, done=_pool_is_gone),
    "network.create": Example(kind="network.create", arrange=_create_network, done=_network_is_usable, undone=_network_is_gone),
    "network.delete": Example(kind="network.delete", arrange=_delete_network, done=_network_is_gone),
    "host.prepare": Example(kind="host.prepare", arrange=_prepare, done=_prepared),
    "host.remove": Example(kind="host.remove", arrange=_remove_host, done=_host_is_gone, undone=_host_stays),
    "host.remove with a guest": Example(
        kind="host.remove", arrange=_remove_host_with_guest, done=_host_is_gone, undone=_host_stays
    ),
    **backup.EXAMPLES,
}
