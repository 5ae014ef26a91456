"""network.delete: a network without nics goes from every host; an operator's bridge stays.

| step   | do                                                    | undo                          |
|--------|-------------------------------------------------------|-------------------------------|
| own    | refuse if a nic is on it, else hide it (pivot)         | - from here on only forward   |
| remove | what was made on every host that is up                 | -                             |
| finish | unmap it, but on hosts that were not told: host.prepare | - last                        |
"""

from dataclasses import dataclass

from trimtab_controller.operations import reach_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import networks, reach
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    network_id: str


def _own(context: Transaction[Params]) -> None:
    """Hidden in the transaction that looked, which nobody comes onto it beside."""
    users = networks.hide_unused(context.session, context.params.network_id, now=context.now)
    if users:
        raise Conflict("network-in-use", f"the network is used by {', '.join(users)}")


def _remove(context: Effect[Params]) -> Json:
    network_id = context.params.network_id
    return reach_steps.remove_everywhere(
        context, lambda host: context.agents.remove_network(host.id, context.key(subject_id=network_id), network_id)
    )


def _finish(context: Transaction[Params]) -> None:
    left = reach_steps.untold(context, context.results["remove"])
    reach.unmap_network(context.session, context.params.network_id, left=left)


SAGA = Saga(
    name="network.delete",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("remove", _remove, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
