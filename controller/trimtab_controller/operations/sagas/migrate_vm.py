"""vm.migrate: move a running guest to another host without stopping it.

| step          | do                                                                  | undo                                             |
|---------------|---------------------------------------------------------------------|--------------------------------------------------|
| place         | the leader picks the target, claims it, records both holders         | give the target back (only once proven empty)     |
| note_images   | note where copies of base images are about to be                    | - says where a file may be                       |
| bring_images  | copy base images to the target's local pool                          | - cache                                           |
| check         | refuse what would fail before anything moves                         | - it only looks                                   |
| prepare       | target: volumes to copy into, seed, networks                         | target: prove empty, remove leftovers             |
| move          | source: start the job and follow it; then observe BOTH hosts (pivot) | cancel the job, wait until the source has the guest |
| switch        | home becomes the target under the next epoch                         | - past the pivot                                  |
| settle        | target: persist the domain with the new epoch; at the same time      | -                                                 |
|               | source: undefine, remove copied originals                            |                                                   |
| finish        | give the source back, forget the migration                           | -                                                 |

From `place` until `finish` (or the end of the undo) both hosts are holders: both claims stay, and a recovery or delete needs
evidence about both. Nothing is concluded from what libvirt returned: `move` ends when one side is observed to run the guest and
the other is observed not to.

A linked clone on its host's own storage is copied whole and lies over nothing from then on (`core.layers.is_flattened`); the rows say so in
the transaction that gives its home to the target.

A post-copy that failed (it is used only where an operator asked for it) leaves memory on either side. The agent lets it go on or begins
its connection anew; once nothing moved for half a minute both sides are killed, seen to be gone, and the guest starts anew on the
target, whose disks are the newer ones.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from trimtab_controller.core import layers, qemu_series
from trimtab_controller.core import migration as core
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.fan_out import ask_both, at_once
from trimtab_controller.operations.layer_refusals import refuse_to_copy
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import claims, describe, events, fleet, hosts, vms, volume_claims
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import (
    CommandKey,
    Direction,
    DomainObservation,
    DomainSpec,
    JobState,
    MigrationOptions,
    MigrationSide,
    PowerAction,
    VolumeSpec,
)

# The job's end wakes the row; progress is shown at this pace.
POLL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    to_host_id: str = ""
    bandwidth_mib_s: int = 0
    auto_converge: bool = False
    allow_postcopy: bool = False
    timeout_s: int = 0


@dataclass(frozen=True, slots=True)
class _Move:
    """Everything the steps need to know, read in one snapshot."""

    source_host_id: str
    target_host_id: str
    source_epoch: int
    target_epoch: int
    parts: describe.VmParts
    target_domain: DomainSpec
    guest_qemu: qemu_series.Series
    """As the source told last: what a guest runs on changes with no upgrade."""
    copied: tuple[VolumeSpec, ...]
    # Each copy is whole and lies over nothing: a linked clone becomes independent.
    is_flattened: bool


def _read(session: Any, vm_id: str) -> _Move:
    row = claims.migration_of(session, vm_id)
    if row is None:
        raise Conflict("migration-gone", "the migration's record is gone: it was superseded")
    parts = describe.read_vm(session, vm_id)
    is_flattened = layers.is_flattened(parts.local_volumes)
    copied = tuple(describe.volume_spec(volume, parts.images) for volume in parts.local_volumes)
    return _Move(
        source_host_id=row.source_host_id,
        target_host_id=row.target_host_id,
        source_epoch=row.source_epoch,
        target_epoch=row.target_epoch,
        parts=parts,
        target_domain=describe.domain_spec(session, parts, row.target_host_id),
        guest_qemu=qemu_series.running(hosts.get(session, row.source_host_id).inventory, vm_id),
        copied=tuple(map(describe.alone, copied)) if is_flattened else copied,
        is_flattened=is_flattened,
    )


def _move_of(context: Effect[Params]) -> _Move:
    move: _Move = context.read(lambda session: _read(session, context.params.vm_id))
    return move


# --- before anything moves ---------------------------------------------------------------------------------------------------


def _check(context: Effect[Params]) -> Json:
    """Ask both hosts, fresh, for what would make libvirt refuse or the guest break, and name every reason at once."""
    move = _move_of(context)
    agents, vm_id = context.agents, context.params.vm_id
    context.read(lambda session: refuse_to_copy(session, move.parts.local_volumes, vm_name=move.parts.vm.name))
    (source, source_seen), (target, target_seen) = ask_both(
        lambda host_id: at_once(lambda: agents.get_fitness(host_id), lambda: agents.get_domain(host_id, vm_id)),
        move.source_host_id,
        move.target_host_id,
    )
    problems = core.refusals(
        move.target_domain,
        source=source,
        target=target,
        source_seen=source_seen,
        target_seen=target_seen,
        guest_qemu=move.guest_qemu,
        is_flattened=move.is_flattened,
    )
    if problems:
        raise Conflict("migration-refused", "; ".join(problems), host_id=move.target_host_id)
    return {"source_host_id": move.source_host_id, "target_host_id": move.target_host_id}


def _prepare(context: Effect[Params]) -> Json:
    move = _move_of(context)
    key = context.key(subject_id=context.params.vm_id, epoch=move.target_epoch)
    libvirt_uri, migration_uri = context.agents.prepare_migration(
        move.target_host_id, key, move.target_domain, move.copied, move.source_host_id
    )
    return {"libvirt_uri": libvirt_uri, "migration_uri": migration_uri}


def _unprepare(context: Effect[Params]) -> None:
    """The guest was proven to be on the source by the undo of `move`: clean the target."""
    try:
        move = _move_of(context)
    except Conflict:
        return  # never placed
    key = context.key(subject_id=context.params.vm_id, epoch=move.target_epoch)
    try:
        context.agents.settle_migration(
            move.target_host_id, key, context.params.vm_id, MigrationSide.REMOVE, move.target_domain, move.copied
        )
    except NotFound:
        return


# --- the move ----------------------------------------------------------------------------------------------------------------


def _move(context: Effect[Params]) -> Json | Wait:
    move = _move_of(context)
    prepared, params = context.results["prepare"], context.params
    job = context.agents.start_migration(
        move.source_host_id,
        _job_key(context, move),
        params.vm_id,
        libvirt_uri=str(prepared["libvirt_uri"]),
        migration_uri=str(prepared["migration_uri"]),
        copied_volume_ids=tuple(volume.volume_id for volume in move.copied),
        options=MigrationOptions(
            bandwidth_mib_s=params.bandwidth_mib_s,
            has_auto_converge=params.auto_converge,
            allow_postcopy=params.allow_postcopy,
            timeout_s=params.timeout_s,
            is_flattened=move.is_flattened,
        ),
        next_epoch=move.target_epoch,
        target_domain=move.target_domain,
    )
    if job.state is JobState.RUNNING:
        return Wait(POLL_S, "the migration", progress=vm_steps.progress_json(job.progress))
    return _settle_outcome(context, move, job)


def _settle_outcome(context: Effect[Params], move: _Move, job: Any) -> Json | Wait:
    """The job ended, whatever it says: look at both hosts and believe only them."""
    verdict = _observe_both(context, move)
    match verdict:
        case core.Outcome.ON_TARGET:
            result = job.migration if job is not None else None
            figures = {} if result is None else {"total_ms": result.total_ms, "downtime_ms": result.downtime_ms}
            return {"target_host_id": move.target_host_id, **figures}
        case core.Outcome.ON_SOURCE:
            raise _why_not_moved(job)
        case core.Outcome.NOWHERE:
            raise Conflict("guest-ended-during-migration", "the guest ended while it was moved; it is on neither host")
        case core.Outcome.TORN:
            return _end_torn(context, move)
        case _:
            return Wait(POLL_S, "both hosts to tell where the guest is")


def _observe_both(context: Effect[Params], move: _Move) -> core.Outcome:
    """Return where the guest is; an unreachable host raises Unavailable and the row waits: unknown stays unknown."""
    agents, vm_id = context.agents, context.params.vm_id
    source, target = ask_both(lambda host_id: agents.get_domain(host_id, vm_id), move.source_host_id, move.target_host_id)
    return core.outcome(source=source, target=target)


def _end_torn(context: Effect[Params], move: _Move) -> Json | Wait:
    """Kill what is left of the guest on both sides; once it is seen on neither, it has moved and lost its memory."""
    for host_id in (move.target_host_id, move.source_host_id):
        key = context.key(subject_id=context.params.vm_id, epoch=move.target_epoch, part=f"torn-{host_id}")
        with contextlib.suppress(NotFound):
            context.agents.change_power(host_id, key, context.params.vm_id, PowerAction.FORCE_OFF)
    if _observe_both(context, move) is not core.Outcome.NOWHERE:
        return Wait(POLL_S, "both halves of the guest to be gone")
    return {"target_host_id": move.target_host_id, "memory": "lost"}


def _why_not_moved(job: Any) -> Exception:
    if job is not None and job.error is not None:
        error: Exception = job.error
        return error if not getattr(error, "retryable", False) else Conflict("migration-failed", str(job.error.message))
    return Conflict("migration-failed", "the guest stayed on its source; see the agent's log there")


def _cancel_move(context: Effect[Params]) -> Json | Wait | Stopped:
    """Ask libvirt to stop, then look: a guest that is on the target already has moved, and the cancel came too late."""
    move = _move_of(context)
    job = _cancel_job(context, move)
    if job is not None and job.state is JobState.RUNNING:
        return Wait(POLL_S, "the migration to be cancelled")
    match _observe_both(context, move):
        case core.Outcome.ON_SOURCE:
            return Stopped()
        case core.Outcome.ON_TARGET:
            return {"target_host_id": move.target_host_id, "cancel": "too late"}
        case core.Outcome.NOWHERE:
            return Stopped()
        case core.Outcome.TORN:
            return _end_torn(context, move)
        case _:
            return Wait(POLL_S, "both hosts to tell where the guest is")


def _unmove(context: Effect[Params]) -> Json | Wait | TookPlace:
    """Before the target may be cleaned, the guest must be proven to be on its source (or nowhere) and nothing in flight."""
    try:
        move = _move_of(context)
    except Conflict:
        return {}
    job = _cancel_job(context, move)
    if job is not None and job.state is JobState.RUNNING:
        return Wait(POLL_S, "the migration to be cancelled")
    match _observe_both(context, move):
        case core.Outcome.ON_SOURCE | core.Outcome.NOWHERE:
            return {}
        case core.Outcome.ON_TARGET:
            return TookPlace({"target_host_id": move.target_host_id, "cancel": "too late"})
        case core.Outcome.TORN:
            ended = _end_torn(context, move)
            return ended if isinstance(ended, Wait) else TookPlace(ended)
        case _:
            return Wait(POLL_S, "both hosts to tell where the guest is")


def _job_key(context: Effect[Params], move: _Move) -> CommandKey:
    """The job's key is that of `do`, also when the undo asks about it; its step name is `move` in both."""
    return context.key(subject_id=context.params.vm_id, epoch=move.source_epoch, direction=Direction.DO)


