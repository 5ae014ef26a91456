"""host.prepare: the pools and networks that nobody has looked at on one host are made usable there; deleted ones go.

| step   | do                                                                          | undo                      |
|--------|-----------------------------------------------------------------------------|---------------------------|
| forget | what was deleted while the host did not answer                               | - it is deleted           |
| ensure | each unknown pool (a shared one held against a host that has it) and network | - usable may stay usable  |
| finish | record the findings                                                          | - last                    |

What is deleted goes first: it may lie where something new is to be. Runs beside other operations on the host, so its commands go under
a subject of their own: turns of the two do not meet.
"""

from dataclasses import dataclass
from functools import partial

import structlog

from trimtab_controller.core.model import Pool
from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, fleet, reach
from trimtab_controller.store.reach import READY, UpHost
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    host_id: str


def _subject(context: Effect[Params]) -> str:
    return f"prepare-{context.params.host_id}"


def _ensure(context: Effect[Params]) -> Json:
    host_id = context.params.host_id
    host = UpHost(host_id, context.read(partial(fleet.name_of, host_id=host_id)))
    pools = {}
    for pool_id in context.read(partial(reach.unknown_pools, host_id=host_id)):
        pools[pool_id] = _ensure_pool(context, context.read(partial(describe.get_pool, pool_id=pool_id)), host)
    networks = {}
    for network_id in context.read(partial(reach.unknown_networks, host_id=host_id)):
        network = context.read(partial(describe.get_network, network_id=network_id))
        networks[network_id] = reach_steps.ensure_network(context, network, [host], subject_id=_subject(context))
    return {"pools": pools, "networks": networks}


def _forget(context: Effect[Params]) -> Json:
    host_id, agents = context.params.host_id, context.agents
    forgotten: dict[str, list[str]] = {"pools": [], "networks": []}
    for kind, listed, remove in (
        ("pools", reach.deleted_pools, agents.remove_pool),
        ("networks", reach.deleted_networks, agents.remove_network),
    ):
        for each in context.read(partial(listed, host_id=host_id)):
            try:
                remove(host_id, context.key(subject_id=_subject(context), part=each), each)
            except TrimtabError as error:
                if error.retryable:
                    raise
                log.warning("what was deleted stays on a host", host_id=host_id, kind=kind, id=each, error=error.message)
            forgotten[kind].append(each)
    return forgotten


def _ensure_pool(context: Effect[Params], pool: Pool, host: UpHost) -> Json:
    found = reach_steps.ensure_pool(context, pool, [host], subject_id=_subject(context))
    if not pool.is_shared or found[host.id]["state"] != READY:
        return {"found": found, "unshared": {}}
    others = [one for one in context.read(partial(reach.ready_hosts, pool_id=pool.id)) if one.id != host.id]
    if pool.sharing_proven_at is not None and others:
        # One that is proven speaks for all.
        return {"found": found, "unshared": dict(reach_steps.prove_shared(context, pool, others[0], [host]))}
    unshared = reach_steps.prove_shared(context, pool, host, others)
    # The others were there first: where they see something else, it is this host that is told so.
    return {"found": found, "unshared": {host.id: next(iter(unshared.values()))} if unshared else {}}


def _finish(context: Transaction[Params]) -> None:
    ensured = context.results["ensure"]
    for pool_id, outcome in ensured["pools"].items():
        if not reach.is_live_pool(context.session, pool_id):
            continue
        ready = reach_steps.record_pool(context, pool_id, outcome["found"], outcome["unshared"])
        if ready and describe.get_pool(context.session, pool_id).is_shared:
            reach.prove_sharing(context.session, pool_id, now=context.now)
    for network_id, found in ensured["networks"].items():
        if reach.is_live_network(context.session, network_id):
            reach_steps.record_network(context, network_id, found)
    gone = context.results["forget"]
    reach.forget_deleted(context.session, context.params.host_id, pool_ids=gone["pools"], network_ids=gone["networks"])


SAGA = Saga(
    name="host.prepare",
    version=1,
    params=Params,
    is_exclusive=False,
    steps=(
        effect("forget", _forget, None, because="it is deleted"),
        effect("ensure", _ensure, None, because="what is usable may stay usable"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
