"""Carries out what the failover core wants: in transactions under the leader's term, by operations, by power devices, by asking.

Nothing here waits: a device or an agent answers from a thread, and its answer is an event of a later round. Each effect is "ensure"
and may come again: what is under way is not begun twice.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, mint
from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.failover.events import Event, IntentWritten, Observed, PowerAnswered, SessionOpened
from trimtab_controller.core.failover.records import NEVER_S, Evidence, VmRecord
from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity, ObservedState
from trimtab_controller.core.model import Actor, Vm
from trimtab_controller.fencing import Fencer, Power
from trimtab_controller.loops.beacons import Beacons
from trimtab_controller.loops.failover_reading import Snapshot, seen_from
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.engine import Engine
from trimtab_controller.services import fencing, recovery
from trimtab_controller.store import claims, events, failover, fence_intents, hosts, leases, vms
from trimtab_controller.store.database import Session
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import StateReason

log = structlog.get_logger(__name__)

SYSTEM = Actor(name=failover.SYSTEM)
DEVICES_AT_ONCE, AGENTS_AT_ONCE, DRIVES_AT_ONCE = 8, 8, 4
# So long after a host said that it has nothing of a vm this is taken as known.
BELIEVED_FOR_S = 60.0
DRIVEN_FOR_S = 120.0
_OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


def no_secret(_sealed: str, place: str) -> str:
    """Stands where no key is."""
    raise Conflict("secret-unreadable", f"this process has no key for the secret of {place}")


class Hands:
    """Belongs to the loop's thread; `answers` may be filled by any."""

    def __init__(
        self,
        *,
        engine: Engine,
        clock: Clock,
        fencer: Fencer,
        power_timeout_s: float,
        lease_ttl_s: float,
        open_secret: Callable[[str, str], str],
        askers: Executor | None = None,
        drivers: Executor | None = None,
    ) -> None:
        self._engine = engine
        self._db, self._agents, self._clock, self._fencer = engine.db, engine.agents, clock, fencer
        self._power_timeout_s, self._open_secret = power_timeout_s, open_secret
        self._devices = ThreadPoolExecutor(DEVICES_AT_ONCE, thread_name_prefix="fence")
        self._askers = askers or ThreadPoolExecutor(AGENTS_AT_ONCE, thread_name_prefix="failover-ask")
        self._drivers = drivers or ThreadPoolExecutor(DRIVES_AT_ONCE, thread_name_prefix="failover-drive")
        self._driving = 0
        self._counting = threading.Lock()
        self._answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._asked: set[tuple[str, str]] = set()
        self._gone: dict[tuple[str, str], float] = {}
        self.beacons = Beacons(agents=engine.agents, clock=clock, ask=self._ask, lease_ttl_s=lease_ttl_s)
        self.restarts: dict[str, str] = {}
        """Vm -> the operation that restarts it."""
        self.drives_until_s = NEVER_S
        """What was begun here is driven by the engine itself until then: failover never waits for the queue."""

    def close(self) -> None:
        self._devices.shutdown(wait=False, cancel_futures=True)
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._drivers.shutdown(wait=False, cancel_futures=True)

    def has_answers(self) -> bool:
        return not self._answers.empty()

    def drive(self, starting: int) -> None:
        """Drive what is due, with more hands the more guests are starting.

        In threads: a host that hangs as a guest is defined on it keeps one of them for many seconds, and no round of the loop, which
        would take its own lateness for a pause and give every other host a full window.
        """
        with self._counting:
            more = min(DRIVES_AT_ONCE, max(1, starting)) - self._driving
            self._driving += max(0, more)
        for _each in range(more):
            self._drivers.submit(self._drive)

    def _drive(self) -> None:
        try:
            self._engine.drive_due()
        except TrimtabError as error:
            log.warning("recoveries not driven", code=error.code, error=error.message)
        except Exception:
            log.exception("recoveries not driven")
        finally:
            with self._counting:
                self._driving -= 1

    def answered(self) -> list[Event]:
        """Return what devices and agents said since the last round."""
        found: list[Event] = []
        while not self._answers.empty():
            found.append(self._answers.get())
        for event in found:
            if isinstance(event, Observed) and event.seen.value in {"absent", "stopped"}:
                self._gone[event.vm, event.host] = self._clock.boottime_s()
        return found

    def write(self, term: int, work: Callable[[Session], Any]) -> Any:
        def fenced(session: Session) -> Any:
            leases.assert_leader(session, term)
            return work(session)

        return self._db.write(fenced)

    def carry_out(self, effect: do.Effect, term: int, seen: Snapshot) -> Sequence[Event]:
        """Begin or do what is asked; return what is known at once."""
        match effect:
            case do.EndGranting():
                if effect.host not in seen.revocations:
                    self.write(term, lambda session: leases.revoke(session, effect.host, term=term, now=self._clock.now()))
            case do.WriteIntent() | do.ProveIntent():
                return self._close_beacon(effect, term, seen)
            case do.ResumeGranting():
                self.beacons.forget(effect.host)
                self.write(term, lambda session: self._forget(session, effect.host))
            case do.PowerOff():
                self._switch_off(effect, term, seen)
            case do.Inspect():
                self.ask(effect.host, effect.vm)
            case do.Refuse():
                log.info("refused", subject=effect.subject, code=effect.code, message=effect.message)
            case do.Alarm():
                self.write(term, lambda session: self._alarm(session, effect))
            case do.SetStanding() | do.ResumeVm():
                pass  # the loop records standings with their timelines; vm.settle_move resumes what it finds paused
            case do.GoDown():
                log.info("left to the maintenance of hosts", host_id=effect.host)
            case _:
                self._begin(effect, term, seen)
        return ()

    def _close_beacon(self, effect: do.WriteIntent | do.ProveIntent, term: int, seen: Snapshot) -> Sequence[Event]:
        """A host that renews in a pool besides has a second channel, which is closed there; one without is done at once."""
        if isinstance(effect, do.ProveIntent):
            self.beacons.prove(effect.host, seen)
        elif seen.guards.get(effect.host, HostGuard()).beacon_pool_id:
            self.beacons.write(effect.host, term, seen, fenced=partial(self._while_silent, effect.host, term))
        else:
            return [IntentWritten(host=effect.host, at_s=NEVER_S)]
        return ()

    # --- operations -----------------------------------------------------------------------------------------------------------

    def _begin(self, effect: do.Effect, term: int, seen: Snapshot) -> None:
        """Accept the operation that carries the effect out. One that is refused is decided anew in the next round."""

        def work(session: Session) -> None:
            match effect:
                case do.StartVm():
                    self._recover(session, effect)
                case do.SettleMove():
                    if claims.migration_of(session, effect.vm) is not None:
                        recovery.settle_move(session, vms.get(session, effect.vm), effect.host, now=now, actor=SYSTEM)
                case do.DestroyCopy() if effect.vm in seen.stranded:
                    self._take_off(session, effect)
                case do.DestroyCopy():
                    recovery.clean_copy(session, vms.get(session, effect.vm), effect.host, kill=True, now=now, actor=SYSTEM)
                case do.RemoveLeftover():
                    recovery.clean_copy(session, vms.get(session, effect.vm), effect.host, kill=False, now=now, actor=SYSTEM)
                case do.MoveVm():
                    self._accept(session, "vm.migrate", effect.vm, {"to_host_id": effect.target})
                case do.StopVm():
                    self._accept(session, "vm.stop", effect.vm, {"force": False, "timeout_s": int(effect.timeout_s)})

        now = self._clock.now()
        try:
            self.write(term, work)
            self.drives_until_s = self._clock.boottime_s() + DRIVEN_FOR_S
        except (Conflict, NotFound) as refused:
            if isinstance(refused, Conflict) and refused.code == "not-leader":
                raise
            log.info("not begun", effect=type(effect).__name__, vm=getattr(effect, "vm", ""), code=refused.code)

    def _accept(self, session: Session, kind: str, vm_id: str, params: dict[str, Any]) -> None:
        vm = vms.get(session, vm_id)
        accept(
            session,
            kind,
            subject_id=vm.id,
            subject_name=vm.name,
            project_id=vm.project_id,
            params={"vm_id": vm.id, **params},
            actor=SYSTEM,
            now=self._clock.now(),
        )

    def _take_off(self, session: Session, effect: do.DestroyCopy) -> None:
        """Cut the guest's power at its home, which does not reach its disks; its wish stays, so that it starts elsewhere once it is gone.

        Asked once more of the row: one that runs again, or is on its way, is left alone.
        """
        vm = vms.get(session, effect.vm)
        is_paused = vm.observed_state is ObservedState.PAUSED and vm.observed_reason == StateReason.IO_ERROR.value
        is_at_home = effect.host == vm.host_id == vm.observed_host_id
        if not (is_paused and is_at_home) or claims.migration_of(session, vm.id) is not None:
            raise Conflict("vm-not-stranded", f"vm {vm.name} does not wait for its storage on {effect.host} any more")
        self._accept(session, "vm.stop", vm.id, {"force": True})

    def _recover(self, session: Session, effect: do.StartVm) -> None:
        now, vm = self._clock.now(), vms.get(session, effect.vm)
        self._check_gone(session, vm)
        home = hosts.get(session, vm.host_id)
        present = failover.open_record(session, vm.host_id)
        is_at_home = home.connectivity is HostConnectivity.UP and effect.host == vm.host_id
        because = (
            "it ended alone"
            if present is None
            else f"its host was fenced ({present.proof})"
            if present.proof
            else "its host lost it"
        )
        operation = recovery.recover(
            session, vm, because=because, now=now, actor=SYSTEM, to_host_id=vm.host_id if is_at_home else ""
        )
        self.restarts[vm.id] = operation.id
        # Its host may have come back while it waited; what was begun of its loss is ended nevertheless.
        records = {one.failover_id for one in failover.open_waits(session, vm.id)} | (
            {present.id} if present is not None else set()
        )
        for record_id in sorted(records):
            failover.write_vm(
                session, record_id, vm.id, now=now, operation_id=operation.id, state="starting", why="", ended_at=None
            )

    def _check_gone(self, session: Session, vm: Vm) -> None:
        """Refuse (Conflict) where the vm is not wished to run any more, or a holder is neither fenced nor seen without it.

        The core decided on a snapshot; this is asked of the rows that the assignment itself changes, in one transaction with it.
        """
        if vm.desired_power is not DesiredPower.RUNNING or vm.deleted_at is not None or vm.attention:
            raise Conflict("vm-not-wished", f"vm {vm.name} is not to be started by failover any more")
        row = claims.migration_of(session, vm.id)
        holders = {vm.host_id} | ({row.source_host_id, row.target_host_id} if row is not None else set())
        for host_id in holders - {""}:
            host = hosts.get(session, host_id)
            is_seen_off = vm.observed_host_id == host_id and vm.observed_state in _OFF
            was_told = self._clock.boottime_s() - self._gone.get((vm.id, host_id), NEVER_S) <= BELIEVED_FOR_S
            is_proven = host.connectivity is HostConnectivity.FENCED or is_seen_off or was_told
            if not is_proven:
                raise Conflict("holder-not-gone", f"nothing proves that {host.name} does not run vm {vm.name} any more")

    # --- power -----------------------------------------------------------------------------------------------------------------

    def _switch_off(self, effect: do.PowerOff, term: int, seen: Snapshot) -> None:
        row = next((path for path in seen.paths.get(effect.host, ()) if path.name == effect.path), None)
        if row is None:
            return
        if row.test_power == Power.OFF.value and row.test_message:
            message = f"it is not asked, since its last test is not to be believed: {row.test_message}"
            self._answers.put(
                PowerAnswered(host=effect.host, path=effect.path, number=effect.number, is_off=False, message=message)
            )
            return
        log.info("switching a host off", host_id=effect.host, path=effect.path, number=effect.number)

        def work() -> None:
            message, power = "", Power.UNKNOWN
            try:
                answer = self._fencer.switch_off(
                    fencing.opened(row, self._open_secret),
                    timeout_s=self._power_timeout_s / 2,
                    may_still=lambda: self._may_still(effect.host, term),
                )
                power, message = answer.power, answer.message
            except TrimtabError as error:
                message = error.message
            except Exception as error:
                log.exception("power device failed", host_id=effect.host, path=effect.path)
                message = type(error).__name__
            metrics.FENCE_ACTIONS.labels(power.value).inc()
            self._answers.put(
                PowerAnswered(
                    host=effect.host, path=effect.path, number=effect.number, is_off=power is Power.OFF, message=message
                )
            )

        self._devices.submit(work)

    def _may_still(self, host_id: str, term: int) -> bool:
        """Check our own lease and the host's silence once more, immediately before the power action."""
        return bool(self.write(term, lambda session: hosts.get(session, host_id).connectivity is HostConnectivity.LOST))

    # --- questions --------------------------------------------------------------------------------------------------------------

    def ask(self, host_id: str, vm_id: str) -> None:
        """Have the host say what it holds of the vm."""

        def work() -> Event:
            seen = self._agents.get_domain(host_id, vm_id)
            return Observed(vm=vm_id, host=host_id, epoch=seen.epoch, seen=seen_from(seen))

        self._ask(host_id, vm_id, work)

    def ask_for_list(self, host_id: str, boot_id: str) -> None:
        """Have a host that came back list everything that it holds of ours."""

        def work() -> Event:
            found = [one for one in self._agents.list_domains(host_id) if one.vm_id]
            return SessionOpened(
                host=host_id, boot_id=boot_id, domains=tuple((one.vm_id, one.epoch, seen_from(one)) for one in found)
            )

        self._ask(host_id, "", work)

    def _while_silent(self, host_id: str, term: int, work: Callable[[Session], None]) -> None:
        """Write while we lead and the host is silent; Conflict where either is over."""

        def checked(session: Session) -> None:
            if hosts.get(session, host_id).connectivity is HostConnectivity.UP:
                raise Conflict("host-came-back", f"{host_id} is heard from again")
            work(session)

        self.write(term, checked)

    def _ask(self, host_id: str, vm_id: str, question: Callable[[], Event | None]) -> None:
        """`vm_id`: or another word for what is asked of or about the host; the same is not asked twice at a time."""
        key = (host_id, vm_id)
        if key in self._asked:
            return
        self._asked.add(key)

        def work() -> None:
            try:
                answer = question()
                if answer is not None:
                    self._answers.put(answer)
            except TrimtabError as error:
                log.debug("host does not say", host_id=host_id, vm_id=vm_id, code=error.code)
            finally:
                self._asked.discard(key)

        self._askers.submit(work)

    # --- what is told -----------------------------------------------------------------------------------------------------------

    def record_standing(self, session: Session, effect: do.SetStanding, lines: Sequence[Evidence], *, now_s: float) -> None:
        """Record a host's standing with the lines of its timeline that were not recorded yet."""
        now = self._clock.now()
        present = failover.open_record(session, effect.host)
        told = [_line(one, now - timedelta(seconds=_age_s(one, now_s))) for one in lines]
        evidence = [*(present.evidence if present else ()), *told]
        host = hosts.get(session, effect.host)
        values: dict[str, Any] = {"evidence": evidence}
        proof = effect.proof.value if effect.proof else ""
        match effect.standing:
            case HostConnectivity.LOST:
                values |= {"state": "lost"}
            case HostConnectivity.FENCED:
                if not failover.set_fenced(session, effect.host, now=now):
                    raise Conflict("host-came-back", f"{host.name} is heard from again; it is not fenced")
                values |= {"state": "fenced", "proof": proof, "fenced_at": now}
                if present is not None:
                    metrics.FAILOVER_SECONDS.labels("fence").observe((now - present.created_at).total_seconds())
            case HostConnectivity.UP if present is not None:
                values |= {"state": "returned", "returned_at": now}
            case _:
                return
        failover.write_record(session, effect.host, failover_id=mint("fo"), now=now, **values)
        metrics.FAILOVERS.labels(str(values["state"]), proof).inc()
        kind = f"failover.{effect.standing.value}"
        self._tell(session, kind, effect.host, f"{host.name}: {effect.evidence[-1].what}")

    def record_notes(self, session: Session, host_id: str, lines: Sequence[Evidence], *, now_s: float) -> None:
        """Add lines to the timeline of a loss that is under way."""
        present, now = failover.open_record(session, host_id), self._clock.now()
        if present is not None:
            told = [_line(one, now - timedelta(seconds=_age_s(one, now_s))) for one in lines]
            failover.write_record(session, host_id, failover_id="", now=now, evidence=[*present.evidence, *told])

    def record_waiting(self, session: Session, host_id: str, vm: VmRecord) -> None:
        """Record why a vm of a lost host is not restarted yet, or will not be."""
        present, now = failover.open_record(session, host_id), self._clock.now()
        if present is None and not vm.group:
            return
        why = vm.why[:1000]
        records = {present.id} if present is not None else {one.failover_id for one in failover.open_waits(session, vm.id)}
        for record_id in sorted(records):
            failover.write_vm(session, record_id, vm.id, now=now, state="waiting", why=why, operation_id="", ended_at=None)
        vms.update(session, vm.id, problem=why)

    def _forget(self, session: Session, host_id: str) -> None:
        """Let a host that came back renew, and forget what operators said of its loss."""
        leases.lift_revocation(session, host_id)
        fence_intents.forget(session, host_id)
        said = failover.control(session)
        if host_id in said.released or host_id in said.confirmed_off:
            failover.set_control(
                session,
                now=self._clock.now(),
                released={key: value for key, value in said.released.items() if key != host_id},
                confirmed_off={key: value for key, value in said.confirmed_off.items() if key != host_id},
            )

    def _alarm(self, session: Session, effect: do.Alarm) -> None:
        if effect.code == "vm-needs-attention":
            vms.update(session, effect.subject, problem=effect.message[:1000], attention="failover")
        self._tell(session, f"alarm.{effect.code}", effect.subject, effect.message)

    def _tell(self, session: Session, kind: str, subject_id: str, message: str) -> None:
        events.append(session, kind=kind, subject_id=subject_id, actor=SYSTEM.name, message=message, now=self._clock.now())


def _age_s(line: Evidence, now_s: float) -> float:
    return max(0.0, now_s - line.at_s)


def _line(line: Evidence, at: Any) -> dict[str, str]:
    return {"at": at.isoformat(), "what": line.what, "proof": line.proof.value if line.proof else ""}
