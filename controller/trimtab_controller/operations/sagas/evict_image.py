"""image.evict: a copy of an image on one host's local pool goes; the image stays elsewhere and is copied again when it is needed.

| step   | do                                                                      | undo                          |
|--------|-------------------------------------------------------------------------|-------------------------------|
| own    | refuse if it is used or the last one, else mark it `deleting` (pivot)    | - from here on only forward   |
| remove | look once more whether anybody uses it, else delete its bytes            | - deleted bytes are gone      |
| finish | forget the replica, or call it ready again                               | - last                        |

Who finds it `deleting` waits. Who found it ready before that has bound its volumes to the place already: the second look sees them.
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, image_replicas
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    image_id: str
    pool_id: str
    host_id: str


def _own(context: Transaction[Params]) -> None:
    params = context.params
    if not image_replicas.begin_eviction(
        context.session,
        image_id=params.image_id,
        pool_id=params.pool_id,
        host_id=params.host_id,
        operation_id=context.operation.id,
    ):
        raise Conflict("replica-in-use", "the replica is used, or the image is nowhere else; it stays")


def _remove(context: Effect[Params]) -> Json:
    params = context.params
    is_used = partial(image_replicas.is_used, image_id=params.image_id, pool_id=params.pool_id, host_id=params.host_id)
    if context.read(is_used):
        return {"is_removed": False}
    image = context.read(partial(describe.get_image, image_id=params.image_id))
    pool = context.read(partial(describe.get_pool, pool_id=params.pool_id))
    key = context.key(subject_id=image.id, part=f"{pool.id}-{params.host_id}")
    context.agents.delete_image(params.host_id, key, image.id, describe.stored_format(image), describe.pool_spec(pool))
    return {"is_removed": True}


def _finish(context: Transaction[Params]) -> None:
    params, removed = context.params, context.results["remove"]
    assert removed is not None
    image_replicas.end_eviction(
        context.session,
        image_id=params.image_id,
        pool_id=params.pool_id,
        host_id=params.host_id,
        is_removed=bool(removed["is_removed"]),
    )


SAGA = Saga(
    name="image.evict",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("remove", _remove, None, because="deleted bytes are gone"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
