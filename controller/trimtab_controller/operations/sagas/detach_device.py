"""vm.detach: a volume or a network card is taken from a vm, while it runs or while it does not.

| step   | do                                                              | undo                                       |
|--------|-----------------------------------------------------------------|--------------------------------------------|
| own    | make sure that the vm still has it                               | - it only looks                            |
| apply  | define the domain without it; ask a running guest and wait for   | define it with it, plug it in again        |
|        | its answer: only a device that is seen to be gone is detached    |                                            |
| finish | the volume is free; MAC and addresses are                        | - last                                     |

A guest that keeps the device fails the operation: the vm has the device still, and can be stopped to take it away.
"""

from dataclasses import dataclass

from trimtab_controller.operations import devices, live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import vms
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """One of `volume_id` and `nic_id`."""

    vm_id: str
    volume_id: str = ""
    nic_id: str = ""


def _own(context: Transaction[Params]) -> None:
    devices.require(context.session, context.params)


def _apply(context: Effect[Params]) -> Json | Wait:
    params = context.params
    vm = context.read(lambda session: vms.get(session, params.vm_id))
    if not vm.host_id:
        return {"host_id": ""}
    _seen, left = live_changes.ask_guest(
        context, host_id=vm.host_id, epoch=vm.epoch, parts_of=lambda parts: devices.without(parts, params)
    )
    mine = devices.left_of(params, left)
    if not mine:
        return {"host_id": vm.host_id}
    if context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {mine[0].reason}")
    raise Conflict(
        "guest-keeps-device",
        f"{mine[0].reason}; unmount it in the guest and try again, or stop vm {vm.name} and detach it then",
    )


def _unapply(context: Effect[Params]) -> None:
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if vm.host_id:
        live_changes.ask_guest(context, host_id=vm.host_id, epoch=vm.epoch)


def _finish(context: Transaction[Params]) -> None:
    devices.tell(context, "vm.device_detached", "has no more", device_ids=devices.ids_of(context.params))
    devices.forget(context.session, context.params)


SAGA = Saga(
    name="vm.detach",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="it only looks"),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