def _cancel_job(context: Effect[Params], move: _Move) -> Any:
    """Return the job after asking it to end; None where the agent never began it."""
    try:
        return context.agents.cancel_job(move.source_host_id, _job_key(context, move))
    except NotFound:
        return None


# --- after the pivot -----------------------------------------------------------------------------------------------------------


def _switch(context: Transaction[Params]) -> None:
    """From here on the target is home: commands under the source's epoch are too old everywhere."""
    session, vm_id = context.session, context.params.vm_id
    row = claims.migration_of(session, vm_id)
    if row is None:
        raise Conflict("migration-gone", "the migration's record is gone")
    vms.update(session, vm_id, host_id=row.target_host_id, epoch=row.target_epoch)
    state = ObservedState.STOPPED if _is_memory_lost(context.results) else ObservedState.RUNNING
    vms.observe(session, vm_id, host_id=row.target_host_id, state=state, reason="", at=context.now)


def _is_memory_lost(results: Any) -> bool:
    return bool(results["move"].get("memory") == "lost")


def _start_anew(context: Effect[Params], move: _Move) -> None:
    """Start the guest on the target from its disks, under the target's epoch: what it had in memory is gone."""
    host_id, vm_id = move.target_host_id, context.params.vm_id
    defining = context.key(subject_id=vm_id, epoch=move.target_epoch, part="define")
    context.agents.define_domain(host_id, defining, move.target_domain)
    starting = context.key(subject_id=vm_id, epoch=move.target_epoch, part="start")
    context.agents.change_power(host_id, starting, vm_id, PowerAction.START)


