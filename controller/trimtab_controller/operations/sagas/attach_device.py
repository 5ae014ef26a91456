"""vm.attach: a vm is given a volume, a network card or both, while it runs or while it does not.

| step   | do                                                          | undo                                                         |
|--------|-------------------------------------------------------------|--------------------------------------------------------------|
| own    | (the rows were written at acceptance: nobody else takes it) | the volume is free again; MAC and addresses are              |
| apply  | define the domain with them, plug them into a running guest | define it without, unplug both; what a guest keeps, it has   |
| finish | what an undo saw gone while the guest kept the other: free; tell | - last                                                  |

Both come or neither: a card that fails takes the disk along. Superseded by a forced stop they stay the vm's, which starts with
them the next time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.operations import devices, live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import vms
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """`volume_id`, `nic_id` or both."""

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
    refused = next((each for each in mine if each.needs_stop), None)
    if refused is not None:
        raise Conflict("attach-refused", f"{refused.reason}; stop the vm and attach it then")
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
    if not mine:
        return None
    if context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {mine[0].reason}")
    # What the guest holds it may write to: it is the vm's until it lets go.
    kept = {each.device_id for each in mine}
    gone = [each for each in devices.ids_of(params) if each not in kept]
    return TookPlace({"host_id": vm.host_id, "epoch": vm.epoch, "gone": gone})


def _finish(context: Transaction[Params]) -> None:
    gone = _gone(context.results)
    devices.forget(context.session, context.params, only=gone)
    has = [each for each in devices.ids_of(context.params) if each not in gone]
    devices.tell(context, "vm.device_attached", "has", device_ids=has)
    devices.tell(context, "vm.device_detached", "has no more", device_ids=gone)


def _gone(results: Mapping[str, Json]) -> list[str]:
    """Return what an undo took off before it found that the guest keeps the other device."""
    return list(results["apply"].get("gone", []))


SAGA = Saga(
    name="vm.attach",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
    result=lambda results: {"not_attached": _gone(results)} if _gone(results) else {},
)
