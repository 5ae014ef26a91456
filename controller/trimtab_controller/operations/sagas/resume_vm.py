"""vm.resume: let a paused guest run on. See `operations/power_saga.py` for the steps."""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations.power_saga import power_saga
from trimtab_protos.messages import PowerAction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


SAGA = power_saga("vm.resume", Params, lambda _params: PowerAction.RESUME, desired_before=DesiredPower.PAUSED)
