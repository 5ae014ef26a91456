"""pool.create: a folder becomes a pool on every host that can use it; a shared one once hosts have read each other's marker.

| step   | do                                                        | undo                    |
|--------|-----------------------------------------------------------|-------------------------|
| own    | (the row was inserted at acceptance)                       | erase it, free the name |
| ensure | on every host that is up                                   | forget it there         |
| prove  | shared: one host writes a marker, all others read it       | - it only looks         |
| finish | record each host's finding; Conflict where none can use it | - last                  |
"""

from dataclasses import dataclass

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, reach, schema
from trimtab_controller.store.reach import UpHost


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    pool_id: str


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    reach.forget_mappings(context.session, schema.pool_host, pool_id=context.params.pool_id)
    reach.forget_mappings(context.session, schema.pool_space, pool_id=context.params.pool_id)
    reach.erase(context.session, schema.pool, context.params.pool_id, now=context.now)


def _ensure(context: Effect[Params]) -> Json:
    pool = context.read(lambda session: describe.get_pool(session, context.params.pool_id))
    hosts = context.read(reach.up_hosts)
    found = reach_steps.ensure_pool(context, pool, hosts)
    names = {host.id: host.name for host in hosts}
    reach_steps.refuse_if_none("pool", pool.name, {one: found[one].get("problem", "") for one in found}, names)
    return {"found": found, "names": names}


def _forget(context: Effect[Params]) -> None:
    for host in context.read(reach.up_hosts):
        key = context.key(subject_id=context.operation.subject_id, part=host.id)
        context.agents.remove_pool(host.id, key, context.params.pool_id)


def _prove(context: Effect[Params]) -> Json:
    pool = context.read(lambda session: describe.get_pool(session, context.params.pool_id))
    ensured = context.results["ensure"]
    usable = [UpHost(one, ensured["names"][one]) for one, outcome in ensured["found"].items() if "observation" in outcome]
    unshared = reach_steps.prove_shared(context, pool, usable) if pool.is_shared else {}
    reach_steps.refuse_if_none("pool", pool.name, {host.id: unshared.get(host.id, "") for host in usable}, ensured["names"])
    return {"unshared": unshared}


def _finish(context: Transaction[Params]) -> None:
    found, unshared = context.results["ensure"]["found"], context.results["prove"]["unshared"]
    ready = reach_steps.record_pool(context, context.params.pool_id, found, unshared)
    if ready:
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
