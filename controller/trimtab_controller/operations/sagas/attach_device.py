"""vm.attach: a vm is given a volume or a network card, while it runs or while it does not.

| step   | do                                                        | undo                                                        |
|--------|-----------------------------------------------------------|-------------------------------------------------------------|
| own    | (the row was written at acceptance: nobody else takes it)  | the volume is free again; MAC and addresses are             |
| apply  | define the domain with it, plug it into a running guest    | define it without, unplug it; a guest that keeps it, has it |
| finish | tell                                                       | - last                                                      |

Superseded by a forced stop it stays the vm's, which starts with it the next time.
"""

from dataclasses import dataclass

from trimtab_controller.operations import devices, live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import vms
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """One of `volume_id` and `nic_id`."""

    vm_id: str
    volume_id: str = ""
    nic_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """The row was written when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    devices.forget(context.session, context.params)


def _apply(context: Effect[Params]) -> Json | Wait:
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if not vm.host_id:
        return {"host_id": "", "epoch": 0}  # never placed: its first start defines it with the device
    _seen, left = live_changes.ask_guest(context, host_id=vm.host_id, epoch=vm.epoch)
    mine = devices.left_of(context.params, left)
    if mine is not None and mine.needs_stop:
        raise Conflict("attach-refused", f"{mine.reason}; stop the vm and attach it then")
    return {"host_id": vm.host_id, "epoch": vm.epoch}


def _unapply(context: Effect[Params]) -> TookPlace | Wait | None:
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if not vm.host_id:
        return None
    params = context.params
    _seen, left = live_changes.ask_guest(
        context, host_id=vm.host_id, epoch=vm.epoch, parts_of=lambda parts: devices.without(parts, params)
    )
    mine = devices.left_of(params, left)
    if mine is None:
        return None
    if context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {mine.reason}")
    # What the guest holds it may write to: it is the vm's until it lets go.
    return TookPlace({"host_id": vm.host_id, "epoch": vm.epoch})


def _finish(context: Transaction[Params]) -> None:
    devices.tell(context, "vm.device_attached", "has")


SAGA = Saga(
    name="vm.attach",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
