"""vm.resize: other numbers of vcpus, another amount of memory; in the running guest, or from its next stop on.

| step   | do                                                                        | undo                                        |
|--------|---------------------------------------------------------------------------|---------------------------------------------|
| own    | (wish and quota were recorded at acceptance)                               | wish what was wished before, free the quota |
| claim  | raise the claim on its host to the greater of what it has and shall have   | lower it to what it has                     |
| apply  | ask the guest and observe it; what it keeps is left for its next stop      | ask for what it had; what it keeps, it has  |
| finish | record what was observed and what is left; lower claim and quota to that   | - last                                      |

A vm that is off takes on its new shape in `finish`; with `when = next-stop` a running one keeps both its shape and the wish.
A guest may refuse to give back vcpus or memory, forward and in reverse: what it has is then its shape, whoever wished what.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trimtab_controller.core.resize import OFF, Shape, When, left_of, shape_of, wanted_of
from trimtab_controller.operations import live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import claims, events, fleet, vms
from trimtab_protos.errors import Conflict, NoCapacity
from trimtab_protos.messages import ChangeLeft, DomainObservation

NOTHING_LIVE: Mapping[str, Any] = {"is_live": False, "host_id": "", "epoch": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    vcpus: int
    memory_mib: int
    when: str = When.AUTO.value
    # What waited for the next stop before.
    before_vcpus: int = 0
    before_memory_mib: int = 0

    @property
    def wanted(self) -> Shape:
        return Shape(self.vcpus, self.memory_mib)


def _own(_context: Transaction[Params]) -> None:
    """The wish was recorded when the request was accepted, so that the quota was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    vms.set_next_shape(context.session, vm, Shape(context.params.before_vcpus, context.params.before_memory_mib))


def _claim(context: Transaction[Params]) -> Json:
    vm = vms.get(context.session, context.params.vm_id)
    if vm.observed_state in OFF or context.params.when == When.NEXT_STOP:
        return NOTHING_LIVE
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; start it with `trimtab vm start {vm.name}`")
    greater = shape_of(vm).at_least(context.params.wanted)
    try:
        claims.resize(context.session, vm.id, host_id=vm.host_id, vcpus=greater.vcpus, memory_mib=greater.memory_mib)
    except claims.ClaimRefused as error:
        host = fleet.name_of(context.session, vm.host_id)
        raise NoCapacity(
            "host-full",
            f"host {host} has no room for {greater.vcpus} vcpus and {greater.memory_mib} MiB of vm {vm.name}; move it with "
            f"`trimtab vm migrate {vm.name}`, or resize it with `--at next-stop`",
            host_id=vm.host_id,
        ) from error
    return {"is_live": True, "host_id": vm.host_id, "epoch": vm.epoch}


def _unclaim(context: Transaction[Params]) -> None:
    _fit_claim(context, context.results.get("claim", NOTHING_LIVE))


def _fit_claim(context: Transaction[Params], claimed: Json) -> None:
    """Make the claim as large as the vm's shape; nothing where it was not changed, or is gone with the vm's host."""
    vm = vms.get(context.session, context.params.vm_id)
    held = {claim.host_id for claim in claims.of_vm(context.session, vm.id)}
    if claimed["is_live"] and claimed["host_id"] in held:
        claims.resize(context.session, vm.id, host_id=str(claimed["host_id"]), vcpus=vm.vcpus, memory_mib=vm.memory_mib)


def _apply(context: Effect[Params]) -> Json | Wait:
    if not context.results["claim"]["is_live"]:
        return {}
    seen, left = _ask_guest(context, context.params.wanted)
    if live_changes.may_follow(left) and context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {left[0].reason}")
    if left and context.params.when == When.LIVE:
        reasons = "; ".join(each.reason for each in left)
        raise Conflict("guest-refused", f"{reasons}; `--at next-stop` changes it when it is stopped")
    return _settle(context, seen, left)


def _unapply(context: Effect[Params]) -> TookPlace | Wait | None:
    if not context.results.get("claim", NOTHING_LIVE)["is_live"]:
        return None
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    seen, left = _ask_guest(context, shape_of(vm))
    if not left:
        return None
    if live_changes.may_follow(left) and context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {left[0].reason}")
    # It keeps what it was given: to say that it has less would be a lie, and its claim would be too small.
    return TookPlace(_settle(context, seen, left))


def _ask_guest(context: Effect[Params], shape: Shape, *, part: str = "") -> tuple[DomainObservation, tuple[ChangeLeft, ...]]:
    claimed = context.results["claim"]
    return live_changes.ask_guest(
        context,
        host_id=str(claimed["host_id"]),
        epoch=int(claimed["epoch"]),
        part=part,
        spec_of=lambda spec: replace(spec, vcpus=shape.vcpus, memory_mib=shape.memory_mib),
    )


def _settle(context: Effect[Params], seen: DomainObservation, left: tuple[ChangeLeft, ...]) -> Json:
    """Return what the guest has; where it does not follow, stop asking: it may not take later what it is not claimed for."""
    if left:
        has = Shape(seen.vcpus, seen.memory_mib)
        seen, _left = _ask_guest(context, has, part=f"settle-{has.vcpus}-{has.memory_mib}")
    return {"vcpus": seen.vcpus, "memory_mib": seen.memory_mib, "left": [each.reason for each in left]}


def _finish(context: Transaction[Params]) -> Json:
    session, params, claimed = context.session, context.params, context.results["claim"]
    vm = vms.get(session, params.vm_id)
    applied = context.results["apply"]
    if claimed["is_live"]:
        # Without a word of what is left the guest has what was wished: memory comes in steps, so its figure may be a MiB off.
        has = Shape(int(applied["vcpus"]), int(applied["memory_mib"])) if applied["left"] else params.wanted
        vms.set_shape(session, vm, has, left=left_of(params.wanted, has))
        _fit_claim(context, claimed)
    elif params.when != When.NEXT_STOP or vm.observed_state in OFF:
        # One that ended by itself holds its compute still, as much as it had: its next start claims what it needs now.
        claims.give_back(session, vm.id)
        vms.set_shape(session, vm, wanted_of(vm, vcpus=params.vcpus, memory_mib=params.memory_mib))
    after = vms.get(session, params.vm_id)
    events.append(
        session,
        kind="vm.resized",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} has {after.vcpus} vcpus and {after.memory_mib} MiB",
        context={"next_vcpus": after.next_vcpus, "next_memory_mib": after.next_memory_mib},
        now=context.now,
    )
    return {
        "vcpus": after.vcpus,
        "memory_mib": after.memory_mib,
        "next_vcpus": after.next_vcpus,
        "next_memory_mib": after.next_memory_mib,
        "left": applied.get("left", []),
    }


SAGA = Saga(
    name="vm.resize",
    version=1,
    params=Params,
    result=lambda results: results["finish"],
    steps=(
        transaction("own", _own, _disown),
        transaction("claim", _claim, _unclaim),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