def _settle(context: Effect[Params]) -> Json:
    """Tell both hosts at once what they hold now: the guest runs on the target, kept or not, and on the source nothing is needed any
    more. Only a guest that lost its memory is started first."""
    move = _move_of(context)
    if _is_memory_lost(context.results):
        _start_anew(context, move)
    seen, _ = at_once(lambda: _keep_target(context, move), lambda: _leave_source(context, move))
    return vm_steps.seen_json(move.target_host_id, seen)


def _keep_target(context: Effect[Params], move: _Move) -> DomainObservation:
    key = context.key(subject_id=context.params.vm_id, epoch=move.target_epoch, part="keep")
    return context.agents.settle_migration(
        move.target_host_id, key, context.params.vm_id, MigrationSide.KEEP, move.target_domain, ()
    )


def _leave_source(context: Effect[Params], move: _Move) -> DomainObservation:
    key = context.key(subject_id=context.params.vm_id, epoch=move.target_epoch, part="leave")
    return context.agents.settle_migration(
        move.source_host_id, key, context.params.vm_id, MigrationSide.REMOVE, move.target_domain, move.copied
    )


def _finish(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    row = claims.migration_of(session, vm_id)
    if row is None:
        return
    vm_steps.record_images(context)
    volume_claims.move_home(session, row)
    claims.promote_target(session, vm_id)
    claims.end_migration(session, vm_id)
    vm_steps.record_seen(context, "settle")
    vm, is_lost = vms.get(session, vm_id), _is_memory_lost(context.results)
    events.append(
        session,
        kind="vm.memory_lost" if is_lost else "vm.migrated",
        project_id=vm.project_id,
        subject_id=vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} moved to {fleet.name_of(session, row.target_host_id)}"
        + ("; its memory was lost with a post-copy that failed, and it was started anew" if is_lost else ""),
        context={"source_host_id": row.source_host_id, "target_host_id": row.target_host_id},
        now=context.now,
    )


def _result(results: Any) -> Json:
    return {**results["check"], **results["move"], "decision_id": results["place"]["decision_id"]}


SAGA = Saga(
    name="vm.migrate",
    version=2,
    params=Params,
    result=_result,
    retired=frozenset({"keep_target", "leave_source"}),
    steps=(
        vm_steps.place("migrate"),
        vm_steps.note_images(),
        vm_steps.bring_images(),
        effect("check", _check, None, because="it only looks"),
        effect("prepare", _prepare, _unprepare),
        effect("move", _move, _unmove, pivot=True, cancel=_cancel_move),
        transaction("switch", _switch, None, because="past the pivot"),
        effect("settle", _settle, None, because="past the pivot"),
        transaction("finish", _finish, None, because="past the pivot"),
    ),
)
