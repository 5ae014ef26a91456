"""pool.delete: an empty pool is forgotten everywhere; its folder stays.

| step   | do                                                               | undo                            |
|--------|------------------------------------------------------------------|---------------------------------|
| own    | refuse if something lies in it, else hide it (pivot)              | - from here on only forward     |
| clear  | delete copies of images that are elsewhere too                    | - they were cache entries       |
| forget | on every host that is up                                          | -                               |
| finish | unmap it, but on hosts that were not told: host.prepare            | - last                          |
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, image_replicas, pools, reach
from trimtab_protos.errors import Conflict, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    pool_id: str


def _own(context: Transaction[Params]) -> None:
    """Hidden in the transaction that looked, so that nothing new is put into it from now on."""
    contents = pools.dependants(context.session, context.params.pool_id)
    if contents:
        raise Conflict("pool-not-empty", f"the pool still has {pools.tell(contents)}")
    reach.hide_pool(context.session, context.params.pool_id, now=context.now)


def _clear(context: Effect[Params]) -> Json:
    pool = context.read(partial(describe.get_pool, pool_id=context.params.pool_id))
    reaching = [host.id for host in context.read(partial(reach.ready_hosts, pool_id=pool.id))]
    cleared, left = [], []
    for replica in context.read(partial(image_replicas.in_pool, pool_id=pool.id)):
        host_id = replica.host_id or next(iter(reaching), "")
        if host_id not in reaching:
            left.append(replica.image_id)  # on a host that is down: its folder stays as it is
            continue
        image = context.read(partial(describe.get_image, image_id=replica.image_id))
        key = context.key(subject_id=pool.id, part=f"{image.id}-{replica.host_id}")
        try:
            context.agents.delete_image(host_id, key, image.id, describe.stored_format(image), describe.pool_spec(pool))
        except Unavailable:
            if context.operation.attempts < reach_steps.PATIENCE:
                raise
            left.append(image.id)
        else:
            cleared.append(image.id)
    return {"cleared": cleared, "left": left}


def _forget(context: Effect[Params]) -> Json:
    pool_id = context.params.pool_id
    return reach_steps.remove_everywhere(
        context, lambda host: context.agents.remove_pool(host.id, context.key(subject_id=pool_id), pool_id)
    )


def _finish(context: Transaction[Params]) -> None:
    image_replicas.remove_from_pool(context.session, context.params.pool_id)
    reach.unmap_pool(context.session, context.params.pool_id, left=reach_steps.untold(context, context.results["forget"]))


SAGA = Saga(
    name="pool.delete",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("clear", _clear, None, because="they were cache entries"),
        effect("forget", _forget, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
