"""vm.recover: a vm whose every holder is proven gone gets a new home and starts there.

| step       | do                                                                  | undo                               |
|------------|---------------------------------------------------------------------|------------------------------------|
| own        | nothing: acceptance superseded, raised the epoch, gave claims back   | - the next recovery does it again  |
| place      | ask the leader; without capacity or while paused wait, say why, again | give the compute back              |
| slot       | wait for one of the host's slots: a storm must not crush a survivor    | - the operation's end gives it back|
| note_images| note where copies of base images are about to be                      | - says where a file may be         |
| bring_images | copy base images where they are missing                             | - cache                            |
| leave_old  | undefine on the old host where it lives; a fenced one is left alone    | - the next start defines it again  |
| define     | define under the new epoch                                            | kill and undefine; the disks stay  |
| power_on   | start                                                                 | - define's undo kills              |
| finish     | record what was seen                                                  | - last                             |

A crash anywhere leaves a vm that runs nowhere or on the one host that the latest placement chose.
"""

from dataclasses import dataclass

from trimtab_controller.core.failover.settings import STARTS_PER_HOST
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import failover, fleet, hosts, placements, slots, vms
from trimtab_protos.errors import NoCapacity

CAPACITY_POLL_S = 10.0
# Whoever ends wakes the next; this is for those that end otherwise than well.
SLOT_POLL_S = 2.0
PAUSED = "failover is paused by an operator; `trimtab failover resume` lets it start"
_PLACE = vm_steps.place("start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    because: str
    previous_host_id: str = ""
    # A guest that ended alone starts on its own host first; without room there it fails, and failover looks further.
    to_host_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """The transaction that accepted this superseded the live operation, raised the epoch and gave the claims back."""


def _place(context: Transaction[Params]) -> Json | Wait:
    if failover.control(context.session).is_paused and not placements.is_placed(context.session, context.operation.id):
        # Begun before the pause: it keeps its turn and its vm, and nothing is claimed for it meanwhile.
        placements.withdraw(context.session, context.operation.id)
        _tell_why(context, PAUSED)
        return Wait(CAPACITY_POLL_S, PAUSED)
    try:
        found = _PLACE.do(context)
    except NoCapacity as full:
        if context.params.to_host_id:
            raise
        # It waits as long as it takes: a vm that should run is never given up for want of room.
        placements.withdraw(context.session, context.operation.id)
        _tell_why(context, f"waits for a host: {full.message}")
        return Wait(CAPACITY_POLL_S, f"capacity: {full.message}"[:400])
    assert found is None or isinstance(found, Wait | dict)
    return found or {}


def _give_back(context: Transaction[Params]) -> None:
    assert _PLACE.undo is not None
    _PLACE.undo(context)


def _take_slot(context: Transaction[Params]) -> Json | Wait:
    """Claimed it has its place already; what waits here is only the work of bringing it up."""
    host_id, limit = str(context.results["place"]["host_id"]), STARTS_PER_HOST
    if slots.take(context.session, host_id=host_id, kind=slots.START, operation_id=context.operation.id, limit=limit):
        failover.note_why(context.session, context.operation.id, "")
        return {"host_id": host_id}
    why = f"{limit} guests are starting on {fleet.name_of(context.session, host_id)} already; it starts there next"
    _tell_why(context, why)
    return Wait(SLOT_POLL_S, why)


def _tell_why(context: Transaction[Params], why: str) -> None:
    """Say why it stands: in the vm's problem, and in the loss of its host."""
    vms.update(context.session, context.params.vm_id, problem=why[:1000])
    failover.note_why(context.session, context.operation.id, why)


def _leave_old(context: Effect[Params]) -> Json:
    place, previous = context.results["place"], context.params.previous_host_id
    if not previous or previous == place["host_id"]:
        return {"left": ""}
    is_up = context.read(lambda session: _is_up(session, previous))
    if is_up:
        vm_steps.remove_domain(context, previous, epoch=int(place["epoch"]), keep_state_files=True)
    return {"left": previous if is_up else ""}


def _is_up(session: object, host_id: str) -> bool:
    if host_id not in fleet.joined_ids(session):  # type: ignore[arg-type]
        return False
    return hosts.get(session, host_id).connectivity is HostConnectivity.UP  # type: ignore[arg-type]


def _undefine(context: Effect[Params]) -> None:
    place = context.results.get("place")
    if place is not None:
        vm_steps.remove_domain(context, str(place["host_id"]), epoch=int(place["epoch"]), keep_state_files=True)


def _finish(context: Transaction[Params]) -> None:
    vm_steps.record_images(context)
    vm_steps.record_seen(context, "power_on")
    vms.update(context.session, context.params.vm_id, problem="")
    slots.wake_next(context.session, host_id=str(context.results["place"]["host_id"]), step="slot", now=context.now)


SAGA = Saga(
    name="vm.recover",
    version=2,
    params=Params,
    result=lambda results: {"host_id": results["place"]["host_id"], "decision_id": results["place"]["decision_id"]},
    steps=(
        transaction("own", _own, None, because="the next recovery does it again"),
        transaction("place", _place, _give_back),
        transaction("slot", _take_slot, None, because="the operation's end gives it back"),
        vm_steps.note_images(),
        vm_steps.bring_images(),
        effect("leave_old", _leave_old, None, because="the next start defines it again"),
        effect("define", vm_steps.define, _undefine),
        effect("power_on", vm_steps.power_on, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
