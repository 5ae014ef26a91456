"""Steps that several vm sagas share: place, bring images, define, change power, record what was seen, erase.

Params of these sagas have a `vm_id`; results are looked up by the step names used here.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Image
from trimtab_controller.operations import filling
from trimtab_controller.operations.saga import Effect, Json, Step, Transaction, Wait, effect, transaction
from trimtab_controller.store import adoptions, claims, describe, fleet, image_replicas, placements, snapshots, vms, volume_claims
from trimtab_protos.errors import Conflict, Internal, NotFound, Unavailable
from trimtab_protos.messages import (
    DomainObservation,
    DomainSpec,
    DomainState,
    ImageSpec,
    JobState,
    PeerSource,
    PowerAction,
    StateReason,
)

# The leader decides within a second; the row is woken then, so this is only the backstop.
PLACEMENT_POLL_S = 5.0
# A job's end wakes the row through the agent's outbox; again only the backstop.
JOB_POLL_S = 10.0
TICKET_TTL_S = 600


# --- place ---------------------------------------------------------------------------------------------------------------


def place(kind: str) -> Step:
    """Ask the leader for a host and wait for its answer: {host_id, epoch}. NoCapacity carries the reasons."""

    def do(context: Transaction[Any]) -> Json | Wait:
        request = placements.get(context.session, context.operation.id)
        if request is None:
            placements.ask(
                context.session,
                operation_id=context.operation.id,
                vm_id=context.params.vm_id,
                project_id=context.operation.project_id,
                kind=kind,
                to_host_id=getattr(context.params, "to_host_id", ""),
                previous_host_id=vms.get(context.session, context.params.vm_id).host_id,
                now=context.now,
            )
            return Wait(PLACEMENT_POLL_S, "a placement")
        answer = placements.answer(request)
        if answer is None:
            return Wait(PLACEMENT_POLL_S, "a placement")
        # The ticket with which the host may read images from others: journaled, so that every repeat presents the same one.
        return {**answer, "ticket": secrets.token_hex(32)}

    def undo(context: Transaction[Any]) -> None:
        request = placements.get(context.session, context.operation.id)
        placements.withdraw(context.session, context.operation.id)
        _give_back_placement(context, kind)
        if kind == "start" and request is not None and request.state == "placed":
            # Its disks may be there, and whoever looks for its definition looks at home first.
            vms.update(context.session, context.params.vm_id, host_id=request.previous_host_id)

    return transaction("place", do, undo)


def _give_back_placement(context: Transaction[Any], kind: str) -> None:
    """Undo what the leader claimed for this operation, and nothing else."""
    vm_id = context.params.vm_id
    if kind == "migrate":
        row = claims.migration_of(context.session, vm_id)
        if row is None or row.operation_id != context.operation.id:
            return
        volume_claims.give_back_copies(context.session, row)
        claims.give_back(context.session, vm_id, host_id=row.target_host_id)
        claims.end_migration(context.session, vm_id)
        return
    held = claims.of_vm(context.session, vm_id)
    for claim in held:
        if claim.operation_id == context.operation.id:
            claims.give_back(context.session, vm_id, host_id=claim.host_id)


def chosen_host(results: Mapping[str, Json]) -> str:
    return str(results["place"]["host_id"])


# --- images on local pools --------------------------------------------------------------------------------------------------


def note_images(host_of: Any = chosen_host) -> Step:
    """Note where images are about to be copied to, so that no file can ever lie where no row says so: {missing: how many}."""

    def do(context: Transaction[Any]) -> Json:
        host_id = host_of(context.results)
        missing = image_replicas.missing_for_vm(context.session, context.params.vm_id, host_id)
        image_replicas.begin(context.session, missing, host_id, operation_id=context.operation.id, now=context.now)
        return {"missing": len(missing)}

    return transaction("note_images", do, None, because="the row says where a file may be; the next copy or the deletion uses it")


def bring_images(host_of: Any = chosen_host) -> Step:
    """Make the base images of the vm's volumes present where the volumes will be, copying from another host where needed."""

    def known(results: Mapping[str, Json]) -> Json | None:
        return {"host_id": host_of(results)} if _had_all_images(results) else None

    def do(context: Effect[Any]) -> Json | Wait:
        if (nothing_to_do := known(context.results)) is not None:
            return nothing_to_do
        host_id = host_of(context.results)
        missing = context.read(lambda session: image_replicas.missing_for_vm(session, context.params.vm_id, host_id))
        return copy_missing(context, host_id, missing) or {"host_id": host_id}

    because = "a replica is a cache entry; its owner cleans it up when nothing uses it"
    return effect("bring_images", do, None, because=because, known=known)


