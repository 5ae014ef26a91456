"""Drift: asks hosts what runs on them, compares with what should, shows the difference and heals what is safe to heal.

Events tell of changes within a second; this poll is the backstop for events that were lost and the only judge of what a
difference means. A host that does not answer leaves its vms as last seen, with the age of that sight.
"""

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from trimtab_controller.agents.client import AgentClient
from trimtab_controller.clock import Clock
from trimtab_controller.core.drift import RUNS_TWICE, Cure, Finding, Stray, judge
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Actor, Host, Vm
from trimtab_controller.loops.usage import Usage
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import observations, recovery
from trimtab_controller.store import drift, events, failover, fleet, hosts, leases, operations, vms
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import DomainObservation, DomainState

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:drift")
# Hosts asked at a time, and at most this many per round: 10,000 hosts are all asked within some minutes.
PARALLEL, HOSTS_PER_ROUND = 8, 200
JUDGED_PER_ROUND = 500
RESUME_PAUSE_S, RESUME_PAUSE_MAX_S = 10.0, 3600.0
_WRITES = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})


@dataclass(frozen=True, slots=True)
class _Attempt:
    """When a vm was last cured by us: how long the pause until the next time is, and when all that is forgotten."""

    pause_s: float
    next_s: float
    forgotten_s: float


