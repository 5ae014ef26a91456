"""What every hypervisor promises about layers: what snapshots and clones are made of. See `hosts.py` for the hosts.

What a guest finds on its disks after a revert is asked of real guests in `tests/lab/test_snapshots.py`, of simulated ones in
`tests/operations/test_snapshots.py`.
"""

from dataclasses import dataclass, replace

import pytest

from tests.contract.hosts import (
    MIB,
    Control,
    Hosts,
    Side,
    Vm,
    has_left,
    power,
    refusal,
    until,
    vm_of,
)
from trimtab_agent.hypervisor.base import Stamp
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import (
    DiskFormat,
    DomainSpec,
    DomainState,
    ImageSpec,
    LayerMerge,
    LayerRef,
    MigrationOptions,
    MigrationSide,
    PowerAction,
    VolumeSource,
    VolumeSpec,
)

pytestmark = [pytest.mark.timeout(900)]
STAMP = Stamp(epoch=1, turn=5)


@dataclass(frozen=True, slots=True)
class Layered:
    """A vm and what its layers are called."""

    vm: Vm
    side: Side

    def on(self, layer_id: str, *, merges_into: str | None = None) -> DomainSpec:
        """The vm's spec, its disk on this layer."""
        (disk,) = self.vm.spec.disks
        merging = {"is_merging": True, "merge_layer_id": merges_into} if merges_into is not None else {}
        return replace(self.vm.spec, disks=(replace(disk, layer_id=layer_id, **merging),))  # type: ignore[arg-type]

    def make(self, layer_id: str, *, over: str = "") -> None:
        layer = VolumeSpec(
            volume_id=self.vm.volume.volume_id,
            pool_id=self.vm.pool.pool_id,
            format=DiskFormat.QCOW2,
            size_bytes=self.vm.volume.size_bytes,
            layer_id=layer_id,
            base_volume_id=self.vm.volume.volume_id,
            base_layer_id=over,
        )
        for _twice in range(2):
            assert self.side.hypervisor.ensure_volume(layer, self.vm.pool).is_present

    def switch(self, layer_id: str) -> str:
        result = self.side.hypervisor.switch_layers(self.on(layer_id), STAMP, wants_freeze=True)
        return result.consistency

    def merge(self, top: str, base: str, *children: str, spec: DomainSpec | None = None) -> None:
        volume_id = self.vm.volume.volume_id
        asked = LayerMerge(
            volume_id=volume_id,
            pool_id=self.vm.pool.pool_id,
            top_layer_id=top,
            base_layer_id=base,
            children=tuple(LayerRef(volume_id=volume_id, layer_id=child) for child in children),
            vm_id=self.vm.id,
            keeps_running=True,
        )
        for _twice in range(2):
            self.side.hypervisor.merge_layer(asked, self.vm.pool, spec, STAMP, Control())

    def delete(self, layer_id: str) -> None:
        self.side.hypervisor.delete_layer(self.vm.volume.volume_id, layer_id, self.vm.pool)


@pytest.fixture
def layered(hosts: Hosts, vm: Vm) -> Layered:
    return Layered(vm, hosts.first)


def test_a_stopped_domain_goes_to_another_layer_and_back(layered: Layered) -> None:
    layered.make("lay-one")
    for _twice in range(2):
        assert layered.switch("lay-one") == "crash"
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING
    power(layered.side, layered.vm, PowerAction.FORCE_OFF)
    layered.switch("")
    for _twice in range(2):
        layered.delete("lay-one")
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING


def test_a_layer_that_is_not_there_is_no_place_to_start_from(layered: Layered) -> None:
    assert refusal(lambda: layered.make("lay-two", over="lay-gone")) == (NotFound, "layer-not-found")
    layered.side.hypervisor.define_domain(layered.on("lay-gone"), STAMP)
    assert refusal(lambda: power(layered.side, layered.vm, PowerAction.START))[0] is NotFound


def test_a_running_guest_goes_to_new_layers_and_merges_them_without_a_stop(layered: Layered) -> None:
    starts = power(layered.side, layered.vm, PowerAction.START).starts
    layered.make("lay-one")
    layered.switch("lay-one")
    layered.make("lay-two", over="lay-one")
    for _twice in range(2):
        layered.switch("lay-two")
    assert refusal(lambda: layered.delete("lay-one")) == (Conflict, "layer-in-use")
    assert refusal(lambda: layered.switch("")) == (Conflict, "layer-unexpected")
    # A middle one first, then the one that the guest writes to.
    layered.merge("lay-one", "", "lay-two")
    layered.delete("lay-one")
    layered.merge("lay-two", "", spec=layered.on("lay-two", merges_into=""))
    seen = layered.side.hypervisor.observe_domain(layered.vm.id)
    assert (seen.state, seen.starts) == (DomainState.RUNNING, starts)
    # The definition followed: the guest starts from what is left.
    power(layered.side, layered.vm, PowerAction.FORCE_OFF)
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING


def test_a_stopped_volume_is_merged_and_its_branches_lie_over_what_is_left(layered: Layered) -> None:
    layered.make("lay-one")
    layered.make("lay-two", over="lay-one")
    layered.make("lay-three", over="lay-one")
    layered.side.hypervisor.define_domain(layered.on("lay-two"), STAMP)
    layered.merge("lay-one", "", "lay-two", "lay-three")
    layered.delete("lay-three")
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING


