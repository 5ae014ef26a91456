"""network.create: a network becomes usable for guests on every host that has what it needs.

| step   | do                                                          | undo                                 |
|--------|-------------------------------------------------------------|--------------------------------------|
| own    | map it to every host (the row was inserted at acceptance)    | unmap it where it went, free its name |
| ensure | on every host that is up; refused where none can             | remove what was made                 |
| finish | record each host's finding                                   | - last                               |

Hosts that do not answer while it is undone forget it when they are back (host.prepare).
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    network_id: str


def _own(context: Transaction[Params]) -> None:
    reach.map_network(context.session, context.params.network_id)


def _disown(context: Transaction[Params]) -> None:
    left = reach_steps.untold(context, context.undone.get("ensure", {}))
    reach.unmap_network(context.session, context.params.network_id, left=left)
    reach.hide_network(context.session, context.params.network_id, now=context.now)


def _ensure(context: Effect[Params]) -> Json:
    network = context.read(partial(describe.get_network, network_id=context.params.network_id))
    hosts = context.read(reach.up_hosts)
    found = reach_steps.ensure_network(context, network, hosts, subject_id=network.id)
    reach_steps.refuse_if_none("network", network.name, found, hosts)
    return {"found": found}


def _remove(context: Effect[Params]) -> Json:
    network_id = context.params.network_id
    return reach_steps.remove_everywhere(
        context, lambda host: context.agents.remove_network(host.id, context.key(subject_id=network_id), network_id)
    )


def _finish(context: Transaction[Params]) -> None:
    reach_steps.record_network(context, context.params.network_id, context.results["ensure"]["found"])


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
