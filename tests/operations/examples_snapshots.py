"""One valid operation of every kind that works on snapshots and clones. See `examples.py`.

Simulated guests leave marks on their disks: `made` before the snapshot, `later` after it.
"""

from collections.abc import Callable

from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor import simulated_layers
from trimtab_agent.hypervisor.simulated_domains import ACTIVE
from trimtab_controller.core.model import Operation, Snapshot, Template, Vm
from trimtab_controller.services import clones, templates
from trimtab_controller.services import snapshots as service
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import describe, snapshots, vms
from trimtab_controller.store import templates as template_store
from trimtab_controller.store.database import Session


def _caller(story: FleetStory) -> Caller:
    return Caller(actor=story.actor, expected_version=None, now=story.clock.now())


def accept_snapshot(story: FleetStory, vm: Vm, name: str, *, has_memory: bool = False) -> Operation:
    return story.db.write(
        lambda session: service.create(session, vms.get(session, vm.id), _caller(story), name=name, has_memory=has_memory)
    )


def accept_revert(story: FleetStory, vm: Vm, name: str, *, disk_only: bool = False) -> Operation:
    def work(session: Session) -> Operation:
        present = vms.get(session, vm.id)
        return service.revert(session, present, _caller(story), service.find(session, present, name), disk_only=disk_only)

    return story.db.write(work)


def accept_delete(story: FleetStory, vm: Vm, name: str) -> Operation:
    def work(session: Session) -> Operation:
        present = vms.get(session, vm.id)
        return service.delete(session, present, _caller(story), service.find(session, present, name))

    return story.db.write(work)


def kept(story: FleetStory, vm_id: str) -> tuple[Snapshot, ...]:
    return story.db.read(lambda session: snapshots.of_vm(session, vm_id))


def snapshotted(story: FleetStory, vm: Vm, name: str, *, has_memory: bool = False) -> None:
    """Take a snapshot to its end."""
    accept_snapshot(story, vm, name, has_memory=has_memory)
    story.settle()
    assert [one.state for one in kept(story, vm.id) if one.name == name] == ["ready"]


def writes(story: FleetStory, vm: Vm, mark: str) -> None:
    present = story.vm(vm.id)
    simulated_layers.write(story.hypervisor(present.host_id), vm.id, mark)


def marks(story: FleetStory, vm_id: str) -> frozenset[str]:
    """Return what the vm would find on its disks if it were started now from what SQL says."""
    vm = story.vm(vm_id)

    def read(session: Session) -> object:
        return describe.domain_spec(session, describe.read_vm(session, vm_id), vm.host_id)

    return simulated_layers.read(story.hypervisor(vm.host_id), story.db.read(read))  # type: ignore[arg-type]


def layer_count(story: FleetStory, vm_id: str) -> int:
    """Return how many files the vm's disks have over their bottom ones; SQL and the pool agree about them."""
    volumes = story.volumes(vm_id)
    ids = [volume.id for volume in volumes]
    pools = {
        volume.pool_id: story.db.read(lambda session, pool_id=volume.pool_id: describe.get_pool(session, pool_id))  # type: ignore[misc]
        for volume in volumes
    }
    noted = story.db.read(lambda session: snapshots.layer_ids_of(session, ids))
    vm = story.vm(vm_id)
    stores = [story.fleet.store(vm.host_id, describe.pool_spec(pools[volume.pool_id])) for volume in volumes]
    files = {volume.id: store.volumes[volume.id] for volume, store in zip(volumes, stores, strict=True)}
    for volume_id, layers in noted.items():
        assert set(files[volume_id].layers) == {"", *layers}, "SQL knows every layer, and every layer is there"
        for layer_id, below in layers.items():
            assert files[volume_id].layers[layer_id].below == (volume_id, below), "and lies where SQL says"
    return sum(len(layers) for layers in noted.values())


def runs_on_what_sql_says(story: FleetStory, vm_id: str) -> None:
    vm = story.vm(vm_id)
    domain = story.hypervisor(vm.host_id).domains[vm_id]
    for volume in story.volumes(vm_id):
        assert volume.merge_layer_id is None
        if domain.state in ACTIVE:
            assert domain.open_layers[volume.id] == volume.layer_id
        assert [disk.layer_id for disk in domain.spec.disks if disk.volume_id == volume.id] == [volume.layer_id]


# --- examples ------------------------------------------------------------------------------------------------------------------


def creates(story: FleetStory, name: str, *, has_memory: bool = False, stopped: bool = False) -> Operation:
    vm = story.running_vm(name)
    writes(story, vm, "made")
    if stopped:
        story.accept_power(vm, "stop", force=True)
        story.settle()
    return accept_snapshot(story, story.vm(vm.id), "before", has_memory=has_memory)


