"""vm.reboot: ask the guest to reboot, or reset it with `force`. See `operations/power_saga.py` for the steps."""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations.power_saga import power_saga
from trimtab_protos.messages import PowerAction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    force: bool = False


SAGA = power_saga(
    "vm.reboot",
    Params,
    lambda params: PowerAction.RESET if params.force else PowerAction.REBOOT,
    desired_before=DesiredPower.RUNNING,
)
