"""template.create-vms: follows the vms that one request asked for, each of which is an operation of its own.

| step   | do                                       | undo                                                  |
|--------|------------------------------------------|-------------------------------------------------------|
| follow | wait until every vm's operation has ended | - each vm is undone, or kept, by its own operation    |

Cancelling it ends the following only: `trimtab op cancel` on a vm's own operation undoes that vm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_controller.core.lifecycle import ENDED_STATES, OperationState
from trimtab_controller.operations.saga import Json, Saga, Transaction, Wait, transaction
from trimtab_controller.store import operations
from trimtab_protos.errors import Conflict

POLL_S = 2.0
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    template_id: str
    operation_ids: Sequence[str]


def _follow(context: Transaction[Params]) -> Json | Wait:
    children = [operations.get(context.session, one) for one in context.params.operation_ids]
    live = [one for one in children if one.state not in ENDED_STATES]
    made = [one for one in children if one.state is OperationState.DONE]
    if live:
        percent = round(100 * (len(children) - len(live)) / len(children), 1)
        progress = {"done": len(children) - len(live), "total": len(children), "phase": "vms", "percent": percent}
        return Wait(POLL_S, f"{len(live)} of {len(children)} vms", progress=progress)
    if len(made) < len(children):
        failed = [one for one in children if one.state is not OperationState.DONE]
        reasons = "; ".join(f"{one.subject_name}: {one.error.message if one.error else one.state}" for one in failed[:_NAMED])
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise Conflict("vms-failed", f"{len(made)} of {len(children)} vms were made; {reasons}{more}", failed=len(failed))
    return {"vms": [one.subject_name for one in made]}


SAGA = Saga(
    name="template.create-vms",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: {"vms": results["follow"]["vms"]},
    steps=(transaction("follow", _follow, None, because="each vm is undone, or kept, by its own operation"),),
)
