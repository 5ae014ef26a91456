"""From rows to the `Estate` that plans, proof and capacity are made on."""

from datetime import datetime, timedelta

import numpy as np

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import PlacementAsk
from trimtab_controller.core.planning.estate import MIB, DrainPolicy, Estate, Power, VmSnapshot
from trimtab_controller.core.planning.load import predicted
from trimtab_controller.core.planning.timeline import Rates
from trimtab_controller.operations import placement_snapshot
from trimtab_controller.store import estate_rows, fleet
from trimtab_controller.store.database import Session
from trimtab_controller.store.estate_rows import EstateVm

CPU_MILLIS = "cpu_millis"
BUCKET_S = 300
# A day: what predicts the next hour lies in the last few of them.
LOOKED_BACK = timedelta(hours=24)


def read_estate(session: Session, *, now: datetime) -> Estate:
    """Return the fleet, its vms and what they are predicted to use, as of one snapshot."""
    rows = fleet.read_rows(session)
    snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
    loads = _loads(session, now)
    hosts = {host.id: host for host in rows.hosts}
    vms = []
    for found in estate_rows.placed_vms(session):
        home = hosts.get(found.needs.vm.host_id)
        accelerator = home.inventory.accelerator if home is not None and home.inventory is not None else ""
        vms.append(_vm(found, accelerator, loads.get(found.needs.vm.id, 0)))
    return Estate.of(
        snapshot,
        vms,
        host_versions={host.id: host.version for host in rows.hosts},
        cpu_millis={host.id: host.inventory.cpus * 1000 for host in rows.hosts if host.inventory is not None},
    )


def read_rates(session: Session) -> Rates:
    """Return the fleet's own migration rates."""
    return Rates.measured([(memory_mib * MIB, seconds) for memory_mib, seconds in estate_rows.migration_samples(session)])


def _loads(session: Session, now: datetime) -> dict[str, int]:
    """Return what each vm is predicted to use in the next hour, in thousandths of a core."""
    begin = now - LOOKED_BACK
    history = estate_rows.usage_since(session, CPU_MILLIS, begin, bucket_s=BUCKET_S)
    width = int(LOOKED_BACK.total_seconds()) // BUCKET_S + 1
    samples = np.full((len(history), width), np.nan)
    for row, measured in enumerate(history.values()):
        for at, mean in measured:
            column = int((at - begin).total_seconds()) // BUCKET_S
            if 0 <= column < width:
                samples[row, column] = mean
    means = predicted(samples, step_s=BUCKET_S) if history else np.zeros(0)
    return {vm_id: round(float(mean)) for vm_id, mean in zip(history, means, strict=True)}


def _vm(found: EstateVm, accelerator: str, load_millis: int) -> VmSnapshot:
    vm = found.needs.vm
    ask = PlacementAsk(
        operation_id=f"plan-{vm.id}",
        vm_id=vm.id,
        project_id=vm.project_id,
        kind="migrate",
        to_host_id="",
        previous_host_id="",
        state="pending",
        chosen_host_id="",
        epoch=vm.epoch,
        decision_id="",
        refusal="",
        created_at=vm.created_at,
    )
    return VmSnapshot(
        vm_id=vm.id,
        name=vm.name,
        host_id=vm.host_id,
        request=placement_snapshot.request_of(ask, found.needs, accelerator=accelerator),
        power=_power(found),
        version=vm.version,
        is_protected=vm.ha == "restart",
        drain_policy=DrainPolicy(found.drain_policy),
        busy_with=found.busy_with,
        load_millis=load_millis,
    )


def _power(found: EstateVm) -> Power:
    if not found.has_compute:
        return Power.STOPPED
    return Power.RUNNING if found.needs.vm.observed_state is ObservedState.RUNNING else Power.UNKNOWN
