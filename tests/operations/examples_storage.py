"""One valid operation of every kind that works on images, volumes and pools. See `examples.py`."""

from dataclasses import replace

from tests.operations.example import Example, name_of
from tests.operations.kit import GIB, FleetStory, NeverCancelled
from trimtab_agent.hypervisor import simulated_layers
from trimtab_agent.hypervisor.simulation import StoredVolume
from trimtab_controller.core.model import Operation, Pool, Volume
from trimtab_controller.services import images as image_service
from trimtab_controller.services import pools as pool_service
from trimtab_controller.services import volume_moves
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.store import (
    describe,
    image_replicas,
    images,
    pools,
    volume_keys,
    volumes,
)
from trimtab_controller.store import volume_moves as move_store
from trimtab_controller.store.database import Session
from trimtab_protos.messages import DiskFormat, HostFileSource, ImageSpec


def _import(story: FleetStory, *, is_local: bool) -> Operation:
    spec = image_service.ImageSpec(
        name=name_of("image"),
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
    image = story.add_image(name_of("image"), story.shared)
    copy_image(story, image.id, story.local, story.host_ids[0])
    params = {"image_id": image.id, "pool_id": story.local.id, "host_id": story.host_ids[0]}
    return story.accept("image.evict", image.id, params, name=image.name)


def _copy_is_gone(story: FleetStory, operation: Operation) -> None:
    (left,) = story.db.read(lambda session: image_replicas.of_image(session, operation.subject_id))
    assert (left.pool_id, left.state) == (story.shared.id, "ready")


def _delete_image(story: FleetStory) -> Operation:
    """One replica on the shared pool, one on a local one."""
    image = story.add_image(name_of("image"), story.shared)
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


def _create_volume(story: FleetStory, *, is_clone: bool, is_encrypted: bool = False) -> Operation:
    image = story.add_image(name_of("image"), story.shared) if is_clone else None
    spec = volume_service.VolumeSpec(
        name=name_of("data"),
        size_bytes=2 * GIB,
        pool=(story.local if is_clone else story.shared).name,
        format="",
        image=image.id if image else "",
        is_encrypted=is_encrypted,
    )
    _view, operation = story.db.write(
        lambda session: volume_service.create(
            session, spec, project=story.project, actor=story.actor, now=story.clock.now(), box=story.secrets
        )
    )
    return operation


def _encrypted_is_there(story: FleetStory, operation: Operation) -> None:
    """It stands alone, and its host was told a key which no row shows."""
    volume_is_there(story, operation)
    volume = story.db.read(lambda session: describe.get_volume(session, operation.subject_id))
    assert (volume.is_encrypted, volume.base_image_id) == (True, None)
    sealed = story.db.read(lambda session: volume_keys.of_subject(session, volume.id))[volume.id]
    key = story.secrets.open(sealed, place=volume.id)
    assert {one.volume_keys[volume.id] for one in story.fleet.hosts.values() if volume.id in one.volume_keys} == {key}
    assert key not in sealed


def _encrypted_is_gone(story: FleetStory, operation: Operation) -> None:
    volume_is_gone(story, operation)
    assert story.db.read(lambda session: volume_keys.of_subject(session, operation.subject_id)) == {}, "nor its key"


def present_volume(story: FleetStory) -> str:
    operation = _create_volume(story, is_clone=False)
    story.settle()
    return operation.subject_id


def volume_is_there(story: FleetStory, operation: Operation) -> None:
    volume = story.db.read(lambda session: describe.get_volume(session, operation.subject_id))
    assert (volume.observed_state, volume.deleted_at) == ("present", None)


def volume_is_gone(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: volumes.find(session, story.project.id, operation.subject_name))
    assert found is None, "the name is free"


def _delete_volume(story: FleetStory) -> Operation:
    volume_id = present_volume(story)
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


def _create_pool(story: FleetStory, *, is_shared: bool) -> Operation:
    name = name_of("pool")
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
    pool = story.add_pool(name_of("pool"), is_shared=False)
    copy_image(story, story.image.id, pool, story.host_ids[1])
    return story.db.write(
        lambda session: pool_service.delete(session, pool.id, expected_version=None, actor=story.actor, now=story.clock.now())
    )


# --- moves between pools -----------------------------------------------------------------------------------------------------


def other_pool(story: FleetStory) -> Pool:
    """Return a second shared pool, made once for each fleet."""
    found = story.db.read(lambda session: pools.find(session, "second"))
    return found or story.add_pool("second", is_shared=True)


def accept_move(story: FleetStory, volume_id: str, pool: Pool) -> Operation:
    return story.db.write(
        lambda session: volume_moves.move(
            session,
            volume_id,
            volume_moves.MoveWish(to_pool=pool.name),
            project=story.project,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def stored(story: FleetStory, pool: Pool, volume_id: str) -> StoredVolume | None:
    """Return what a pool holds of the volume, as the first host sees it."""
    return story.fleet.store(story.host_ids[0], describe.pool_spec(pool)).volumes.get(volume_id)


def moves_root(story: FleetStory, *, is_running: bool) -> Operation:
    """The root disk of a vm, a linked clone of its image."""
    vm = story.running_vm(name_of("web"))
    simulated_layers.write(story.hypervisor(vm.host_id), vm.id, "made")
    if not is_running:
        story.accept_power(vm, "stop", force=True)
        story.settle()
    return accept_move(story, story.volumes(vm.id)[0].id, other_pool(story))


def moved_to(story: FleetStory, pool: Pool, volume_id: str) -> None:
    """The volume is there alone, stands by itself, and holds what its guest wrote."""
    volume = story.db.read(lambda session: describe.get_volume(session, volume_id))
    assert (volume.pool_id, volume.move_state, volume.base_image_id) == (pool.id, "", None)
    (gone,) = {story.shared.id, other_pool(story).id} - {pool.id}
    former = story.shared if gone == story.shared.id else other_pool(story)
    assert stored(story, former, volume_id) is None, "nothing is left where it was"
    there = stored(story, pool, volume_id)
    assert there is not None
    assert there.layers[""].below is None
    if volume.vm_id is not None:
        assert there.layers[""].marks == {"made"}


def _root_moved(story: FleetStory, operation: Operation) -> None:
    moved_to(story, other_pool(story), str(operation.params["volume_id"]))


def stays(story: FleetStory, operation: Operation) -> None:
    volume = story.db.read(lambda session: describe.get_volume(session, str(operation.params["volume_id"])))
    assert (volume.pool_id, volume.move_state, volume.other_pool_id) == (story.shared.id, "", None)
    there = stored(story, story.shared, volume.id)
    assert there is not None
    assert stored(story, other_pool(story), volume.id) is None, "nothing is left where it should have gone"
    if volume.vm_id is not None:
        assert there.layers[""].marks == {"made"}


def _cut_off(story: FleetStory) -> Operation:
    """A move whose operation a deletion took over while both sides were there."""
    vm = story.running_vm(name_of("web"))
    simulated_layers.write(story.hypervisor(vm.host_id), vm.id, "made")
    volume = story.volumes(vm.id)[0]

    def begin(session: Session) -> None:
        assert move_store.begin(session, volume, other_pool(story), "", volume.format)

    other_pool(story)
    story.db.write(begin)
    spec = replace(describe.volume_spec(volume, {}), pool_id=other_pool(story).id)
    story.hypervisor(vm.host_id).ensure_volume(spec, describe.pool_spec(other_pool(story)))
    params = {"volume_id": volume.id, "vm_id": vm.id}
    return story.accept("volume.settle_move", vm.id, params, name=volume.name, project_id=volume.project_id)


EXAMPLES: dict[str, Example] = {
    "volume.move": Example(
        kind="volume.move",
        arrange=lambda story: moves_root(story, is_running=True),
        done=_root_moved,
        undone=stays,
        # A guest that writes to the new place cannot be brought back to one that is gone; a copy that is whole stays.
        takes_place=frozenset({"copy"}),
    ),
    "volume.move of a stopped vm": Example(
        kind="volume.move",
        arrange=lambda story: moves_root(story, is_running=False),
        done=_root_moved,
        undone=stays,
        takes_place=frozenset({"copy"}),
    ),
    "volume.move of a volume apart": Example(
        kind="volume.move",
        arrange=lambda story: accept_move(story, present_volume(story), other_pool(story)),
        done=_root_moved,
        undone=stays,
        takes_place=frozenset({"copy"}),
    ),
    "volume.settle_move": Example(kind="volume.settle_move", arrange=_cut_off, done=stays),
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
        done=volume_is_there,
        undone=volume_is_gone,
    ),
    "volume.create as a clone on a local pool": Example(
        kind="volume.create",
        arrange=lambda story: _create_volume(story, is_clone=True),
        done=volume_is_there,
        undone=volume_is_gone,
    ),
    "volume.create encrypted": Example(
        kind="volume.create",
        arrange=lambda story: _create_volume(story, is_clone=True, is_encrypted=True),
        done=_encrypted_is_there,
        undone=_encrypted_is_gone,
    ),
    "volume.delete": Example(kind="volume.delete", arrange=_delete_volume, done=volume_is_gone, undone=volume_is_there),
    "volume.undelete": Example(kind="volume.undelete", arrange=_undelete_volume, done=volume_is_there, undone=volume_is_gone),
    "volume.purge": Example(kind="volume.purge", arrange=_purge_volume, done=_volume_is_purged, undone=volume_is_gone),
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
}
