"""volume.settle_move: what a move that was superseded has left is looked at, recorded and cleaned up.

| step   | do                                                                | undo                     |
|--------|-------------------------------------------------------------------|--------------------------|
| look   | end what is under way, see on which side the volume is             | - ended is ended         |
| record | it is at its new place, or stays where it was                      | - it says what was seen  |
| leave  | moved: remove what is left at the former place                     | - deleted bytes are gone |
| finish | give the other place back                                          | - last                   |
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.operations import move_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, volume_moves


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    vm_id: str = ""


def _look(context: Effect[Params]) -> Json:
    volume = context.read(partial(describe.get_volume, volume_id=context.params.volume_id))
    if volume.move_state != volume_moves.GOING:
        return {"is_moved": True}
    return {"is_moved": move_steps.settle(context, move_steps.place_of(context), is_recorded=False)}


def _record(context: Transaction[Params]) -> None:
    if context.results["look"]["is_moved"]:
        volume_moves.record(context.session, context.params.volume_id)
    else:
        volume_moves.give_up(context.session, context.params.volume_id)


def _leave(context: Effect[Params]) -> Json:
    volume = context.read(partial(describe.get_volume, volume_id=context.params.volume_id))
    if volume.move_state == volume_moves.LEFT:
        move_steps.settle(context, move_steps.place_of(context), is_recorded=True)
    return {}


def _finish(context: Transaction[Params]) -> None:
    volume_moves.finish(context.session, context.params.volume_id)


SAGA = Saga(
    name="volume.settle_move",
    version=1,
    params=Params,
    is_forward_only=lambda _params: True,
    result=lambda results: dict(results["look"]),
    steps=(
        effect("look", _look, None, because="ended is ended", pivot=True),
        transaction("record", _record, None, because="it says what was seen"),
        effect("leave", _leave, None, because="deleted bytes are gone"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