def test_while_a_merge_is_not_recorded_the_domain_is_on_whichever_file_is_there(layered: Layered) -> None:
    layered.make("lay-one")
    merging = layered.on("lay-one", merges_into="")
    layered.side.hypervisor.define_domain(merging, STAMP)
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING
    power(layered.side, layered.vm, PowerAction.FORCE_OFF)
    layered.merge("lay-one", "")
    layered.side.hypervisor.define_domain(merging, STAMP)
    assert power(layered.side, layered.vm, PowerAction.START).state is DomainState.RUNNING


def test_a_memory_is_saved_and_the_guest_starts_from_it_again(layered: Layered) -> None:
    verbs, vm = layered.side.hypervisor, layered.vm
    layered.make("lay-one")
    assert refusal(lambda: verbs.snapshot_memory(layered.on("lay-one"), STAMP, "snap-one", Control()))[0] is Conflict
    power(layered.side, vm, PowerAction.START)
    for _twice in range(2):
        saved = verbs.snapshot_memory(layered.on("lay-one"), STAMP, "snap-one", Control())
        assert saved.consistency == "memory"
        assert saved.size_bytes > 0
    assert verbs.observe_domain(vm.id).state is DomainState.RUNNING
    power(layered.side, vm, PowerAction.FORCE_OFF)
    layered.make("lay-two")
    layered.switch("lay-two")
    for _twice in range(2):
        verbs.restore_memory(layered.on("lay-two"), Stamp(epoch=1, turn=9), "snap-one", Control())
    seen = verbs.observe_domain(vm.id)
    assert (seen.state, seen.epoch, seen.turn) == (DomainState.RUNNING, 1, 9)
    for _twice in range(2):
        verbs.delete_memory(vm.id, "snap-one", vm.pool)
    power(layered.side, vm, PowerAction.FORCE_OFF)
    gone = refusal(lambda: verbs.restore_memory(layered.on("lay-two"), STAMP, "snap-one", Control()))
    assert gone == (NotFound, "memory-not-found")


def test_a_guest_with_layers_migrates_and_its_layers_merge_where_it_is(hosts: Hosts, layered: Layered) -> None:
    vm, there = layered.vm, hosts.second.hypervisor
    layered.make("lay-one")
    power(hosts.first, vm, PowerAction.START)
    layered.switch("lay-one")
    target = layered.on("lay-one")
    libvirt_uri, migration_uri = there.prepare_migration(target, (), "host-1")
    hosts.first.hypervisor.migrate(
        vm.id,
        target,
        Stamp(epoch=2, turn=6),
        libvirt_uri=libvirt_uri,
        migration_uri=migration_uri,
        copied_volume_ids=(),
        options=MigrationOptions(),
        control=Control(),
    )
    until(lambda: has_left(hosts.first, vm), what="the guest's leaving", deadline_s=hosts.first.patience_s)
    there.settle_migration(vm.id, MigrationSide.KEEP, target, (), Stamp(epoch=2, turn=7))
    hosts.first.hypervisor.settle_migration(vm.id, MigrationSide.REMOVE, target, (), Stamp(epoch=2, turn=7))
    moved = Layered(vm, hosts.second)
    moved.merge("lay-one", "", spec=moved.on("lay-one", merges_into=""))
    assert there.observe_domain(vm.id).state is DomainState.RUNNING


def test_a_linked_clone_keeps_what_it_lies_over_and_a_copy_does_not(hosts: Hosts, layered: Layered, name: str) -> None:
    verbs, vm = hosts.first.hypervisor, layered.vm
    layered.make("lay-one")
    layered.switch("lay-one")
    clone = replace(
        vm_of(hosts.first, f"{name}x", vm.pool).volume,
        base_image_id="",
        base_image_format=None,
        base_volume_id=vm.volume.volume_id,
    )
    assert verbs.ensure_volume(clone, vm.pool).size_bytes == 64 * MIB
    verbs.undefine_domain(vm.id, (), kill_if_running=True, keep_state_files=True)
    assert refusal(lambda: verbs.delete_volume(vm.volume.volume_id, vm.pool)) == (Conflict, "volume-in-use")
    verbs.delete_volume(clone.volume_id, vm.pool)
    copied = replace(clone, base_volume_id="", copy_volume_id=vm.volume.volume_id, copy_layer_id="lay-one")
    for _twice in range(2):
        assert verbs.copy_volume(copied, vm.pool, Control()).size_bytes == 64 * MIB
    verbs.delete_volume(vm.volume.volume_id, vm.pool)
    assert verbs.observe_volume(copied.volume_id, vm.pool).is_present
    verbs.delete_volume(copied.volume_id, vm.pool)


def test_an_image_is_made_of_a_layer(hosts: Hosts, layered: Layered, name: str) -> None:
    verbs, pool = hosts.first.hypervisor, layered.vm.pool
    layered.make("lay-one")
    image = ImageSpec(image_id=f"img-{name}", pool_id=pool.pool_id, format=DiskFormat.QCOW2)
    source = VolumeSource(volume_id=layered.vm.volume.volume_id, layer_id="lay-one")
    made = [verbs.import_image(image, pool, source, Control()) for _twice in range(2)]
    assert made[0] == made[1]
    assert made[0].stored_sha256
    verbs.delete_image(image.image_id, pool)