class Drift:
    def __init__(self, *, db: Database, clock: Clock, agents: AgentClient, nudger: Nudger, usage: Usage | None = None) -> None:
        self._db, self._clock, self._agents, self._nudger = db, clock, agents, nudger
        self._usage = usage
        self._asked_up_to = ""
        # By host that was asked: vm -> its domain there, where that host holds nothing of it.
        self._strays: dict[str, dict[str, Stray]] = {}
        # By host that was asked: vms that live there and run without a definition.
        self._transient: dict[str, frozenset[str]] = {}
        # Until every host was asked once, a problem that a leader before us showed may still be there.
        self._has_asked_all = False
        self._attempts: dict[tuple[str, str], _Attempt] = {}

    def observe_hosts(self, term: int) -> None:
        """Ask the next hosts in line for all their domains and record what they say."""
        page = self._db.read(
            lambda session: hosts.page(
                session, limit=HOSTS_PER_ROUND, after_name=self._asked_up_to, connectivity=HostConnectivity.UP.value
            )
        )
        self._asked_up_to = page[-1].name if len(page) == HOSTS_PER_ROUND else ""
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="drift") as pool:
            list(pool.map(lambda host: self._observe(term, host), page))
        self._has_asked_all = self._has_asked_all or not self._asked_up_to
        members = self._db.read(fleet.joined_ids)
        self._strays = {host_id: found for host_id, found in self._strays.items() if host_id in members}
        self._transient = {host_id: found for host_id, found in self._transient.items() if host_id in members}

    def _observe(self, term: int, host: Host) -> None:
        asked_at = self._clock.now()
        try:
            seen = self._agents.list_domains(host.id)
        except TrimtabError as error:
            log.info("host not observed", host_id=host.id, code=error.code)
            return
        if self._usage is not None:
            self._usage.note(seen, host_id=host.id, at=asked_at)

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            observations.record_all(session, host.id, seen, asked_at, is_complete=True)

        self._db.write(work, durable=False)
        domains = {one.vm_id: one for one in seen if one.vm_id and one.state is not DomainState.ABSENT}
        if not domains:
            self._strays[host.id], self._transient[host.id] = {}, frozenset()
            return
        self._note_strays(host, domains)
        idle = [vm_id for vm_id, one in domains.items() if one.state is DomainState.STOPPED]
        for vm in self._db.read(lambda session: drift.deleted_idle(session, idle)):
            if domains[vm.id].epoch <= vm.epoch:
                self._clean(term, vm, host.id)

    def _note_strays(self, host: Host, domains: Mapping[str, DomainObservation]) -> None:
        unkept = [
            vm_id for vm_id, one in domains.items() if one.state in _WRITES and not one.is_persistent and not one.is_migrating
        ]

        def read(session: Session) -> tuple[frozenset[str], frozenset[str]]:
            return drift.strays_on(session, host.id, list(domains)), drift.settled_on(session, host.id, unkept)

        strays, self._transient[host.id] = self._db.read(read)
        self._strays[host.id] = {
            vm_id: Stray(host.name, domains[vm_id].state is not DomainState.STOPPED, host.id, domains[vm_id].epoch)
            for vm_id in strays
        }

    def judge_vms(self, term: int) -> None:
        """Show what is not as wished, clear what is again, and cure what may be: see `core.drift`."""
        strays: dict[str, list[Stray]] = defaultdict(list)
        for found in list(self._strays.values()):
            for vm_id, stray in found.items():
                strays[vm_id].append(stray)
        transient = {(host_id, vm_id) for host_id, vm_ids in list(self._transient.items()) for vm_id in vm_ids}
        also = [*strays, *(vm_id for _host_id, vm_id in transient)]

        def read(session: Session) -> tuple[tuple[drift.Suspect, ...], bool]:
            return drift.suspects(session, limit=JUDGED_PER_ROUND, also=also), failover.control(session).is_paused

        suspects, is_paused = self._db.read(read)
        for suspect in suspects:
            vm = suspect.vm
            finding = judge(
                vm,
                host_name=suspect.host_name,
                has_space=suspect.has_space,
                is_host_up=suspect.is_host_up,
                is_transient=(vm.host_id, vm.id) in transient,
                is_filling=suspect.is_filling,
                strays=strays[vm.id],
            )
            if _differs(vm, finding) and (finding or self._has_asked_all):
                self._show(term, vm, finding)
            if finding is not None:
                self._cure(term, vm, finding, is_paused=is_paused)

    def _cure(self, term: int, vm: Vm, finding: Finding, *, is_paused: bool) -> None:
        """Heal what the finding allows. While an operator holds failover, nothing that concerns where a vm is."""
        if finding.cure is Cure.RESUME and self._may_try(vm, Cure.RESUME.value):
            self._heal(term, vm, finding.cure)
        if is_paused:
            return
        for host_id in finding.leftovers:
            self._clean(term, vm, host_id)
        if finding.cure is Cure.DEFINE and self._may_try(vm, Cure.DEFINE.value):
            self._heal(term, vm, finding.cure)
            self._transient[vm.host_id] = self._transient.get(vm.host_id, frozenset()) - {vm.id}

    def _may_try(self, vm: Vm, what: str) -> bool:
        """Tell whether it is time: what fails for another reason than the one we cure fails again at once."""
        now_s = self._clock.boottime_s()
        self._attempts = {key: one for key, one in self._attempts.items() if now_s < one.forgotten_s}
        last = self._attempts.get((vm.id, what))
        if last is not None and now_s < last.next_s:
            return False
        pause_s = min(2 * last.pause_s, RESUME_PAUSE_MAX_S) if last else RESUME_PAUSE_S
        self._attempts[vm.id, what] = _Attempt(pause_s, now_s + pause_s, now_s + pause_s + RESUME_PAUSE_MAX_S)
        return True

    def _show(self, term: int, vm: Vm, finding: Finding | None) -> None:
        problem = finding.problem if finding else ""

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            if operations.live_exclusive(session, vm.id) is not None:
                return
            vms.update(session, vm.id, problem=problem[:1000], attention=_attention(vm, finding))
            if problem == vm.problem:
                return
            events.append(
                session,
                kind="vm.drift" if problem else "vm.drift_ended",
                project_id=vm.project_id,
                subject_id=vm.id,
                actor=SYSTEM.name,
                message=f"{vm.name}: {problem}" if problem else f"{vm.name} is as wished again",
                now=self._clock.now(),
            )

        self._db.write(work, durable=False)

    def _clean(self, term: int, vm: Vm, host_id: str) -> None:
        """Have what the host holds of the vm undefined, unless it runs by now; disks stay."""
        if not self._may_try(vm, f"clean {host_id}"):
            return

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            recovery.clean_copy(session, vm, host_id, kill=False, now=self._clock.now(), actor=SYSTEM)

        self._db.write(work)
        self._nudger.nudge()

    def _heal(self, term: int, vm: Vm, cure: Cure) -> None:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            # Judged on what was read a moment ago: an operator's pause may have begun and ended since, and it holds.
            if vms.get(session, vm.id).desired_power is not vm.desired_power:
                return
            accept(
                session,
                cure.value,
                subject_id=vm.id,
                subject_name=vm.name,
                project_id=vm.project_id,
                params={"vm_id": vm.id},
                actor=SYSTEM,
                now=self._clock.now(),
            )

        try:
            self._db.write(work)
        except Conflict as busy:
            if busy.code != "operation-in-progress":
                raise
            return
        self._nudger.nudge()


def _attention(vm: Vm, finding: Finding | None) -> str:
    """Return what the vm's `attention` shall be; what others wrote there stays."""
    if vm.attention not in {"", RUNS_TWICE}:
        return vm.attention
    return RUNS_TWICE if finding is not None and finding.runs_twice else ""


def _differs(vm: Vm, finding: Finding | None) -> bool:
    problem = finding.problem[:1000] if finding else ""
    return problem != vm.problem or _attention(vm, finding) != vm.attention
