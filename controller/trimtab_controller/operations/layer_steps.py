"""Steps that the sagas of snapshots share: make layers, work through what nothing needs any more, record it.

The order that survives any crash: a new layer's file is made first, empty, over the layer that the guest writes to; only then SQL says
that the vm is on it, and only then a running guest is switched. Between these the guest may be on either: an empty layer reads as the
one below, so that a guest that is started anew from what SQL says finds its disk as it left it.
A merge goes the other way round: SQL says into what before it begins, and the agent removes the upper file when it is done
(`kvm/layer_files.py`).
An image of a Ceph pool has no file for a layer: it keeps itself by a snapshot of Ceph's at the instant of the switch (`kvm/rbd_layers.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab_controller.agents.client import Job
from trimtab_controller.core import layers as core
from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Transaction, Wait
from trimtab_controller.store import describe, fleet, snapshots
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Internal, Unavailable
from trimtab_protos.messages import CommandKey, DomainSpec, JobState, LayerMerge, LayerRef, PoolKind, PoolSpec

# A job's end wakes the row through the agent's outbox; this is the backstop, and the pace of progress.
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """The vm with the host that works on its layers: its home, else whichever reaches them."""

    parts: describe.VmParts
    host_id: str
    epoch: int
    # None: it has no home, and no domain anywhere.
    domain: DomainSpec | None

    def volume(self, volume_id: str) -> Volume:
        return next(volume for volume in self.parts.volumes if volume.id == volume_id)

    def pool(self, volume: Volume) -> PoolSpec:
        return describe.pool_spec(self.parts.pools[volume.pool_id])

    @property
    def state_pool(self) -> PoolSpec:
        """The pool of the vm's other files."""
        home = describe.state_volume(self.parts.volumes)
        assert home is not None, "a vm without disks has no snapshots"
        return self.pool(home)


def place_of(context: Effect[Any]) -> Place:
    """Return where the vm's layers are worked on. Unavailable where no host that is up reaches them."""
    place: Place = context.read(lambda session: _read_place(session, context.params.vm_id))
    if not place.host_id:
        raise Unavailable("volume-unreachable", f"no host that is up reaches the disks of vm {place.parts.vm.name}")
    return place


def _read_place(session: Session, vm_id: str) -> Place:
    parts = describe.read_vm(session, vm_id)
    vm = parts.vm
    if vm.host_id:
        return Place(parts, vm.host_id, vm.epoch, describe.domain_spec(session, parts, vm.host_id))
    first = parts.volumes[0]
    pool: Pool = parts.pools[first.pool_id]
    return Place(parts, fleet.host_for_volume(session, pool, first), 0, None)


# --- making ------------------------------------------------------------------------------------------------------------------


def make_layers(context: Effect[Any], over: Mapping[str, str]) -> Json:
    """Make an empty layer of each volume; `over`: volume id → the layer below. Which ones is in the params' `layers`."""
    place = place_of(context)
    for volume_id, layer_id in sorted(context.params.layers.items()):
        volume = place.volume(volume_id)
        if is_image(place, volume):
            continue
        key = context.key(subject_id=context.params.vm_id, epoch=place.epoch, part=layer_id)
        spec = describe.layer_spec(volume, layer_id, over=over[volume_id])
        context.agents.ensure_volume(place.host_id, key, spec, place.pool(volume))
    return {"host_id": place.host_id}


def is_image(place: Place, volume: Volume) -> bool:
    """Tell whether the volume is an image of a Ceph pool: its layers are the image's own, and made when it is switched to them."""
    return place.parts.pools[volume.pool_id].kind is PoolKind.RBD