def created(consistency: str) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm_id = operation.subject_id
        (snapshot,) = kept(story, vm_id)
        assert (snapshot.state, snapshot.consistency) == ("ready", consistency)
        assert story.vm(vm_id).current_snapshot_id == snapshot.id
        assert layer_count(story, vm_id) == 1
        assert marks(story, vm_id) == {"made"}
        runs_on_what_sql_says(story, vm_id)
        assert _memories(story, vm_id) == ({snapshot.id} if consistency == "memory" else set())

    return check


def not_created(story: FleetStory, operation: Operation) -> None:
    """A half-made snapshot leaves nothing behind, and the guest runs on with what it has."""
    vm_id = operation.subject_id
    assert kept(story, vm_id) == ()
    assert layer_count(story, vm_id) == 0
    assert marks(story, vm_id) == {"made"}
    runs_on_what_sql_says(story, vm_id)
    assert _memories(story, vm_id) == set()


def deletes(story: FleetStory, name: str, *, has_memory: bool = False) -> Operation:
    """The oldest of three, with a branch beside them: one merge under the guest, one deletion of what nothing needs."""
    vm = story.running_vm(name)
    writes(story, vm, "made")
    snapshotted(story, vm, "before", has_memory=has_memory)
    writes(story, vm, "later")
    snapshotted(story, vm, "after")
    writes(story, vm, "last")
    return accept_delete(story, vm, "before")


def deletes_last(story: FleetStory, name: str) -> Operation:
    vm = story.running_vm(name)
    writes(story, vm, "made")
    snapshotted(story, vm, "before", has_memory=True)
    writes(story, vm, "last")
    return accept_delete(story, vm, "before")


def deleted(layers: int, *left: str) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm_id = operation.subject_id
        assert tuple(one.name for one in kept(story, vm_id)) == left
        assert layer_count(story, vm_id) == layers
        assert {"made", "last"} <= marks(story, vm_id)
        runs_on_what_sql_says(story, vm_id)
        assert _memories(story, vm_id) == set()
        for snapshot in kept(story, vm_id):
            accept_revert(story, story.vm(vm_id), snapshot.name)
            story.settle()
            assert marks(story, vm_id) == {"made", "later"}, "a snapshot above it still keeps what it kept"

    return check


def not_deleted(story: FleetStory, operation: Operation) -> None:
    assert "ready" in {one.state for one in kept(story, operation.subject_id) if one.name == "before"}
    assert {"made", "last"} <= marks(story, operation.subject_id)
    runs_on_what_sql_says(story, operation.subject_id)


def reverts(story: FleetStory, name: str, *, has_memory: bool = False, stopped: bool = False) -> Operation:
    vm = story.running_vm(name)
    writes(story, vm, "made")
    snapshotted(story, vm, "before", has_memory=has_memory)
    writes(story, vm, "later")
    if stopped:
        story.accept_power(story.vm(vm.id), "stop", force=True)
        story.settle()
    return accept_revert(story, story.vm(vm.id), "before")


