"""vm.pause: freeze the guest's vcpus; memory stays. See `operations/power_saga.py` for the steps."""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations.power_saga import power_saga
from trimtab_protos.messages import PowerAction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


SAGA = power_saga("vm.pause", Params, lambda _params: PowerAction.PAUSE, desired_before=DesiredPower.RUNNING)
