"""vm.redefine: a vm whose definition was taken away behind our back is defined again at its home; nothing is started or ended.

| step   | do                                                                                        | undo                        |
|--------|-------------------------------------------------------------------------------------------|-----------------------------|
| prove  | ask its home, and every other host that may hold it: there it has to be absent             | - it only looks             |
| define | define at home under the epoch that it has; refused where a disk is not there              | - it belongs there          |
| finish | record what was seen                                                                       | - last                      |

A guest that runs without a definition (`virsh undefine` while it ran) runs on through all of this. A crash anywhere leaves it defined
or not, and the drift loop asks again.
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _prove(context: Effect[Params]) -> Json:
    vm_id = context.params.vm_id
    vm = context.read(lambda session: vms.get(session, vm_id))
    home, epoch = vm_steps.home_of(context)
    if vm.desired_power is DesiredPower.DELETED or vm.attention:
        raise Conflict("vm-not-wished", f"vm {vm.name} is not to be defined by itself; see `trimtab vm get {vm.name}`")
    holders, _highest = context.read(lambda session: vm_steps.holders_of(session, vm_id))
    for host_id in sorted(set(holders) - {home}):
        seen = context.agents.get_domain(host_id, vm_id)
        if seen.state is not DomainState.ABSENT:
            raise Conflict(
                "domain-elsewhere",
                f"vm {vm.name} is {seen.state.value} on another host that may hold it; it is not defined a second time",
                host_id=host_id,
                epoch=seen.epoch,
            )
    return {"host_id": home, "epoch": epoch, "was": context.agents.get_domain(home, vm_id).state.value}


def _define(context: Effect[Params]) -> Json:
    proven, vm_id = context.results["prove"], context.params.vm_id
    host_id = str(proven["host_id"])

    def read(session: Session) -> object:
        return describe.domain_spec(session, describe.read_vm(session, vm_id), host_id)

    key = context.key(subject_id=vm_id, epoch=int(proven["epoch"]))
    seen = context.agents.define_domain(host_id, key, context.read(read), needs_volumes=True)
    return vm_steps.seen_json(host_id, seen)


def _finish(context: Transaction[Params]) -> None:
    vm_steps.record_seen(context, "define")


SAGA = Saga(
    name="vm.redefine",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["prove"]["host_id"], "was": results["prove"]["was"]},
    steps=(
        effect("prove", _prove, None, because="it only looks"),
        effect("define", _define, None, because="its definition belongs there"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