def _had_all_images(results: Mapping[str, Json]) -> bool:
    """Tell whether every image was there when it was noted; a replica under a live vm's volume does not go away."""
    return bool(results.get("note_images", {}).get("missing", 1) == 0)


def record_images(context: Transaction[Any]) -> None:
    """Record the replicas that `bring_images` proved."""
    if _had_all_images(context.results):
        return
    host_id = chosen_host(context.results)
    missing = image_replicas.missing_for_vm(context.session, context.params.vm_id, host_id)
    image_replicas.record(context.session, missing, host_id, now=context.now)


def copy_missing(
    context: Effect[Any], host_id: str, missing: Sequence[image_replicas.Missing], *, ticket: str = ""
) -> Wait | None:
    """Start or follow the copies of these images to the host, one after the other; None when all are there.

    `ticket`: with which the host may read from others; "" takes that of the placement.
    """
    for one in missing:
        waiting = _copy_replica(context, host_id, one, ticket or str(context.results["place"]["ticket"]))
        if waiting is not None:
            return waiting
    return None


def _copy_replica(context: Effect[Any], host_id: str, missing: image_replicas.Missing, ticket: str) -> Wait | None:
    """Start or follow the copy of one image; None when it is there."""
    image, pool = missing.image, describe.pool_spec(missing.pool)
    if not missing.source_host_id:
        raise Unavailable(
            "image-has-no-source", f"no host that is up has image {image.name}; see `trimtab image get {image.name}`"
        )
    # The source is part of the key: a copy whose source went away is begun anew from another one.
    key = context.key(subject_id=context.operation.subject_id, part=f"{image.id}-{missing.source_host_id}")
    source_pool = describe.pool_spec(missing.source_pool)
    stored = describe.stored_format(image)
    address = context.agents.offer_image(
        missing.source_host_id,
        context.key(subject_id=context.operation.subject_id, part=f"offer-{image.id}"),
        image_id=image.id,
        format=stored,
        pool=source_pool,
        ticket=ticket,
        ttl_s=TICKET_TTL_S,
        peer_host_id=host_id,
    )
    job = context.agents.start_image_import(
        host_id,
        key,
        ImageSpec(image_id=image.id, pool_id=missing.pool.id, format=stored, max_bytes=bound_bytes(image)),
        pool,
        PeerSource(
            host_id=missing.source_host_id,
            address=address,
            pool_id=source_pool.pool_id,
            ticket=ticket,
            stored_sha256=image.stored_sha256,
            file_size_bytes=image.file_size_bytes,
            virtual_size_bytes=image.virtual_size_bytes,
        ),
    )
    match job.state:
        case JobState.SUCCEEDED:
            return None
        case JobState.RUNNING:
            return Wait(JOB_POLL_S, f"copy of image {image.name}", progress=progress_json(job.progress))
        case _:
            raise job.error or Internal("image-copy-failed", f"copy of image {image.name} ended as {job.state.value}")


def bound_bytes(image: Image) -> int:
    """Return what neither the file nor the disk in it may exceed: the disk of a sparse image is many times its file."""
    return max(2 * image.file_size_bytes, image.virtual_size_bytes) + (1 << 20)


def progress_json(progress: Any) -> Json:
    total = progress.total_bytes
    percent = round(100 * progress.done_bytes / total, 1) if total else 0
    return {
        "done_bytes": progress.done_bytes,
        "total_bytes": total,
        "rate_bytes_s": progress.rate_bytes_s,
        "phase": progress.phase,
        "remaining_s": progress.remaining_s,
        "percent": percent,
    }


# --- domain ----------------------------------------------------------------------------------------------------------------


def define(context: Effect[Any]) -> Json:
    """Define the domain on the chosen host under the epoch of the placement."""
    host_id, epoch = chosen_host(context.results), int(context.results["place"]["epoch"])

    def read(session: Any) -> tuple[DomainSpec, bool]:
        parts = describe.read_vm(session, context.params.vm_id)
        return describe.domain_spec(session, parts, host_id), any(volume.fill_backup_id for volume in parts.volumes)

    spec, is_filling = context.read(read)
    if is_filling:
        filling.serve(context, host_id, epoch=epoch)
    context.agents.define_domain(host_id, context.key(subject_id=spec.vm_id, epoch=epoch), spec)
    return {"host_id": host_id}


def undefine_everywhere(context: Effect[Any]) -> None:
    """Kill and undefine the vm's domain on the host that the placement chose; absent is fine."""
    place_result = context.results.get("place")
    if place_result is None:
        return
    remove_domain(context, str(place_result["host_id"]), epoch=int(place_result["epoch"]), keep_state_files=False)


