"""The leader's gauges: hosts by connectivity, vms by observed state, the fleet's capacity, live operations."""

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.lifecycle import LIVE_STATES, HostConnectivity, ObservedState, OperationState
from trimtab_controller.store import figures
from trimtab_controller.store.database import Database

MIB = 1 << 20


class FleetFigures:
    def __init__(self, *, db: Database, clock: Clock) -> None:
        self._db, self._clock = db, clock

    def run(self, _term: int) -> None:
        """Count and set every gauge, zeros included, so that a figure that fell to nothing is seen to have."""
        seen = self._db.read(lambda session: figures.read(session, self._clock.now()))
        for connectivity in HostConnectivity:
            metrics.HOSTS.labels(connectivity.value).set(seen.hosts.get(connectivity.value, 0))
        for state in ObservedState:
            metrics.VMS.labels(state.value).set(seen.vms.get(state.value, 0))
        for live in sorted(LIVE_STATES | {OperationState.NEEDS_ATTENTION}):
            metrics.OPERATIONS_LIVE.labels(live.value).set(seen.operations.get(live.value, 0))
        metrics.OPERATIONS_DUE.set(seen.operations_due)
        for figure, count in seen.vcpus.items():
            metrics.FLEET_VCPUS.labels(figure).set(count)
        for figure, mib in seen.memory_mib.items():
            metrics.FLEET_MEMORY_BYTES.labels(figure).set(mib * MIB)
