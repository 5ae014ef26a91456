"""host.prepare: the pools and networks that nobody has looked at on one host are made usable there.

| step     | do                                                            | undo                  |
|----------|---------------------------------------------------------------|-----------------------|
| ensure   | each unknown pool (a shared one held against the fleet's marker) and network | - ensure undoes nothing |
| finish   | record the findings                                            | - last                |
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, fleet, reach
from trimtab_controller.store.reach import UpHost


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    host_id: str


def _ensure(context: Effect[Params]) -> Json:
    host_id = context.params.host_id
    host = UpHost(host_id, context.read(lambda session: fleet.name_of(session, host_id)))
    pools: dict[str, Any] = {}
    for pool_id in context.read(lambda session: reach.unknown_pools(session, host_id)):
        pools[pool_id] = _ensure_pool(context, pool_id, host)
    networks = {}
    for network_id in context.read(lambda session: reach.unknown_networks(session, host_id)):
        network = context.read(partial(describe.get_network, network_id=network_id))
        networks[network_id] = reach_steps.ensure_network(context, network, [host])[host_id]
    return {"pools": pools, "networks": networks}


def _ensure_pool(context: Effect[Params], pool_id: str, host: UpHost) -> Json:
    pool = context.read(lambda session: describe.get_pool(session, pool_id))
    found = reach_steps.ensure_pool(context, pool, [host])
    unshared: dict[str, str] = {}
    if pool.is_shared and "observation" in found[host.id]:
        proven = [one for one in context.read(lambda session: reach.ready_hosts(session, pool_id)) if one.id != host.id]
        unshared = reach_steps.prove_shared(context, pool, [host], proven)
    return {"found": found, "unshared": unshared}


def _finish(context: Transaction[Params]) -> None:
    ensured = context.results["ensure"]
    for pool_id, outcome in ensured["pools"].items():
        if reach_steps.record_pool(context, pool_id, outcome["found"], outcome["unshared"]):
            reach.prove_sharing(context.session, pool_id, now=context.now)
    for network_id, outcome in ensured["networks"].items():
        reach.record_network(context.session, network_id, context.params.host_id, problem=outcome["problem"], now=context.now)


SAGA = Saga(
    name="host.prepare",
    version=1,
    params=Params,
    is_exclusive=False,
    steps=(
        effect("ensure", _ensure, None, because="what is usable may stay usable"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