def reverted(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    (snapshot,) = kept(story, vm.id)
    assert (snapshot.name, vm.current_snapshot_id) == ("before", snapshot.id)
    assert marks(story, vm.id) == {"made"}
    assert layer_count(story, vm.id) == 1, "what it wrote since is gone, and its file with it"
    assert {volume.generation for volume in story.volumes(vm.id)} == {2}
    assert (story.running_on(vm.id) == {vm.host_id}) == bool(operation.params["should_run"])
    runs_on_what_sql_says(story, vm.id)
    if operation.params["with_memory"]:
        assert "RESTORED" in story.hypervisor(vm.host_id).domains[vm.id].console.decode()


def not_reverted(story: FleetStory, operation: Operation) -> None:
    vm_id = operation.subject_id
    assert marks(story, vm_id) == {"made", "later"}
    assert layer_count(story, vm_id) == 1
    assert {volume.generation for volume in story.volumes(vm_id)} == {1}


def _memories(story: FleetStory, vm_id: str) -> set[str]:
    found = set()
    for host_id in story.fleet.hosts:
        for pool in (story.shared, story.local):
            store = story.fleet.store(host_id, describe.pool_spec(pool))
            found |= {snapshot_id for owner, snapshot_id in store.memories if owner == vm_id}
    return found


# --- clones and templates --------------------------------------------------------------------------------------------------------


def accept_clone(story: FleetStory, vm: Vm, name: str, *, is_linked: bool, snapshot: str = "") -> Operation:
    spec = clones.CloneSpec(name=name, is_linked=is_linked, snapshot=snapshot)
    return story.db.write(
        lambda session: clones.clone(session, vms.get(session, vm.id), _caller(story), spec, project=story.project)[1]
    )


def accept_template(story: FleetStory, vm: Vm, name: str) -> Operation:
    return story.db.write(
        lambda session: templates.create(session, vms.get(session, vm.id), _caller(story), name=name, project=story.project)[1]
    )


def accept_vms(story: FleetStory, template: str, pattern: str, count: int) -> Operation:
    spec = templates.VmsSpec(name_pattern=pattern, count=count)
    return story.db.write(
        lambda session: templates.create_vms(
            session, template, spec, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def is_cloned(story: FleetStory, name: str, *, is_linked: bool) -> Operation:
    vm = story.running_vm(name)
    writes(story, vm, "made")
    snapshotted(story, vm, "before")
    writes(story, vm, "later")
    return accept_clone(story, vm, f"{name}-clone", is_linked=is_linked, snapshot="before")


def cloned(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == {vm.host_id}
    assert marks(story, vm.id) == {"made"}
    writes(story, vm, "own")
    assert marks(story, vm.id) == {"made", "own"}
    source = story.db.read(lambda session: vms.find(session, vm.project_id, vm.name.removesuffix("-clone")))
    assert source is not None
    assert marks(story, source.id) == {"made", "later"}, "the source has nothing of it"


def not_cloned(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == frozenset()
    assert story.db.read(lambda session: vms.find(session, vm.project_id, vm.name, with_deleted=True)) is None, "the name is free"


def makes_template(story: FleetStory, name: str) -> Operation:
    vm = story.running_vm(name)
    writes(story, vm, "made")
    return accept_template(story, vm, f"{name}-template")


def template_of(story: FleetStory, operation: Operation) -> Template | None:
    return story.db.read(lambda session: template_store.find(session, story.project.id, operation.subject_id))


def template_made(story: FleetStory, operation: Operation) -> None:
    template = template_of(story, operation)
    assert template is not None
    image = story.db.read(lambda session: describe.get_image(session, template.image_id))
    assert (template.revision, image.state) == (1, "ready")


def template_gone(story: FleetStory, operation: Operation) -> None:
    assert template_of(story, operation) is None


def deletes_template(story: FleetStory, name: str) -> Operation:
    made = makes_template(story, name)
    story.settle()
    return story.db.write(
        lambda session: templates.delete(
            session, made.subject_id, revision=0, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def makes_vms(story: FleetStory, name: str) -> Operation:
    made = makes_template(story, name)
    story.settle()
    return accept_vms(story, made.subject_id, f"{name}-{{n}}", 2)


def vms_made(story: FleetStory, operation: Operation) -> None:
    for child in operation.params["operation_ids"]:
        vm = story.vm(story.operation(child).subject_id)
        assert story.running_on(vm.id) == {vm.host_id}
        assert vm.template_id == operation.subject_id


def cloned_on_local_storage(story: FleetStory, name: str) -> tuple[Vm, Vm]:
    """Return a vm on its host's own storage and its linked clone: they share `a`, then the one wrote `b`, the other `c`."""
    source = story.running_vm(name, pool=story.local, image=story.add_image(f"image-{name}", story.shared))
    writes(story, source, "a")
    accepted = accept_clone(story, source, f"{name}-clone", is_linked=True)
    story.settle()
    clone = story.vm(accepted.subject_id)
    writes(story, clone, "c")
    writes(story, source, "b")
    return source, clone


def migrates_clone(story: FleetStory, name: str) -> Operation:
    _source, clone = cloned_on_local_storage(story, name)
    return story.accept_power(clone, "migrate")


def clone_migrated(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert operation.result is not None
    assert vm.host_id == operation.result["target_host_id"] != operation.result["source_host_id"]
    assert story.running_on(vm.id) == {vm.host_id}
    (volume,) = story.volumes(vm.id)
    assert (volume.parent_volume_id, volume.host_id, files_on(story, volume.id)) == (None, vm.host_id, [vm.host_id])
    assert marks(story, vm.id) == {"a", "c"}, "what it shared with its source came along"


def clone_stayed(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == {vm.host_id}
    (volume,) = story.volumes(vm.id)
    assert files_on(story, volume.id) == [vm.host_id], "nothing of it is elsewhere"
    assert volume.parent_volume_id is not None
    assert marks(story, vm.id) == {"a", "c"}


def files_on(story: FleetStory, volume_id: str) -> list[str]:
    """Return the hosts on whose own storage there is something of the volume."""
    pool = describe.pool_spec(story.local)
    return [host_id for host_id in story.host_ids if volume_id in story.fleet.store(host_id, pool).volumes]
