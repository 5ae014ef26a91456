"""The leader's failover loop: observe → the pure core decides → enqueue. Driven by the engine itself; Redis may be down.

Each round reads what gateways wrote of the hosts' silence, what gateways acknowledged, what power devices answered and what
operators said; feeds them to `core.failover` as events; and carries out the effects, each in a transaction under the leader's term.
Nothing that matters lives here alone: a new leader rebuilds the core's state from SQL and gives everybody a full window.

A lease is counted from its last granted renewal as its gateway tells the age of it, else from when we see that granting has ended.
"""

import queue
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from trimtab_controller.clock import Clock, mint
from trimtab_controller.core.failover import FailoverSettings, steps
from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.failover.events import (
    ConfirmedOff,
    Event,
    GrantingEnded,
    IntentWritten,
    LeaderStarted,
    PauseAsked,
    PowerAnswered,
    ReleaseAsked,
    Renewed,
    SessionOpened,
    StartEnded,
    Tick,
)
from trimtab_controller.core.failover.records import (
    NEVER_S,
    Desired,
    Evidence,
    Holder,
    HostRecord,
    Phase,
    Proof,
    State,
    VmRecord,
)
from trimtab_controller.core.lifecycle import ENDED_STATES, HostConnectivity, OperationState
from trimtab_controller.core.model import Actor, Host
from trimtab_controller.core.model.failover import FailoverControl, FailoverVmRow, FencePathRow
from trimtab_controller.fencing import FencePath, Fencer, Power
from trimtab_controller.operations.engine import Engine
from trimtab_controller.services import recovery
from trimtab_controller.store import events, failover, host_guards, hosts, leases, operations, vms
from trimtab_controller.store.database import Session
from trimtab_controller.store.failover import KeptVm
from trimtab_controller.store.host_guards import HostGuard
from trimtab_controller.store.leases import BeatWatch, Lease, Revocation

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:failover")
DEVICES_AT_ONCE = 8
# Gateways judge silence themselves, with windows of their own; what they wrote is believed after so long here.
BELIEVED = FailoverSettings(suspect_after_s=1.5, lost_after_s=2.5)
LEADERS_WINDOW_S = 10.0
"""A new leader judges nobody for so long, whatever the last one wrote."""
_SILENT = frozenset({HostConnectivity.SUSPECT, HostConnectivity.LOST, HostConnectivity.FENCED})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """One round's view of the store, as of one snapshot."""

    hosts: Mapping[str, Host]
    paths: Mapping[str, tuple[FencePathRow, ...]]
    vms: Mapping[str, KeptVm]
    starts: tuple[FailoverVmRow, ...]
    operations: Mapping[str, OperationState]
    errors: Mapping[str, str]
    revocations: Mapping[str, Revocation]
    gateways: tuple[Lease, ...]
    control: FailoverControl
    guards: Mapping[str, HostGuard]
    session_gateways: Mapping[str, str]
    """Host -> the gateway of its newest session."""


def _read(session: Session) -> _Seen:
    paths: dict[str, tuple[FencePathRow, ...]] = {}
    for path in failover.fence_paths(session):
        paths[path.host_id] = (*paths.get(path.host_id, ()), path)
    starts = failover.open_starts(session)
    ended = [operations.get(session, one.operation_id) for one in starts if one.operation_id]
    return _Seen(
        hosts={host.id: host for host in hosts.live(session)},
        paths=paths,
        vms={vm.id: vm for vm in failover.kept_vms(session)},
        starts=starts,
        operations={one.id: one.state for one in ended},
        errors={one.id: one.error.message for one in ended if one.error is not None},
        revocations={one.host_id: one for one in leases.revocations(session)},
        gateways=leases.named(session, leases.GATEWAY_PREFIX),
        control=failover.control(session),
        guards=host_guards.read_all(session),
        session_gateways=hosts.session_gateways(session),
    )


