"""volume.move: a volume goes to another pool, under the running guest that has it.

| step   | do                                                                          | undo                                      |
|--------|-----------------------------------------------------------------------------|-------------------------------------------|
| own    | (the new place was claimed and noted at acceptance)                          | give the new place back                   |
| copy   | follow the job; under a guest the former file is gone when it ends (pivot)    | end it, look: moved already, it has moved |
| record | the volume is at its new place, by itself                                    | - from here on only forward               |
| leave  | define the domain so, remove what is left at the former place                | - deleted bytes are gone                  |
| finish | give the former place back, tell                                             | - last                                    |

The subject is the vm that has the volume, so that nothing else is done with it meanwhile; a volume apart is its own subject. A linked
clone becomes independent: what it lay over stays where it is. Superseded by a forced stop, a deletion or a recovery, the row goes on
to name both places, whoever starts the vm finds the side that is whole, and `volume.settle_move` cleans up.
"""

from dataclasses import dataclass

from trimtab_controller.operations import layer_steps, move_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, events, volume_moves
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import Direction, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    # The vm that has it; '' for none.
    vm_id: str = ""
    bandwidth_mib_s: int = 0


def _own(_context: Transaction[Params]) -> None:
    """The new place was taken when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    volume_moves.give_up(context.session, context.params.volume_id)


def _copy(context: Effect[Params]) -> Json | Wait:
    place = move_steps.place_of(context)
    key = context.key(subject_id=context.operation.subject_id, epoch=place.epoch)
    move = place.as_asked(bandwidth_mib_s=context.params.bandwidth_mib_s)
    job = context.agents.start_volume_move(place.host_id, key, move, place.domain)
    waiting = layer_steps.follow(job, f"volume {place.volume.name} to be copied")
    return waiting or {"host_id": place.host_id, "paused_ms": job.layers.paused_ms if job.layers is not None else 0}


def _uncopy(context: Effect[Params]) -> Json | Wait | TookPlace:
    place = move_steps.place_of(context)
    key = context.key(subject_id=context.operation.subject_id, epoch=place.epoch, direction=Direction.DO)
    try:
        job = context.agents.cancel_job(place.host_id, key)
    except NotFound:
        job = None
    if job is not None and job.state is JobState.RUNNING:
        return Wait(layer_steps.POLL_S, "the copy to be ended")
    # A copy that is whole is as good as moved, and the wish to end it came too late.
    is_whole = job is not None and job.state is JobState.SUCCEEDED
    if is_whole or move_steps.settle(context, place, is_recorded=False):
        return TookPlace({"host_id": place.host_id, "paused_ms": 0})
    return {}


def _record(context: Transaction[Params]) -> None:
    volume_moves.record(context.session, context.params.volume_id)


def _leave(context: Effect[Params]) -> Json:
    place = move_steps.place_of(context)
    move_steps.settle(context, place, is_recorded=True)
    return {"from": place.other.name, "to": place.own.name}


def _finish(context: Transaction[Params]) -> None:
    volume_moves.finish(context.session, context.params.volume_id)
    volume, left = describe.get_volume(context.session, context.params.volume_id), context.results["leave"]
    events.append(
        context.session,
        kind="volume.moved",
        project_id=volume.project_id,
        subject_id=volume.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"volume {volume.name} moved from pool {left['from']} to pool {left['to']}",
        now=context.now,
    )


SAGA = Saga(
    name="volume.move",
    version=1,
    params=Params,
    result=lambda results: {"paused_ms": results["copy"]["paused_ms"]},
    steps=(
        transaction("own", _own, _disown),
        effect("copy", _copy, _uncopy, pivot=True),
        transaction("record", _record, None, because="from here on only forward"),
        effect("leave", _leave, None, because="deleted bytes are gone"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