def remove_domain(context: Effect[Any], host_id: str, *, epoch: int, keep_state_files: bool, part: str = "") -> None:
    vm_id = context.params.vm_id
    parts = context.read(lambda session: describe.read_vm(session, vm_id))
    context.agents.undefine_domain(
        host_id,
        context.key(subject_id=vm_id, epoch=epoch, part=part),
        vm_id,
        kill_if_running=True,
        pools=parts.pool_specs(),
        keep_state_files=keep_state_files,
    )


def power_on(context: Effect[Any]) -> Json:
    """Start the domain where it was placed."""
    host_id, epoch = chosen_host(context.results), int(context.results["place"]["epoch"])
    seen = context.agents.change_power(
        host_id, context.key(subject_id=context.params.vm_id, epoch=epoch), context.params.vm_id, PowerAction.START
    )
    if seen.state not in {DomainState.RUNNING, DomainState.PAUSED}:
        raise Conflict("guest-did-not-start", f"the guest is {seen.state.value} right after its start; see its console log")
    return seen_json(host_id, seen)


def power_on_if_asked(context: Effect[Any]) -> Json:
    """As `power_on` where the operation shall start the vm; else only look."""
    if context.params.start:
        return power_on(context)
    host_id = chosen_host(context.results)
    return seen_json(host_id, context.agents.get_domain(host_id, context.params.vm_id))


def seen_json(host_id: str, seen: DomainObservation) -> Json:
    return {"host_id": host_id, "state": seen.state.value, "reason": seen.reason.value, "at_ms": seen.observed_at_ms}


def record_seen(context: Transaction[Any], step: str) -> None:
    """Write what `step` observed onto the vm."""
    if step == "power_on":
        # It was defined before: whatever definition it was adopted with is not in force any more.
        adoptions.end(context.session, context.params.vm_id, now=context.now)
    seen = context.results[step]
    vms.observe(
        context.session,
        context.params.vm_id,
        host_id=str(seen["host_id"]),
        state=ObservedState(seen["state"]),
        reason="" if seen["reason"] == StateReason.NONE.value else str(seen["reason"]),
        at=context.now,
    )


def home_of(context: Effect[Any]) -> tuple[str, int]:
    """Return (host, epoch) of the vm's home. Conflict where it has none."""
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; start it with `trimtab vm start {vm.name}`")
    return vm.host_id, vm.epoch


def holders_of(session: Any, vm_id: str) -> tuple[tuple[str, ...], int]:
    """Return every host that may hold the vm's domain (its home, its claims, both sides of a migration) and the highest epoch given.

    The epoch is for all of them: either side of a migration may have been commanded under the target's already.
    """
    vm = vms.get(session, vm_id)
    held = claims.of_vm(session, vm_id)
    hosts = {claim.host_id for claim in held} | ({vm.host_id} if vm.host_id else set())
    epoch = max([vm.epoch, *(claim.epoch for claim in held)])
    row = claims.migration_of(session, vm_id)
    if row is not None:
        hosts |= {row.source_host_id, row.target_host_id}
        epoch = max(epoch, row.target_epoch)
    return tuple(sorted(hosts & fleet.joined_ids(session))), epoch


def give_back_compute(context: Transaction[Any]) -> None:
    """A vm that does not run keeps its home and its disks' space, and holds no vcpus or memory."""
    claims.give_back(context.session, context.params.vm_id)


# --- ends ------------------------------------------------------------------------------------------------------------------


def erase_vm(context: Transaction[Any]) -> None:
    """Remove all that a vm that never came to be holds in SQL, and leave its row as a tombstone: ids are never reused."""
    session, vm_id = context.session, context.params.vm_id
    try:
        parts = describe.read_vm(session, vm_id)
    except NotFound:
        return
    if parts.vm.deleted_at is not None and parts.vm.purge_after is None:
        return  # erased already
    claims.give_back(session, vm_id)
    own = [volume for volume in parts.volumes if volume.is_deleted_with_vm]
    volume_claims.erase(session, own, now=context.now)
    volume_claims.detach(session, [volume.id for volume in parts.volumes if not volume.is_deleted_with_vm])
    snapshots.forget_all(session, vm_id, now=context.now)
    vms.delete_nics(session, vm_id)
    vms.charge_project(session, parts.vm, disk_bytes=sum(volume.size_bytes for volume in own), sign=-1)
    vms.update(
        session,
        vm_id,
        deleted_at=context.now,
        purge_after=None,
        purged_at=context.now,
        host_id="",
        desired_power=DesiredPower.DELETED.value,
        observed_state=ObservedState.ABSENT.value,
    )
