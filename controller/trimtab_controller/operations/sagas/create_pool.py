"""pool.create: a folder becomes a pool on every host that can use it; a shared one takes volumes once hosts have read a marker.

| step   | do                                                              | undo                              |
|--------|-----------------------------------------------------------------|-----------------------------------|
| own    | map it to every host (the row was inserted at acceptance)        | unmap it where it went, free its name and path |
| ensure | on every host that is up; refused where none can use it          | forget it there                   |
| prove  | shared: one host writes a marker, all others that have it read   | - it only looks                   |
| finish | record each host's finding; proven where all of them agree       | - last                            |

Hosts that do not answer while it is undone forget it when they are back (host.prepare).
A shared pool on which hosts disagree is made, with the reason at each host that sees another storage, and takes no volumes.
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, reach
from trimtab_controller.store.reach import READY, UpHost


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    pool_id: str


def _own(context: Transaction[Params]) -> None:
    reach.map_pool(context.session, context.params.pool_id)


def _disown(context: Transaction[Params]) -> None:
    left = reach_steps.untold(context, context.undone.get("ensure", {}))
    reach.unmap_pool(context.session, context.params.pool_id, left=left)
    reach.hide_pool(context.session, context.params.pool_id, now=context.now)


def _ensure(context: Effect[Params]) -> Json:
    pool = context.read(partial(describe.get_pool, pool_id=context.params.pool_id))
    hosts = context.read(reach.up_hosts)
    found = reach_steps.ensure_pool(context, pool, hosts, subject_id=pool.id)
    reach_steps.refuse_if_none("pool", pool.name, found, hosts)
    return {"found": found, "names": {host.id: host.name for host in hosts}}


def _forget(context: Effect[Params]) -> Json:
    pool_id = context.params.pool_id
    return reach_steps.remove_everywhere(
        context, lambda host: context.agents.remove_pool(host.id, context.key(subject_id=pool_id), pool_id)
    )


def _prove(context: Effect[Params]) -> Json:
    pool = context.read(partial(describe.get_pool, pool_id=context.params.pool_id))
    ensured = context.results["ensure"]
    ready = [UpHost(one, ensured["names"][one]) for one, said in sorted(ensured["found"].items()) if said["state"] == READY]
    if not pool.is_shared or not ready:
        return {"unshared": {}}
    return {"unshared": dict(reach_steps.prove_shared(context, pool, ready[0], ready[1:]))}


def _finish(context: Transaction[Params]) -> None:
    found, unshared = context.results["ensure"]["found"], context.results["prove"]["unshared"]
    ready = reach_steps.record_pool(context, context.params.pool_id, found, unshared)
    if ready and not unshared and describe.get_pool(context.session, context.params.pool_id).is_shared:
        reach.prove_sharing(context.session, context.params.pool_id, now=context.now)


SAGA = Saga(
    name="pool.create",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("ensure", _ensure, _forget),
        effect("prove", _prove, None, because="it only looks"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
