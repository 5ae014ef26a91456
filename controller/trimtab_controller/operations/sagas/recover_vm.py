"""vm.recover: a vm whose every holder is proven gone gets a new home and starts there.

| step       | do                                                                  | undo                               |
|------------|---------------------------------------------------------------------|------------------------------------|
| own        | nothing: acceptance superseded, raised the epoch, gave claims back   | - the next recovery does it again  |
| place      | ask the leader; without capacity wait, say why, ask again             | give the compute back              |
| note_images| note where copies of base images are about to be                      | - says where a file may be         |
| bring_images | copy base images where they are missing                             | - cache                            |
| leave_old  | undefine on the old host where it lives; a fenced one is left alone    | - the next start defines it again  |
| define     | define under the new epoch                                            | kill and undefine; the disks stay  |
| power_on   | start                                                                 | - define's undo kills              |
| finish     | record what was seen                                                  | - last                             |

A crash anywhere leaves a vm that runs nowhere or on the one host that the latest placement chose.
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import fleet, hosts, placements, vms
from trimtab_protos.errors import NoCapacity

CAPACITY_POLL_S = 10.0
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
    try:
        found = _PLACE.do(context)
    except NoCapacity as full:
        if context.params.to_host_id:
            raise
        # It waits as long as it takes: a vm that should run is never given up for want of room.
        placements.withdraw(context.session, context.operation.id)
        vms.update(context.session, context.params.vm_id, problem=f"waits for a host: {full.message}"[:1000])
        return Wait(CAPACITY_POLL_S, f"capacity: {full.message}"[:400])
    assert found is None or isinstance(found, Wait | dict)
    return found or {}


def _give_back(context: Transaction[Params]) -> None:
    assert _PLACE.undo is not None
    _PLACE.undo(context)


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


SAGA = Saga(
    name="vm.recover",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["place"]["host_id"], "decision_id": results["place"]["decision_id"]},
    steps=(
        transaction("own", _own, None, because="the next recovery does it again"),
        transaction("place", _place, _give_back),
        vm_steps.note_images(),
        vm_steps.bring_images(),
        effect("leave_old", _leave_old, None, because="the next start defines it again"),
        effect("define", vm_steps.define, _undefine),
        effect("power_on", vm_steps.power_on, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