def lay_images(context: Effect[Any], over: Mapping[str, str], *, goes_back: bool = False) -> Wait | None:
    """Have those of the volumes that are images of Ceph's be on their new layers: for a vm without a domain, or to go back."""
    place = place_of(context)
    for volume_id, layer_id in sorted(context.params.layers.items()):
        volume = place.volume(volume_id)
        if not is_image(place, volume):
            continue
        spec = describe.layer_spec(volume, layer_id, over=over[volume_id])
        if goes_back:
            spec = replace(spec, copy_volume_id=volume_id, copy_layer_id=over[volume_id])
        key = job_key(context, place, f"lay-{layer_id}")
        job = context.agents.start_volume_copy(place.host_id, key, spec, place.pool(volume))
        if (waiting := follow(job, "an image to be on another layer")) is not None:
            return waiting
    return None


def unmake_layers(context: Effect[Any]) -> None:
    place = place_of(context)
    for volume_id, layer_id in sorted(context.params.layers.items()):
        volume = place.volume(volume_id)
        key = context.key(subject_id=context.params.vm_id, epoch=place.epoch, part=layer_id)
        context.agents.delete_layer(place.host_id, key, volume_id, layer_id, place.pool(volume))


# --- giving up what nothing needs ----------------------------------------------------------------------------------------------


def plan(context: Transaction[Any], *, without: str = "") -> list[Json]:
    """Return what is to be done with the vm's layers, in order, and say in SQL which of them are about to be merged."""
    works: list[Json] = []
    for volume_id, tree in sorted(snapshots.trees(context.session, context.params.vm_id, without=without).items()):
        for work in core.tidy(tree)[0]:
            works.append({"volume_id": volume_id, "top": work.top, "base": work.base, "children": list(work.children)})
            if work.base is not None and work.top == tree.active:
                snapshots.set_active(context.session, volume_id, work.top, merges_into=work.base)
    return works


def do_works(context: Effect[Any], works: Sequence[Json]) -> Wait | None:
    """Do, one after the other, what `plan` said; None when all is done."""
    if not works:
        return None
    place = place_of(context)
    for work in works:
        waiting = _do(context, place, work)
        if waiting is not None:
            return waiting
    return None


def _do(context: Effect[Any], place: Place, work: Json) -> Wait | None:
    volume = place.volume(str(work["volume_id"]))
    if work["base"] is None:
        key = context.key(subject_id=context.params.vm_id, epoch=place.epoch, part=f"delete-{work['top']}")
        context.agents.delete_layer(place.host_id, key, volume.id, str(work["top"]), place.pool(volume))
        return None
    children = [(volume.id, str(child)) for child in work["children"]]
    return follow(merge(context, place, volume, str(work["top"]), str(work["base"]), children), "a merge of layers")


def merge(
    context: Effect[Any], place: Place, volume: Volume, top: str, base: str, children: Sequence[tuple[str, str]] = ()
) -> Job:
    """Begin or find the merge of one layer into another."""
    vm = place.parts.vm
    asked = LayerMerge(
        volume_id=volume.id,
        pool_id=volume.pool_id,
        top_layer_id=top,
        base_layer_id=base,
        children=tuple(LayerRef(volume_id=one, layer_id=layer) for one, layer in children),
        vm_id=vm.id if place.domain is not None else "",
        keeps_running=vm.desired_power is DesiredPower.RUNNING,
    )
    key = context.key(subject_id=vm.id, epoch=place.epoch, part=f"merge-{top}")
    return context.agents.start_merge(place.host_id, key, asked, place.pool(volume), place.domain)


def follow(job: Job, what: str) -> Wait | None:
    """Return a Wait while the job runs, None when it is done; raise why it failed."""
    match job.state:
        case JobState.RUNNING:
            return Wait(POLL_S, what, progress=vm_steps.progress_json(job.progress))
        case JobState.SUCCEEDED:
            return None
        case _:
            raise job.error or Internal("layer-job-failed", f"{what} ended as {job.state.value}")


def record_works(context: Transaction[Any], works: Sequence[Json]) -> None:
    for work in works:
        done = core.Work(top=work["top"], base=work["base"], children=tuple(work["children"]))
        snapshots.record(context.session, context.params.vm_id, str(work["volume_id"]), done)


def job_key(context: Effect[Any], place: Place, part: str = "") -> CommandKey:
    return context.key(subject_id=context.params.vm_id, epoch=place.epoch, part=part)
