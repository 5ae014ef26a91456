"""The shape of the sagas that are one power action on a running guest: reboot, pause, resume.

| step   | do                                          | undo                                  |
|--------|---------------------------------------------|---------------------------------------|
| own    | (the wish was recorded at acceptance)        | take the wish back                    |
| act    | the action, ensure-wise (pivot)               | - it can be reversed by its own verb  |
| finish | record what was seen                         | - last                                |
"""

from collections.abc import Callable
from typing import Any

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import vms
from trimtab_protos.messages import PowerAction


def power_saga(
    name: str, params: type[Any], action_of: Callable[[Any], PowerAction], *, desired_before: DesiredPower
) -> Saga[Any]:
    """Return the saga `name`; `desired_before` is the wish that a failed action falls back to."""

    def own(_context: Transaction[Any]) -> None:
        """The wish was recorded when the request was accepted."""

    def disown(context: Transaction[Any]) -> None:
        vms.set_desired(context.session, context.params.vm_id, desired_before)

    def act(context: Effect[Any]) -> Json:
        host_id, epoch = vm_steps.home_of(context)
        key = context.key(subject_id=context.params.vm_id, epoch=epoch)
        seen = context.agents.change_power(host_id, key, context.params.vm_id, action_of(context.params))
        return vm_steps.seen_json(host_id, seen)

    def finish(context: Transaction[Any]) -> None:
        vm_steps.record_seen(context, "act")

    return Saga(
        name=name,
        version=1,
        params=params,
        steps=(
            transaction("own", own, disown),
            effect("act", act, None, because="its own verb reverses it", pivot=True),
            transaction("finish", finish, None, because="nothing follows it"),
        ),
    )
