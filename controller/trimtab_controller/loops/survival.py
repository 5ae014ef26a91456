"""Keeps the failover proof and the capacity gauges along with the fleet."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.doctor.model import Finding
from trimtab_controller.core.planning.capacity import figures
from trimtab_controller.core.planning.domains import HOST, POOL, domains_of
from trimtab_controller.core.planning.estate import Estate
from trimtab_controller.core.planning.proof import FailoverProof
from trimtab_controller.services import doctor
from trimtab_controller.services.survival import USUAL_LABELS
from trimtab_controller.store.database import Database

MIB = 1 << 20
# A label of every domain would be unbounded; its kind is not. Other labels count where a vm group names them as domains.
KINDS = (HOST, POOL, *USUAL_LABELS)


class Survival:
    def __init__(self, *, db: Database, clock: Clock, host_states: Callable[[], Mapping[str, Mapping[str, Any]]] = dict) -> None:
        """`host_states`: what the gateways last heard of each host."""
        self._db, self._clock, self._host_states = db, clock, host_states
        self._proof: FailoverProof | None = None
        self._told: set[str] = set()
        """Every kind that ever had a gauge: one that is no domain any more is told as zero."""

    def run(self, _term: int) -> None:
        """Bring the proof to the fleet as it is; set every gauge, zeros included."""
        now, states = self._clock.now(), self._host_states()
        patient = self._db.read(lambda session: doctor.read(session, now=now, host_states=states))
        estate = patient.estate
        began_s = self._clock.boottime_s()
        kinds = _kinds(estate)
        if self._proof is None:
            self._proof = FailoverProof(estate, domains_of(estate, kinds))
        else:
            estate = estate.reusing(self._proof.estate)
            self._proof.update(estate, domains_of(estate, kinds))
        metrics.FAILOVER_PROOF_SECONDS.observe(self._clock.boottime_s() - began_s)
        results = self._proof.results()
        counted = Counter((one.domain.kind, one.is_covered) for one in results)
        self._told.update(kinds)
        for kind in sorted(self._told):
            for is_covered in (True, False):
                metrics.FAILOVER_DOMAINS.labels(kind, str(is_covered).lower()).set(counted[kind, is_covered])
            lost = {vm_id for one in results if one.domain.kind == kind for vm_id in one.uncovered}
            metrics.FAILOVER_UNCOVERED.labels(kind).set(len(lost))
        for fleet in figures(estate):
            metrics.FREE_VCPUS.labels("usable").set(fleet.vcpus_free - fleet.stranded_vcpus)
            metrics.FREE_VCPUS.labels("stranded").set(fleet.stranded_vcpus)
            metrics.FREE_MEMORY_BYTES.labels("usable").set((fleet.memory_free_mib - fleet.stranded_memory_mib) * MIB)
            metrics.FREE_MEMORY_BYTES.labels("stranded").set(fleet.stranded_memory_mib * MIB)
        self._tell_findings(doctor.diagnose_with(patient, self._proof))

    def _tell_findings(self, findings: Iterable[Finding]) -> None:
        """Set a gauge for each kind found; one that was cured goes away."""
        metrics.DOCTOR_FINDINGS.clear()
        for (severity, kind), count in doctor.counted(findings).items():
            metrics.DOCTOR_FINDINGS.labels(severity, kind).set(count)


def _kinds(estate: Estate) -> tuple[str, ...]:
    """Return the kinds of failure domains: the usual ones, and every label by which a vm group keeps its members apart or together."""
    groups = (vm.request.group for vm in estate.vms.values() if vm.request.group is not None)
    named = {rule.domain for group in groups for rule in group.rules}
    return (*KINDS, *sorted(named - set(KINDS)))