class FailoverLoop:
    """Belongs to one thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        clock: Clock,
        fencer: Fencer,
        settings: FailoverSettings = BELIEVED,
        window_s: float = LEADERS_WINDOW_S,
    ) -> None:
        self._engine, self._db, self._clock, self._fencer = engine, engine.db, clock, fencer
        self._settings, self._window_s = settings, window_s
        self._term = 0
        self._state = State(settings=settings)
        self._watch = BeatWatch()
        self._answers: queue.SimpleQueue[PowerAnswered] = queue.SimpleQueue()
        self._devices = ThreadPoolExecutor(DEVICES_AT_ONCE, thread_name_prefix="fence")
        self._rng = random.Random()

    @property
    def state(self) -> State:
        return self._state

    def run(self, term: int) -> None:
        """One round; about once a second, while this process leads under `term`."""
        seen = self._db.read(_read)
        if term != self._term:
            self._begin(term, seen)
        self._feed((*self._observe(seen), *self._answered(), Tick()), term, seen)
        self._note_frozen(term, seen.control)
        if any(vm.phase is Phase.STARTING for vm in self._state.vms.values()):
            # Recovery never waits for the queue: the engine drives what is due itself.
            self._engine.drive_due()

    def close(self) -> None:
        self._devices.shutdown(wait=False, cancel_futures=True)

    # --- what there is -----------------------------------------------------------------------------------------------------------

    def _begin(self, term: int, seen: _Seen) -> None:
        """Rebuild the state from what earlier leaders made durable, and give everybody a full window."""
        self._term = term
        known = {host_id: self._record(host, seen) for host_id, host in seen.hosts.items()}
        self._state = State(settings=self._settings, hosts=known, is_paused=seen.control.is_paused)
        self._feed([LeaderStarted()], term, seen)
        now = self._clock.boottime_s()
        # What hosts hold was recorded by the gateways when their sessions opened.
        listed = {host_id: replace(host, has_listed=True) for host_id, host in self._state.hosts.items()}
        self._state = replace(self._state, hosts=listed, judging_from_s=now + self._window_s)

    def _record(self, host: Host, seen: _Seen) -> HostRecord:
        row = self._db.read(lambda session: failover.open_record(session, host.id))
        evidence = tuple(
            Evidence(at_s=0.0, what=str(line["what"]), proof=Proof(line["proof"]) if line.get("proof") else None)
            for line in (row.evidence if row else ())
        )
        guard = seen.guards.get(host.id, HostGuard())
        return HostRecord(
            id=host.id,
            standing=host.connectivity,
            boot_id=host.boot_id,
            power_paths=tuple(path.name for path in seen.paths.get(host.id, ())),
            was_armed_at_loss=guard.is_armed,
            is_armed=guard.is_armed,
            kill_s=guard.kill_ms / 1000,
            evidence=evidence,
            proof=Proof(row.proof) if row and row.proof else None,
            is_cordoned=host.is_cordoned,
            has_listed=True,
        )

    def _observe(self, seen: _Seen) -> list[Event]:
        """Return what changed in the world since the last round, as events."""
        now = self._clock.boottime_s()
        self._take_members(seen)
        found: list[Event] = []
        for host_id, host in seen.hosts.items():
            record, guard = self._state.hosts[host_id], seen.guards.get(host_id, HostGuard())
            match host.connectivity:
                case HostConnectivity.UP:
                    if record.standing in {HostConnectivity.LOST, HostConnectivity.FENCED}:
                        found.append(SessionOpened(host=host_id, boot_id=host.boot_id, domains=()))
                    found.append(
                        Renewed(
                            host=host_id, at_s=now, boot_id=host.boot_id, is_armed=guard.is_armed, kill_s=guard.kill_ms / 1000
                        )
                    )
                case HostConnectivity.SUSPECT:
                    found.append(
                        Renewed(
                            host=host_id,
                            at_s=now - self._settings.suspect_after_s - 0.1,
                            boot_id=host.boot_id,
                            is_armed=guard.is_armed,
                            kill_s=guard.kill_ms / 1000,
                        )
                    )
            if record.ends_granting_since_s is not None and not record.granting_ended and self._has_granting_ended(host_id, seen):
                found.append(GrantingEnded(host=host_id, handled_s=self._count_from(host_id, seen)))
        found += [ReleaseAsked(host=host_id) for host_id in seen.control.released if host_id in self._state.hosts]
        if seen.control.is_paused != self._state.is_paused:
            found.append(PauseAsked(is_on=seen.control.is_paused))
        for host_id, words in seen.control.confirmed_off.items():
            known = self._state.hosts.get(host_id)
            if known is not None and known.standing in {HostConnectivity.SUSPECT, HostConnectivity.LOST}:
                found.append(ConfirmedOff(host=host_id, by=str(words["by"]), reason=str(words["reason"])))
        return found + self._ended(seen)

    def _take_members(self, seen: _Seen) -> None:
        """Add hosts and vms that came, drop those that went, refresh what operators configured."""
        known = {host_id: self._state.hosts.get(host_id) or self._record(host, seen) for host_id, host in seen.hosts.items()}
        for host_id, host in seen.hosts.items():
            paths = tuple(path.name for path in seen.paths.get(host_id, ()))
            known[host_id] = replace(known[host_id], power_paths=paths, is_cordoned=host.is_cordoned, has_listed=True)
        kept = {vm_id: vm for vm_id, vm in self._state.vms.items() if vm_id in seen.vms}
        for vm_id, row in seen.vms.items():
            if vm_id not in kept:
                kept[vm_id] = self._vm(row, seen)
            kept[vm_id] = replace(kept[vm_id], desired=_desired(row), priority=row.priority)
        self._state = replace(self._state, hosts=known, vms=kept)

    def _vm(self, row: KeptVm, seen: _Seen) -> VmRecord:
        """Return the vm as held by its home and the target of its migration, or as its recovery left it."""
        vm = VmRecord(id=row.id, host=row.host_id, epoch=row.epoch, is_local=row.has_local_disk, priority=row.priority)
        start = next((one for one in seen.starts if one.vm_id == row.id), None)
        if start is not None:
            holder = Holder(host=row.host_id, epoch=row.epoch)
            return replace(vm, phase=Phase.STARTING, holders=(holder,), since_s=self._clock.boottime_s())
        holders = [Holder(host=row.host_id, epoch=row.epoch)]
        if row.migrating_to and row.migrating_to != row.host_id:
            holders.append(Holder(host=row.migrating_to, epoch=row.epoch + 1))
        home = seen.hosts.get(row.host_id)
        if home is not None and home.connectivity is HostConnectivity.FENCED and len(holders) == 1 and not row.has_local_disk:
            # The last leader fenced its host and died before it began the recovery.
            return replace(vm, phase=Phase.RECOVERING, why="waits for a home: its host was fenced")
        return replace(vm, holders=tuple(holders), phase=Phase.MOVING if len(holders) > 1 else Phase.SETTLED)

    def _has_granting_ended(self, host_id: str, seen: _Seen) -> bool:
        """Tell whether each gateway has acknowledged the revocation, or let its own lease end before our eyes."""
        revocation = seen.revocations.get(host_id)
        if revocation is None:
            return False
        now = self._clock.boottime_s()
        for gateway in seen.gateways:
            name = gateway.name.removeprefix(leases.GATEWAY_PREFIX)
            if not self._watch.is_expired(gateway, now) and name not in revocation.acknowledgements:
                return False
        return True

    def _count_from(self, host_id: str, seen: _Seen) -> float:
        """Return when the host's last renewal was granted, never too early; called once nobody grants to it any more.

        What this loop noted before is only when it *saw* the host up, seconds after its last renewal: it is forgotten. A gateway
        says how long ago it granted before it acknowledged, and we see that later still. Where the gateway of the host's newest
        session did not say it (it died, or gave its row up), the lease is counted from now.
        """
        now, revocation = self._clock.boottime_s(), seen.revocations[host_id]
        said = {name: ago_ms for name, ago_ms in revocation.acknowledgements.items() if ago_ms >= 0}
        if said.get(seen.session_gateways.get(host_id, "")) is None:
            return now
        # Their clock may be slow by rho; the wait's own allowance covers ours.
        handled_s = now - min(said.values()) / 1000 * (1 - self._settings.rate_error)
        record = self._state.hosts[host_id]
        self._state = replace(self._state, hosts={**self._state.hosts, host_id: replace(record, handled_s=NEVER_S)})
        return handled_s

    def _ended(self, seen: _Seen) -> list[Event]:
        """Return the ends of recoveries, from their operations."""
        found: list[Event] = []
        for start in seen.starts:
            state, vm = seen.operations.get(start.operation_id), self._state.vms.get(start.vm_id)
            if state is None or state not in ENDED_STATES or vm is None or vm.phase is not Phase.STARTING:
                continue
            why = seen.errors.get(start.operation_id, "")
            ended = StartEnded(
                vm=vm.id, host=vm.host, epoch=vm.epoch, is_running=state is OperationState.DONE, why=why or state.value
            )
            found.append(ended)
        return found

    def _answered(self) -> list[Event]:
        found: list[Event] = []
        while not self._answers.empty():
            found.append(self._answers.get())
        return found

    # --- what is done ------------------------------------------------------------------------------------------------------------

    def _feed(self, happened: Sequence[Event], term: int, seen: _Seen) -> None:
        self._state, effects = steps(self._state, happened, self._clock.boottime_s())
        for ended in [one for one in happened if isinstance(one, StartEnded)]:
            self._write(term, partial(self._record_end, event=ended))
        for effect in effects:
            self._carry_out(effect, term, seen)

    def _write(self, term: int, work: Callable[[Session], Any]) -> None:
        def fenced(session: Session) -> None:
            leases.assert_leader(session, term)
            work(session)

        self._db.write(fenced)

    def _carry_out(self, effect: do.Effect, term: int, seen: _Seen) -> None:
        match effect:
            case do.SetStanding():
                self._write(term, lambda session: self._record_standing(session, effect))
            case do.EndGranting():
                if effect.host not in seen.revocations:
                    self._write(term, lambda session: self._revoke(session, effect.host, term))
            case do.WriteIntent():
                # A host without a beacon has no second channel to close. Of one that has one nothing follows from its lease: whoever
                # counts on it must have written the intent, and nothing here writes one yet.
                if not seen.guards.get(effect.host, HostGuard()).beacon_pool_id:
                    self._feed([IntentWritten(host=effect.host, at_s=NEVER_S)], term, seen)
            case do.ResumeGranting():
                self._write(term, lambda session: self._forget(session, effect.host))
            case do.PowerOff():
                self._switch_off(effect, term, seen)
            case do.StartVm():
                self._write(term, lambda session: self._recover(session, effect))
            case do.Alarm():
                self._write(term, lambda session: self._alarm(session, effect))
            case do.Refuse():
                log.info("refused", subject=effect.subject, code=effect.code, message=effect.message)
            case _:
                # Moves, stops and copies of live hosts are the sagas' own until drains and moves come through here.
                log.info("left to an operator", effect=type(effect).__name__, vm=getattr(effect, "vm", ""))

    def _record_standing(self, session: Session, effect: do.SetStanding) -> None:
        now = self._clock.now()
        present = failover.open_record(session, effect.host)
        old = list(present.evidence) if present else []
        lines = [
            {"at": now.isoformat(), "what": one.what, "proof": one.proof.value if one.proof else ""}
            for one in effect.evidence[-1:]
        ]
        host = hosts.get(session, effect.host)
        match effect.standing:
            case HostConnectivity.LOST:
                failover.write_record(
                    session, effect.host, failover_id=mint("fo"), now=now, state="lost", evidence=[*old, *lines]
                )
            case HostConnectivity.FENCED:
                proof = effect.proof.value if effect.proof else ""
                failover.set_fenced(session, effect.host, now=now)
                failover.write_record(
                    session,
                    effect.host,
                    failover_id=mint("fo"),
                    now=now,
                    state="fenced",
                    proof=proof,
                    evidence=[*old, *lines],
                    fenced_at=now,
                )
            case HostConnectivity.UP if present is not None:
                failover.write_record(
                    session,
                    effect.host,
                    failover_id=present.id,
                    now=now,
                    state="returned",
                    evidence=[*old, *lines],
                    returned_at=now,
                )
            case _:
                return
        kind = f"failover.{effect.standing.value}"
        self._tell(session, kind, effect.host, f"{host.name}: {effect.evidence[-1].what}")

    def _revoke(self, session: Session, host_id: str, term: int) -> None:
        leases.revoke(session, host_id, term=term, now=self._clock.now())

    def _forget(self, session: Session, host_id: str) -> None:
        """Let a host that came back renew, and forget what operators said of its loss."""
        leases.lift_revocation(session, host_id)
        said = failover.control(session)
        if host_id in said.released or host_id in said.confirmed_off:
            failover.set_control(
                session,
                now=self._clock.now(),
                released={key: value for key, value in said.released.items() if key != host_id},
                confirmed_off={key: value for key, value in said.confirmed_off.items() if key != host_id},
            )

    def _switch_off(self, effect: do.PowerOff, term: int, seen: _Seen) -> None:
        row = next((path for path in seen.paths.get(effect.host, ()) if path.name == effect.path), None)
        if row is None:
            return
        path = FencePath(name=row.name, agent=row.agent, options=row.options, secret_file=row.secret_file)
        log.info("switching a host off", host_id=effect.host, path=effect.path, number=effect.number)

        def work() -> None:
            message = ""
            is_off = False
            try:
                answer = self._fencer.switch_off(
                    path, timeout_s=self._settings.power_timeout_s / 2, may_still=lambda: self._may_still(effect.host, term)
                )
                is_off, message = answer.power is Power.OFF, answer.message
            except Exception as error:
                log.exception("power device failed", host_id=effect.host, path=effect.path)
                message = type(error).__name__
            self._answers.put(
                PowerAnswered(host=effect.host, path=effect.path, number=effect.number, is_off=is_off, message=message)
            )

        self._devices.submit(work)

    def _may_still(self, host_id: str, term: int) -> bool:
        """Check our own lease and the host's silence once more, immediately before the power action."""

        def work(session: Session) -> bool:
            leases.assert_leader(session, term)
            return hosts.get(session, host_id).connectivity is HostConnectivity.LOST

        return self._db.write(work)

    def _recover(self, session: Session, effect: do.StartVm) -> None:
        now, vm = self._clock.now(), vms.get(session, effect.vm)
        host_id = vm.host_id
        present = failover.open_record(session, host_id)
        because = f"its host was fenced ({present.proof})" if present and present.proof else "its host lost it"
        operation = recovery.recover(session, vm, because=because, now=now, actor=SYSTEM)
        if present is not None:
            failover.write_vm(
                session, present.id, vm.id, now=now, operation_id=operation.id, state="starting", why="", ended_at=None
            )

    def _record_end(self, session: Session, *, event: StartEnded) -> None:
        for row in failover.open_starts(session):
            if row.vm_id == event.vm:
                failover.write_vm(
                    session,
                    row.failover_id,
                    row.vm_id,
                    now=self._clock.now(),
                    state="running" if event.is_running else "failed",
                    why=event.why[:1000] if not event.is_running else "",
                    ended_at=self._clock.now(),
                )

    def _alarm(self, session: Session, effect: do.Alarm) -> None:
        self._tell(session, f"alarm.{effect.code}", effect.subject, effect.message)

    def _note_frozen(self, term: int, control: FailoverControl) -> None:
        if control.frozen != self._state.frozen[:500]:
            frozen = self._state.frozen[:500]
            self._write(term, lambda session: failover.set_control(session, now=self._clock.now(), frozen=frozen))

    def _tell(self, session: Session, kind: str, subject_id: str, message: str) -> None:
        events.append(session, kind=kind, subject_id=subject_id, actor=SYSTEM.name, message=message, now=self._clock.now())


def _desired(row: KeptVm) -> Desired:
    if row.ha != "restart":
        return Desired.IGNORED
    return Desired.RUNNING if row.desired_power == "running" else Desired.DISABLED
