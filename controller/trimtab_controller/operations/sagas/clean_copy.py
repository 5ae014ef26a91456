"""vm.clean_copy: end and undefine what a host holds of a vm that has its home elsewhere; the vm's own disks stay untouched.

| step   | do                                                                                    | undo            |
|--------|---------------------------------------------------------------------------------------|-----------------|
| check  | is the host the vm's home by now, or a side of its move? then nothing is removed       | - it only looks |
| remove | undefine there up to the vm's present epoch; `kill`: end it first, else only if it is off | - gone is gone |

It runs beside whatever else is done with the vm: an agent refuses a command of a lower epoch, so that one which comes late cannot
touch a copy that was placed there since. A crash leaves the copy, and the next round of failover asks again.
"""

from dataclasses import dataclass

from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import claims, describe, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import DomainState

_ACTIVE = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING, DomainState.INCOMING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    host_id: str
    kill: bool = False


def _check(context: Transaction[Params]) -> Json:
    return _right_of(context.session, context.params)


def _right_of(session: Session, params: Params) -> Json:
    """Return {epoch: the highest that was given to the vm, is_home: whether the host may hold it by right}."""
    vm = vms.get(session, params.vm_id)
    row = claims.migration_of(session, params.vm_id)
    is_home = vm.host_id == params.host_id and vm.deleted_at is None
    # The half copy of a broken move is ended on purpose, while its record still names the host.
    is_holder = row is not None and params.host_id in {row.source_host_id, row.target_host_id} and not params.kill
    return {"epoch": max(vm.epoch, row.target_epoch if row is not None else 0), "is_home": is_home or is_holder}


def _remove(context: Effect[Params]) -> Json:
    params, epoch = context.params, int(context.results["check"]["epoch"])
    # Placed there since: its epoch is higher than ours, and the agent would refuse. This says so without asking it.
    if context.results["check"]["is_home"] or context.read(lambda session: _right_of(session, params))["is_home"]:
        return {"was": "home", "is_removed": False}
    seen = context.agents.get_domain(params.host_id, params.vm_id)
    if seen.state in _ACTIVE and not params.kill:
        return {"was": seen.state.value, "is_removed": False}
    try:
        parts = context.read(lambda session: describe.read_vm(session, params.vm_id))
        pools = parts.pool_specs()
    except NotFound:
        pools = ()
    context.agents.undefine_domain(
        params.host_id,
        context.key(subject_id=params.vm_id, epoch=epoch),
        params.vm_id,
        kill_if_running=params.kill,
        pools=pools,
        keep_state_files=True,
    )
    return {"was": seen.state.value, "is_removed": True}


SAGA = Saga(
    name="vm.clean_copy",
    version=1,
    params=Params,
    is_exclusive=False,
    # What is left behind is not put back.
    is_forward_only=lambda _params: True,
    result=lambda results: dict(results["remove"]),
    steps=(
        transaction("check", _check, None, because="it only looks"),
        effect("remove", _remove, None, because="gone is gone"),
    ),
)
