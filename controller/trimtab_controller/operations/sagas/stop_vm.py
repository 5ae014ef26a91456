"""vm.stop: ask the guest to shut down; after the deadline cut its power. Its compute is given back, its disks stay claimed.

| step    | do                                                              | undo                                     |
|---------|-----------------------------------------------------------------|------------------------------------------|
| own     | (the wish was recorded at acceptance)                            | wish for running again                   |
| find    | by force: a migration under way is aborted; where is the guest?  | - it only looks                          |
| ask     | guest agent or ACPI, unless `force`                              | - a guest cannot be un-asked             |
| off     | wait until it is off, ask again; past `timeout_s` cut the power (pivot) | - off is off                             |
| clean   | what such a migration left on the other side                     | -                                        |
| finish  | record, give compute back                                        | - last                                   |
"""

from dataclasses import dataclass
from typing import Any

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations import superseded, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import vms
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainState, PowerAction, StateReason

OFF = frozenset({DomainState.STOPPED, DomainState.ABSENT, DomainState.CRASHED})
# The agent's event wakes the row; a guest that ignores the request is looked at this often.
POLL_S = 2.0
# A guest that is still booting hears nothing: without this its power would be cut although it would have obeyed.
ASK_AGAIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    force: bool = False
    timeout_s: int = 60


def _own(_context: Transaction[Params]) -> None:
    """The wish was recorded when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    vms.set_desired(context.session, context.params.vm_id, DesiredPower.RUNNING)


def _ask(context: Effect[Params]) -> Json:
    found, vm_id = context.results["find"], context.params.vm_id
    host_id, epoch = str(found["host_id"]), int(found["epoch"])
    if not host_id or context.params.force:
        return {"host_id": host_id, "epoch": epoch, "was_asked": False}
    seen = context.agents.get_domain(host_id, vm_id)
    is_off = seen.state in OFF
    if not is_off:
        context.agents.change_power(host_id, context.key(subject_id=vm_id, epoch=epoch), vm_id, PowerAction.SHUT_DOWN)
    return {"host_id": host_id, "epoch": epoch, "was_asked": True, "was_off": is_off}


def _off(context: Effect[Params]) -> Json | Wait:
    asked, vm_id = context.results["ask"], context.params.vm_id
    host_id = str(asked["host_id"])
    if not host_id:
        return {"host_id": "", "state": DomainState.ABSENT.value, "reason": "none", "at_ms": 0}
    seen = context.agents.get_domain(host_id, vm_id)
    if seen.state in OFF:
        return vm_steps.seen_json(host_id, seen)
    if asked["was_asked"] and context.waited_s < context.params.timeout_s:
        if seen.state is DomainState.RUNNING and context.waited_s >= ASK_AGAIN_S:
            _ask_again(context, host_id, epoch=int(asked["epoch"]))
        remaining = context.params.timeout_s - int(context.waited_s)
        return Wait(POLL_S, f"the guest to shut down (its power is cut in {remaining} s)")
    seen = context.agents.change_power(
        host_id, context.key(subject_id=vm_id, epoch=int(asked["epoch"])), vm_id, PowerAction.FORCE_OFF
    )
    return vm_steps.seen_json(host_id, seen)


def _ask_again(context: Effect[Params], host_id: str, *, epoch: int) -> None:
    """Once in each ten seconds: the part of the key is the same in all of them."""
    vm_id = context.params.vm_id
    key = context.key(subject_id=vm_id, epoch=epoch, part=f"again-{int(context.waited_s // ASK_AGAIN_S)}")
    try:
        context.agents.change_power(host_id, key, vm_id, PowerAction.SHUT_DOWN)
    except Conflict as changed:
        if changed.code != "wrong-domain-state":
            raise


def _cancel_off(context: Effect[Params]) -> Json | Stopped:
    """A guest that went down meanwhile is down: the cancel came too late."""
    host_id = str(context.results["ask"]["host_id"])
    seen = context.agents.get_domain(host_id, context.params.vm_id)
    return vm_steps.seen_json(host_id, seen) if seen.state in OFF else Stopped()


def _clean(context: Effect[Params]) -> Json:
    found = context.results["find"]
    return superseded.clean_other_side(context, found) if found["was_moving"] else {"host_id": ""}


def _finish(context: Transaction[Params]) -> None:
    superseded.forget_migration(context, context.results["find"])
    if context.results["off"]["host_id"]:
        vm_steps.record_seen(context, "off")
    vm_steps.give_back_compute(context)


def _result(results: Any) -> Json:
    """Tell whether its power was cut; by what was seen at the end, since a driver may die between the cut and its record."""
    asked, was_destroyed = results["ask"], results["off"]["reason"] == StateReason.DESTROYED.value
    return {"was_forced": not asked["was_asked"] or (was_destroyed and not asked.get("was_off", False))}


SAGA = Saga(
    name="vm.stop",
    version=1,
    params=Params,
    # By force it superseded what was under way and has to clean up after that, whatever anybody wishes by now.
    is_forward_only=lambda params: params.force,
    result=_result,
    steps=(
        transaction("own", _own, _disown),
        effect("find", superseded.find_guest, None, because="it only looks"),
        effect("ask", _ask, None, because="a guest cannot be un-asked"),
        effect("off", _off, None, because="off is off", pivot=True, cancel=_cancel_off),
        effect("clean", _clean, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
