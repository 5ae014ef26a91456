"""One valid operation of every kind that changes a vm or a volume that is there. See `examples.py`."""

from collections.abc import Callable
from typing import Any

from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.model import Image, Operation, Vm
from trimtab_controller.core.resize import When
from trimtab_controller.services import vm_devices, vm_ha, vm_resize, vm_resources
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import describe, images, vms
from trimtab_controller.store.database import Session
from trimtab_protos.device_messages import GuestResources


def caller(story: FleetStory) -> Caller:
    return Caller(actor=story.actor, expected_version=None, now=story.clock.now())


def growing_vm(story: FleetStory, name: str, **wishes: Any) -> Vm:
    """Return a running vm that can be given twice of everything while it runs."""
    return story.running_vm(name, **{"vcpus": 2, "vcpus_max": 4, "memory_mib": 1024, "memory_max_mib": 2048, **wishes})


def accept_resize(story: FleetStory, vm: Vm, *, vcpus: int = 0, memory_mib: int = 0, when: When = When.AUTO) -> Operation:
    return story.db.write(
        lambda session: vm_resize.resize(
            session, vms.get(session, vm.id), caller(story), vcpus=vcpus, memory_mib=memory_mib, when=when
        )
    )


def accept_volume_resize(story: FleetStory, volume_id: str, size_bytes: int) -> Operation:
    return story.db.write(
        lambda session: volume_service.resize(
            session,
            volume_id,
            size_bytes,
            project=story.project,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def resizes(story: FleetStory, name: str, *, before: Callable[[FleetStory, Vm], None] | None = None, **wish: Any) -> Operation:
    vm = growing_vm(story, name)
    if before is not None:
        before(story, vm)
    return accept_resize(story, story.vm(vm.id), **wish)


def has_shape(vcpus: int, memory_mib: int, *, later: tuple[int, int] = (0, 0)) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        assert (vm.vcpus, vm.memory_mib, vm.next_vcpus, vm.next_memory_mib) == (vcpus, memory_mib, *later)
        for host_id in story.running_on(vm.id):
            spec = story.hypervisor(host_id).domains[vm.id].spec
            assert (spec.vcpus, spec.memory_mib) == (vcpus, memory_mib), "the guest has what its row says"

    return check


def accept_resources(story: FleetStory, vm: Vm, *, balloon_min_mib: int | None, cpu_class: str | None) -> Operation:
    wish = {"balloon_min_mib": balloon_min_mib, "cpu_class": cpu_class}
    return story.db.write(
        lambda session: vm_resources.change(session, vms.get(session, vm.id), caller(story), **wish)  # type: ignore[arg-type]
    )


def sets_resources(story: FleetStory, name: str) -> Operation:
    vm = story.running_vm(name, memory_mib=512)
    return accept_resources(story, story.vm(vm.id), balloon_min_mib=256, cpu_class="low")


def has_resources(balloon_min_mib: int, cpu_weight: int) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        assert vm.balloon_min_mib == balloon_min_mib
        spec = story.hypervisor(vm.host_id).domains[vm.id].spec
        told = spec.resources or GuestResources()
        assert (told.balloon_min_mib, told.cpu_weight) == (balloon_min_mib, cpu_weight), "the guest has what its row says"

    return check


def accept_ha(story: FleetStory, vm: Vm, ha: str | None, **wish: Any) -> Operation:
    return story.db.write(
        lambda session: vm_ha.change(session, vms.get(session, vm.id), caller(story), vm_ha.HaWish(ha=ha, **wish))
    )


def sets_ha(story: FleetStory, name: str, *, before: str, after: str) -> Operation:
    vm = story.running_vm(name, ha=before, start_group="shop", start_order=1)
    return accept_ha(story, vm, after, priority=10, start_group="yard", start_order=2)


def is_kept(ha: str, priority: int, group: str, order: int) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        assert (vm.ha, vm.priority, vm.start_group, vm.start_order) == (ha, priority, group, order)
        assert story.hypervisor(vm.host_id).domains[vm.id].spec.is_kept == (ha == "restart"), "its host knows what its row says"

    return check


def grows_root(story: FleetStory, name: str) -> Operation:
    vm = story.running_vm(name)
    return accept_volume_resize(story, story.volumes(vm.id)[0].id, 3 * GIB)


def root_size(size_bytes: int) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        (volume,) = story.volumes(operation.subject_id)
        assert volume.size_bytes == size_bytes
        store = story.fleet.store(story.vm(operation.subject_id).host_id, story_pool(story))
        assert store.volumes[volume.id].spec.size_bytes == size_bytes, "the file has what its row says"

    return check


def limits_root(story: FleetStory, name: str) -> Operation:
    vm = story.running_vm(name)
    return story.db.write(
        lambda session: volume_service.limit(
            session,
            story.volumes(vm.id)[0].id,
            iops=500,
            bandwidth_mib_s=100,
            project=story.project,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def root_limits(iops: int, bandwidth_mib_s: int) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        (volume,) = story.volumes(vm.id)
        (disk,) = story.hypervisor(vm.host_id).domains[vm.id].spec.disks
        assert (volume.iops_limit, volume.bandwidth_limit_mib_s) == (iops, bandwidth_mib_s)
        assert (disk.iops_limit, disk.bandwidth_limit_bytes_s) == (iops, bandwidth_mib_s << 20), "the guest has what its row says"

    return check


# --- devices -----------------------------------------------------------------------------------------------------------------


def accept_attach(story: FleetStory, vm: Vm, *, volume: str = "", wish: NicWish | None = None) -> Operation:
    def work(session: Session) -> Operation:
        present = vms.get(session, vm.id)
        return vm_devices.attach(session, present, caller(story), volume=volume, wish=wish, project=story.project)

    return story.db.write(work)


def accept_detach(story: FleetStory, vm: Vm, *, volume: str = "", nic: str = "") -> Operation:
    def work(session: Session) -> Operation:
        present = vms.get(session, vm.id)
        if nic:
            return vm_devices.detach_nic(session, present, caller(story), nic=nic)
        return vm_devices.detach_volume(session, present, caller(story), volume=volume, project=story.project)

    return story.db.write(work)


def attaches(
    story: FleetStory,
    name: str,
    *,
    volume_id: str = "",
    has_card: bool = False,
    before: Callable[[FleetStory, Vm], None] | None = None,
) -> Operation:
    """Attach this volume, a card on the fleet's network where there is none or `has_card`."""
    vm = story.running_vm(name)
    if before is not None:
        before(story, vm)
    wish = NicWish(network=story.network.id) if has_card or not volume_id else None
    return accept_attach(story, story.vm(vm.id), volume=volume_id, wish=wish)


def detaches(story: FleetStory, name: str, *, volume_id: str = "") -> Operation:
    attached = attaches(story, name, volume_id=volume_id)
    story.settle()
    vm = story.vm(attached.subject_id)
    return accept_detach(story, vm, volume=volume_id, nic=str(attached.params.get("nic_id", "")))


def has_devices(disks: int, nics: int) -> Callable[[FleetStory, Operation], None]:
    """The vm's rows and the running guest have as many; what it has not belongs to nobody."""

    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        cards = story.db.read(lambda session: vms.nics_of(session, [vm.id]))[vm.id]
        assert (len(story.volumes(vm.id)), len(cards)) == (disks, nics)
        (domain,) = [story.hypervisor(host_id).domains[vm.id] for host_id in [vm.host_id]]
        assert (len(domain.spec.disks), len(domain.spec.nics)) == (disks, nics), "the guest has what its rows say"
        open_volumes = {
            volume_id
            for volume_id, volume in story.fleet.store(vm.host_id, story_pool(story)).volumes.items()
            if volume.writer == (vm.host_id, vm.id)
        }
        if story.running_on(vm.id):
            assert open_volumes == {volume.id for volume in story.volumes(vm.id)}

    return check


# --- ISO images --------------------------------------------------------------------------------------------------------------


def iso(story: FleetStory, name: str) -> Image:
    """Return an ISO image in the shared pool, made once."""
    found = story.db.read(lambda session: images.find(session, story.project.id, name))
    return found or story.add_image(name, story.shared, kind="iso")


def installs(story: FleetStory, name: str, **wishes: Any) -> Operation:
    """Create on a local pool, so that the ISO is copied to the host."""
    given = {"iso": iso(story, f"{name}-iso").id, "image_id": "", "disk_bytes": 2 * GIB, "os": "generic", **wishes}
    return story.accept_create(name, pool=story.local, **given)[1]


def changes_cdrom(story: FleetStory, name: str) -> Operation:
    first, second = iso(story, f"{name}-first"), iso(story, f"{name}-second")
    created = installs(story, name, iso=first.id)
    story.settle()
    return story.db.write(
        lambda session: vm_devices.change_cdrom(
            session, vms.get(session, created.subject_id), caller(story), iso=second.id, project=story.project
        )
    )


def has_medium(which: str) -> Callable[[FleetStory, Operation], None]:
    def check(story: FleetStory, operation: Operation) -> None:
        vm = story.vm(operation.subject_id)
        wanted = iso(story, f"{vm.name}-{which}").id
        drive = story.hypervisor(vm.host_id).domains[vm.id].spec.cdrom
        assert drive is not None
        assert (vm.cdrom_image_id, drive.image_id) == (wanted, wanted)

    return check


def story_pool(story: FleetStory) -> Any:
    return describe.pool_spec(story.shared)
