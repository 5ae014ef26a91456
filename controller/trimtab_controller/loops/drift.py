"""Drift: asks hosts what runs on them, compares with what should, shows the difference and heals what is safe to heal.

Events tell of changes within a second; this poll is the backstop for events that were lost and the only judge of what a
difference means. A host that does not answer leaves its vms as last seen, with the age of that sight.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from trimtab_controller.agents.client import AgentClient
from trimtab_controller.clock import Clock
from trimtab_controller.core.drift import Cure, Finding, Stray, judge
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Actor, Host, Vm
from trimtab_controller.loops.usage import Usage
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import observations
from trimtab_controller.store import drift, events, fleet, hosts, leases, operations, vms
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import DomainState

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:drift")
# Hosts asked at a time, and at most this many per round: 10,000 hosts are all asked within some minutes.
PARALLEL, HOSTS_PER_ROUND = 8, 200
JUDGED_PER_ROUND = 500
RESUME_PAUSE_S, RESUME_PAUSE_MAX_S = 10.0, 3600.0


@dataclass(frozen=True, slots=True)
class _Resume:
    """When a vm was last resumed by us: how long the pause until the next time is, and when all that is forgotten."""

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
        # Until every host was asked once, a problem that a leader before us showed may still be there.
        self._has_asked_all = False
        self._resumes: dict[str, _Resume] = {}

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

    def _observe(self, term: int, host: Host) -> None:
        asked_at = self._clock.now()
        try:
            seen = self._agents.list_domains(host.id)
        except TrimtabError as error:
            log.info("host not observed", host_id=host.id, code=error.code)
            return
        if self._usage is not None:
            self._usage.note(seen, at=asked_at)

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            observations.record_all(session, host.id, seen, asked_at, is_complete=True)

        self._db.write(work, durable=False)
        domains = {one.vm_id: one for one in seen if one.vm_id and one.state is not DomainState.ABSENT}
        strays = self._db.read(lambda session: drift.strays_on(session, host.id, list(domains))) if domains else frozenset()
        self._strays[host.id] = {vm_id: Stray(host.name, domains[vm_id].state is not DomainState.STOPPED) for vm_id in strays}

    def judge_vms(self, term: int) -> None:
        """Show what is not as wished, clear what is again, and resume guests whose pool has room."""
        strays: dict[str, list[Stray]] = defaultdict(list)
        for found in list(self._strays.values()):
            for vm_id, stray in found.items():
                strays[vm_id].append(stray)
        suspects = self._db.read(lambda session: drift.suspects(session, limit=JUDGED_PER_ROUND, also=list(strays)))
        for vm, host_name, has_space in suspects:
            finding = judge(vm, host_name=host_name, has_space=has_space, strays=strays[vm.id])
            problem = finding.problem if finding else ""
            if problem != vm.problem and (problem or self._has_asked_all):
                self._show(term, vm, problem)
            if finding is not None and finding.cure is not Cure.NONE and self._may_resume(vm):
                self._heal(term, vm, finding)

    def _may_resume(self, vm: Vm) -> bool:
        """Tell whether it is time: a disk that fails for another reason than space pauses the guest again at once."""
        now_s = self._clock.boottime_s()
        self._resumes = {vm_id: one for vm_id, one in self._resumes.items() if now_s < one.forgotten_s}
        last = self._resumes.get(vm.id)
        if last is not None and now_s < last.next_s:
            return False
        pause_s = min(2 * last.pause_s, RESUME_PAUSE_MAX_S) if last else RESUME_PAUSE_S
        self._resumes[vm.id] = _Resume(pause_s, now_s + pause_s, now_s + pause_s + RESUME_PAUSE_MAX_S)
        return True

    def _show(self, term: int, vm: Vm, problem: str) -> None:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            if operations.live_exclusive(session, vm.id) is not None:
                return
            vms.update(session, vm.id, problem=problem[:1000])
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

    def _heal(self, term: int, vm: Vm, finding: Finding) -> None:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            accept(
                session,
                f"vm.{finding.cure.value}",
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
