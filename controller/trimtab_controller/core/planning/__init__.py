"""What to change, before anything changes: plans, the proof of failover, capacity. Pure; built on `core.placement`.

estate.py     the fleet with the vms on it          what_if.py    books along the steps of a plan, with what waits for what
plan.py       what a plan is, and the way back      timeline.py   slots and the forecast      peaks.py   what targets carry
obstacles.py  what keeps a vm, with the cure        staleness.py  pins, and what changed since
drain.py      drain, evacuate, upgrade              consolidate.py
rebalance.py  on predicted load (`load.py`)         balance.py    its arithmetic          relief.py  memory nearly used up
proof.py      every vm and every failure domain     domains.py, survivors.py, classes.py
capacity.py   what is left, and how many more fit
"""

from trimtab_controller.core.planning.consolidate import ConsolidatePolicy, plan_consolidate
from trimtab_controller.core.planning.drain import Terms, plan_drain, plan_evacuate, plan_upgrade
from trimtab_controller.core.planning.estate import DrainPolicy, Estate, Power, VmSnapshot
from trimtab_controller.core.planning.plan import Blocker, Cause, Plan, PlanKind, Step, StepKind, undo_steps
from trimtab_controller.core.planning.rebalance import History, RebalanceMode, RebalancePolicy, plan_rebalance
from trimtab_controller.core.planning.staleness import changes
from trimtab_controller.core.planning.timeline import Rates, Slots

__all__ = [
    "Blocker",
    "Cause",
    "ConsolidatePolicy",
    "DrainPolicy",
    "Estate",
    "History",
    "Plan",
    "PlanKind",
    "Power",
    "Rates",
    "RebalanceMode",
    "RebalancePolicy",
    "Slots",
    "Step",
    "StepKind",
    "Terms",
    "VmSnapshot",
    "changes",
    "plan_consolidate",
    "plan_drain",
    "plan_evacuate",
    "plan_rebalance",
    "plan_upgrade",
    "undo_steps",
]
