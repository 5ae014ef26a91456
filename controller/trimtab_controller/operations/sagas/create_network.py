"""network.create: a network becomes usable for guests on every host that has what it needs.

| step   | do                                                        | undo                    |
|--------|-----------------------------------------------------------|-------------------------|
| own    | (the row was inserted at acceptance)                       | erase it, free the name |
| ensure | on every host that is up; Conflict where none can          | remove what was made    |
| finish | record each host's finding                                 | - last                  |
"""

from dataclasses import dataclass

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, reach, schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    network_id: str


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    reach.forget_mappings(context.session, schema.network_host, network_id=context.params.network_id)
    reach.erase(context.session, schema.network, context.params.network_id, now=context.now)


def _ensure(context: Effect[Params]) -> Json:
    network = context.read(lambda session: describe.get_network(session, context.params.network_id))
    hosts = context.read(reach.up_hosts)
    found = reach_steps.ensure_network(context, network, hosts)
    names = {host.id: host.name for host in hosts}
    reach_steps.refuse_if_none("network", network.name, {one: found[one]["problem"] for one in found}, names)
    return {"found": found}


def _remove(context: Effect[Params]) -> None:
    for host in context.read(reach.up_hosts):
        key = context.key(subject_id=context.operation.subject_id, part=host.id)
        context.agents.remove_network(host.id, key, context.params.network_id)


def _finish(context: Transaction[Params]) -> None:
    for host_id, outcome in context.results["ensure"]["found"].items():
        reach.record_network(context.session, context.params.network_id, host_id, problem=outcome["problem"], now=context.now)


SAGA = Saga(
    name="network.create",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("ensure", _ensure, _remove),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
