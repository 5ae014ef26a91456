"""The leader's failover loop: observe → the pure core decides → enqueue. Driven by the engine itself; Redis may be down.

Each round reads what gateways wrote of the hosts' silence, what gateways acknowledged, what power devices and agents answered and
what operators said; feeds them to `core.failover` as events; and has `Hands` carry out the effects, each in a transaction under the
leader's term. Nothing that matters lives here alone: a new leader rebuilds the core's state from SQL and gives everybody a full window.

A lease is counted from its last granted renewal as its gateway tells the age of it, else from when we see that granting has ended.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.failover import FailoverSettings, steps
from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.failover.detection import LIVES_BY_BEACON
from trimtab_controller.core.failover.events import (
    ConfirmedOff,
    Event,
    GrantingEnded,
    LeaderStarted,
    MarkedCorrupt,
    Observed,
    PauseAsked,
    ReleaseAsked,
    Renewed,
    SessionOpened,
    StartEnded,
    Tick,
)
from trimtab_controller.core.failover.records import NEVER_S, Holder, Phase, State, VmRecord
from trimtab_controller.core.host_troubles import TroubleKind
from trimtab_controller.core.lifecycle import ENDED_STATES, HostConnectivity, OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.fencing import Fencer
from trimtab_controller.loops import failover_reading as reading
from trimtab_controller.loops.failover_effects import Hands, no_secret
from trimtab_controller.loops.failover_reading import Snapshot
from trimtab_controller.loops.host_troubles import Troubles
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import Engine
from trimtab_controller.store import failover, leases
from trimtab_controller.store.database import Session
from trimtab_controller.store.failover import ON_PURPOSE, KeptVm
from trimtab_controller.store.host_guards import HostGuard
from trimtab_controller.store.leases import BeatWatch
from trimtab_protos.errors import Conflict

log = structlog.get_logger(__name__)

# Gateways judge silence themselves, with windows of their own; what they wrote is believed after so long here.
BELIEVED = FailoverSettings(suspect_after_s=1.5, lost_after_s=2.5)
LEADERS_WINDOW_S = 10.0
"""A new leader judges nobody for so long, whatever the last one wrote."""
WATCHED_S = 120.0
"""So long the vms that a returning host listed are looked after: their leftovers there go once they are seen running at home."""
WHY_EVERY_S = 5.0
URGENT_FOR_S = 60.0
"""So long after a loss no round is waited for longer than need be; a host that cannot be proven off is not looked at for ever."""
_AWAY = frozenset({HostConnectivity.LOST, HostConnectivity.FENCED})
_SILENT = frozenset({HostConnectivity.SUSPECT, HostConnectivity.LOST})
_OFF = frozenset({"stopped", "absent", "crashed"})


class FailoverLoop:
    """Belongs to one thread. `open_secret`: sealed secret of a power device, its place -> secret."""

    def __init__(
        self,
        *,
        engine: Engine,
        clock: Clock,
        fencer: Fencer,
        settings: FailoverSettings = BELIEVED,
        window_s: float = LEADERS_WINDOW_S,
        open_secret: Callable[[str, str], str] = no_secret,
        nudger: Nudger | None = None,
        askers: Executor | None = None,
        drivers: Executor | None = None,
    ) -> None:
        self._db, self._clock, self._nudger = engine.db, clock, nudger
        self._settings, self._window_s = settings, window_s
        self._hands = Hands(
            engine=engine,
            clock=clock,
            fencer=fencer,
            power_timeout_s=settings.power_timeout_s,
            lease_ttl_s=settings.lease_ttl_s,
            open_secret=open_secret,
            askers=askers,
            drivers=drivers,
        )
        self._term = 0
        self._state = State(settings=settings)
        self._watch = BeatWatch()
        self._troubles = Troubles(clock)
        # Lines of each host's timeline that are recorded already.
        self._told: dict[str, int] = {}
        # Vm -> when and with which reason it was told to wait.
        self._told_why: dict[str, tuple[float, str]] = {}
        # Vms that hosts listed lately, until when.
        self._watched: dict[str, float] = {}

    @property
    def state(self) -> State:
        return self._state

    def run(self, term: int) -> None:
        """One round; about once a second, while this process leads under `term`."""
        answers = self._hands.answered()
        now = self._clock.boottime_s()
        for opened in [one for one in answers if isinstance(one, SessionOpened)]:
            self._watched |= {vm_id: now + WATCHED_S for vm_id, _epoch, _seen in opened.domains}
        seen = self._read()
        if term != self._term:
            self._begin(term, seen)
        # Not only once a host is lost: a gateway that died long ago would hold that host's recovery up by its whole lease.
        self._watch.look(seen.gateways, now)
        self._feed((*self._observe(seen), *answers, Tick()), term, seen)
        self._note_frozen(term, seen)
        self._note_waiting(term, seen)
        self._troubles.tell(seen.troubles, seen.hosts, partial(self._hands.write, term))
        self._measure()
        starting = sum(vm.phase is Phase.STARTING for vm in self._state.vms.values())
        if starting or now < self._hands.drives_until_s:
            # Recovery never waits for the queue: the engine drives what is due itself.
            self._hands.drive(starting)

    def is_urgent(self) -> bool:
        """Tell whether the next round should not wait for its second: somebody answered, or a host is lost and not proven off yet."""
        now = self._clock.boottime_s()
        return self._hands.has_answers() or any(
            host.standing is HostConnectivity.LOST and now - host.since_s < URGENT_FOR_S for host in self._state.hosts.values()
        )

    def close(self) -> None:
        self._hands.close()

    # --- what there is -----------------------------------------------------------------------------------------------------------

    def _read(self) -> Snapshot:
        now = self._clock.boottime_s()
        left = {vm_id for host in self._state.hosts.values() for vm_id in host.leftovers}
        self._watched = {vm_id: until for vm_id, until in self._watched.items() if until > now or vm_id in left}
        wanted = frozenset(self._hands.restarts.values())

        def work(session: Session) -> Snapshot:
            troubles = self._troubles.read(session)
            return reading.read(session, also=tuple(self._watched), operation_ids=wanted, troubles=troubles)

        return self._db.read(work)

    def _begin(self, term: int, seen: Snapshot) -> None:
        """Rebuild the state from what earlier leaders made durable, and give everybody a full window."""
        self._term = term
        self._told_why.clear()
        self._db.read(self._troubles.begin)
        self._hands.restarts = {vm_id: one.id for vm_id, one in seen.live.items() if one.kind == reading.RESTART}
        known = {host_id: reading.host_record(host, seen) for host_id, host in seen.hosts.items()}
        self._told = {host_id: len(record.evidence) for host_id, record in known.items()}
        self._state = State(settings=self._settings, hosts=known, is_paused=seen.control.is_paused)
        self._feed([LeaderStarted()], term, seen)
        now = self._clock.boottime_s()
        # What hosts hold was recorded by the gateways when their sessions opened.
        listed = {host_id: replace(host, has_listed=True) for host_id, host in self._state.hosts.items()}
        self._state = replace(self._state, hosts=listed, judging_from_s=now + self._window_s)

    def _observe(self, seen: Snapshot) -> list[Event]:
        """Return what changed in the world since the last round, as events."""
        self._take_members(seen)
        found = self._heard(seen)
        found += [ReleaseAsked(host=host_id) for host_id in seen.control.released if host_id in self._state.hosts]
        if seen.control.is_paused != self._state.is_paused:
            found.append(PauseAsked(is_on=seen.control.is_paused))
        for host_id, words in seen.control.confirmed_off.items():
            known = self._state.hosts.get(host_id)
            if known is not None and known.standing in {HostConnectivity.SUSPECT, HostConnectivity.LOST}:
                found.append(ConfirmedOff(host=host_id, by=str(words["by"]), reason=str(words["reason"])))
        return found + self._ended(seen) + self._ended_alone(seen)

    def _heard(self, seen: Snapshot) -> list[Event]:
        now, beacons = self._clock.boottime_s(), self._hands.beacons
        found: list[Event] = []
        silent = [
            host_id
            for host_id, host in seen.hosts.items()
            if host.connectivity in _SILENT and seen.guards.get(host_id, HostGuard()).beacon_pool_id
        ]
        beacons.observe(seen)
        beacons.watch(seen, silent)
        for host_id, host in seen.hosts.items():
            record, guard = self._state.hosts[host_id], seen.guards.get(host_id, HostGuard())
            if host.connectivity is HostConnectivity.UP and record.standing in _AWAY:
                # It comes back with what it holds, or not at all: nothing is concluded from a list that we have not seen.
                self._hands.ask_for_list(host_id, host.boot_id)
            silent_s = {HostConnectivity.UP: 0.0, HostConnectivity.SUSPECT: self._settings.suspect_after_s + 0.1}
            lives_by_beacon = record.ends_granting_since_s is None and beacons.is_alive(host_id)
            if (
                host.connectivity is HostConnectivity.LOST
                and record.ends_granting_since_s is None
                and beacons.is_undecided(host_id)
            ):
                # What its beacon says is not known yet.
                silent_s[HostConnectivity.LOST] = silent_s[HostConnectivity.SUSPECT]
            if host.connectivity in silent_s or lives_by_beacon:
                found.append(
                    Renewed(
                        host=host_id,
                        at_s=now if lives_by_beacon else now - silent_s[host.connectivity],
                        is_beacon=lives_by_beacon,
                        boot_id=host.boot_id,
                        is_armed=guard.is_armed,
                        kill_s=guard.kill_ms / 1000,
                        has_uplink=not seen.lost(host_id, TroubleKind.NETWORK),
                        has_storage=not (lost_pools := seen.lost(host_id, TroubleKind.STORAGE)),
                        lost_pools=lost_pools,
                    )
                )
            if record.ends_granting_since_s is not None and not record.granting_ended and self._has_granting_ended(host_id, seen):
                found.append(GrantingEnded(host=host_id, handled_s=self._count_from(host_id, seen)))
        return found

    def _take_members(self, seen: Snapshot) -> None:
        """Add hosts and vms that came, drop those that went, refresh what operators and owners changed."""
        now = self._clock.boottime_s()
        hosts = {}
        for host_id, host in seen.hosts.items():
            record = self._state.hosts.get(host_id) or reading.host_record(host, seen)
            paths = tuple(path.name for path in seen.paths.get(host_id, ()))
            has_beacon = bool(seen.guards.get(host_id, HostGuard()).beacon_pool_id)
            # One that tells, silent as it is, that it renews there no more may have done so a moment before.
            has_beacon |= record.has_beacon and record.ends_granting_since_s is not None
            if has_beacon != record.has_beacon:
                record = replace(record, has_beacon=has_beacon, intent_is_proven=False)
            if (record.power_paths, record.is_cordoned, record.has_listed) != (paths, host.is_cordoned, True):
                record = replace(record, power_paths=paths, is_cordoned=host.is_cordoned, has_listed=True)
            hosts[host_id] = record
        vms = {}
        for vm_id, row in seen.vms.items():
            known = self._state.vms.get(vm_id)
            vm = reading.vm_record(row, seen, now_s=now) if known is None else _refreshed(known, row, seen, now)
            # Its owner took it up again, or its migration is on record no more, since somebody proved how it ended: what failover
            # thought of it is over. Else a guest that ended while it was on its way would be waited for for ever.
            was_taken_up = vm.phase is Phase.NEEDS_ATTENTION and not row.attention
            has_arrived = vm.phase is Phase.MOVING and not row.migrating_to
            # It was to be taken off its host, and something else was being done with it.
            was_left = vm.phase is Phase.STOPPING and vm_id in seen.stranded and vm_id not in seen.live
            if was_taken_up or has_arrived or was_left:
                vm = reading.vm_record(row, seen, now_s=now)
            vm = reading.with_wishes(vm, row, seen, now=self._clock.now(), now_s=now)
            vms[vm_id] = replace(vm, has_lost_storage=vm_id in seen.stranded, pools=seen.pools.get(vm_id, frozenset()))
        self._state = replace(self._state, hosts=hosts, vms=vms, tombstones=seen.tombstones)

    def _has_granting_ended(self, host_id: str, seen: Snapshot) -> bool:
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

    def _count_from(self, host_id: str, seen: Snapshot) -> float:
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

    def _ended(self, seen: Snapshot) -> list[Event]:
        """Return the ends of restarts, from their operations."""
        found: list[Event] = []
        begun = {start.vm_id: start.operation_id for start in seen.starts} | self._hands.restarts
        for vm_id, operation_id in begun.items():
            operation, vm = seen.operations.get(operation_id), self._state.vms.get(vm_id)
            if operation is None or operation.state not in ENDED_STATES:
                continue
            self._hands.restarts.pop(vm_id, None)
            if vm is None or vm.phase is not Phase.STARTING:
                continue
            found += _end_of(operation, vm)
        return found

    def _ended_alone(self, seen: Snapshot) -> list[Event]:
        """Return the guests that their living host says have ended while nobody was working on them."""
        found: list[Event] = []
        for vm_id, row in seen.vms.items():
            vm, host = self._state.vms[vm_id], seen.hosts.get(row.host_id)
            was_meant = row.observed_reason in ON_PURPOSE and not row.was_taken_off
            is_off = row.observed_state in _OFF and row.observed_host_id == row.host_id and not was_meant
            is_waited_for = vm.phase is Phase.SETTLED or (vm.phase is Phase.STOPPING and row.was_taken_off)
            is_idle = is_waited_for and bool(vm.holders) and vm_id not in seen.live
            if is_off and is_idle and host is not None and host.connectivity is HostConnectivity.UP:
                seen_as = reading.seen_of(row)
                found.append(Observed(vm=vm_id, host=row.host_id, epoch=row.epoch, seen=seen_as, was_crash=True))
        return found

    # --- what is done ------------------------------------------------------------------------------------------------------------

    def _feed(self, happened: Sequence[Event], term: int, seen: Snapshot) -> None:
        now = self._clock.boottime_s()
        self._state, effects = steps(self._state, happened, now)
        for ended in [one for one in happened if isinstance(one, StartEnded)]:
            self._hands.write(term, partial(self._record_end, event=ended))
        for effect in effects:
            if isinstance(effect, do.SetStanding):
                self._stand(effect, term)
            else:
                more = self._hands.carry_out(effect, term, seen)
                if more:
                    self._feed(more, term, seen)
            if isinstance(effect, do.StartVm) and effect.vm not in self._hands.restarts:
                self._forget(effect.vm)
            if isinstance(effect, do.StartVm | do.SettleMove | do.DestroyCopy | do.RemoveLeftover) and self._nudger is not None:
                self._nudger.nudge()
        self._note_evidence(term)

    def _stand(self, effect: do.SetStanding, term: int) -> None:
        told = min(self._told.get(effect.host, 0), len(effect.evidence))
        if effect.standing is HostConnectivity.SUSPECT:
            told = 0  # a new story begins
        now, lines = self._clock.boottime_s(), effect.evidence[told:]
        try:
            self._hands.write(term, partial(self._hands.record_standing, effect=effect, lines=lines, now_s=now))
        except Conflict as conflict:
            if conflict.code != "host-came-back":
                raise
            log.info("host came back in the last moment", host_id=effect.host)
            for vm_id in [one.id for one in self._state.vms.values() if one.host == effect.host]:
                self._forget(vm_id)
            return
        if effect.standing is not HostConnectivity.SUSPECT:
            self._told[effect.host] = len(effect.evidence)
        else:
            self._told[effect.host] = 0

    def _forget(self, vm_id: str) -> None:
        """Drop what we think of a vm: the store knew better; the next round reads it anew."""
        self._state = replace(self._state, vms={key: vm for key, vm in self._state.vms.items() if key != vm_id})

    def _note_evidence(self, term: int) -> None:
        """Record lines that came without a change of standing: a power device that failed, an answer that came late."""
        now = self._clock.boottime_s()
        for host_id, host in self._state.hosts.items():
            told = self._told.get(host_id, 0)
            if host.standing in _AWAY and len(host.evidence) > told:
                lines = host.evidence[told:]
                self._hands.write(term, partial(self._hands.record_notes, host_id=host_id, lines=lines, now_s=now))
                self._told[host_id] = len(host.evidence)

    def _record_end(self, session: Session, *, event: StartEnded) -> None:
        now = self._clock.now()
        for row in failover.open_starts(session):
            if row.vm_id != event.vm:
                continue
            if event.is_running:
                metrics.FAILOVER_SECONDS.labels("running").observe((now - row.created_at).total_seconds())
            failover.write_vm(
                session,
                row.failover_id,
                row.vm_id,
                now=now,
                state="running" if event.is_running else "failed",
                why=event.why[:1000] if not event.is_running else "",
                ended_at=now,
            )

    def _note_waiting(self, term: int, seen: Snapshot) -> None:
        """Record why vms of lost hosts wait, at most every few seconds each: reasons may count seconds.

        Those of start groups also where their host is back already, and what they wait for is elsewhere.
        """
        now = self._clock.boottime_s()
        waits = {vm.id: vm for vm in self._state.vms.values() if vm.why and _is_waiting(vm, seen, now)}
        self._told_why = {vm_id: told for vm_id, told in self._told_why.items() if vm_id in waits}
        for vm_id, vm in waits.items():
            at, why = self._told_why.get(vm_id, (float("-inf"), ""))
            if vm.why != why and now - at >= WHY_EVERY_S and (vm.host in seen.records or vm.group):
                self._told_why[vm_id] = (now, vm.why)
                told = replace(vm, why=_with_names(vm.why, seen))
                self._hands.write(term, partial(self._hands.record_waiting, host_id=vm.host, vm=told))

    def _note_frozen(self, term: int, seen: Snapshot) -> None:
        frozen = self._state.frozen[:500]
        if seen.control.frozen != frozen:
            now = self._clock.now()
            self._hands.write(term, lambda session: failover.set_control(session, now=now, frozen=frozen))

    def _measure(self) -> None:
        metrics.FAILOVER_FROZEN.labels("breaker").set(bool(self._state.frozen))
        metrics.HOSTS_BY_BEACON.set(sum(1 for host in self._state.hosts.values() if LIVES_BY_BEACON in host.degraded))
        metrics.FAILOVER_FROZEN.labels("operator").set(self._state.is_paused)
        phases = Counter(vm.phase for vm in self._state.vms.values())
        metrics.FAILOVER_VMS.labels("waiting").set(phases[Phase.RECOVERING])
        metrics.FAILOVER_VMS.labels("starting").set(phases[Phase.STARTING])


def _refreshed(vm: VmRecord, row: KeptVm, seen: Snapshot, now_s: float) -> VmRecord:
    """Return the vm as the store has it by now, where failover itself has nothing in hand with it."""
    if vm.phase is Phase.SETTLED and not vm.holders and row.epoch > vm.epoch:
        # Its disks came back from a backup on another host: it was assigned there, in a transaction that is not failover's.
        return reading.vm_record(row, seen, now_s=now_s)
    if vm.phase is Phase.SETTLED and vm.holders and row.migrating_to not in {"", *(one.host for one in vm.holders)}:
        # A move began of a vm that was looked after already, as are those of a host that came back: from now on two may hold it.
        return reading.vm_record(row, seen, now_s=now_s)
    home = seen.hosts.get(row.host_id)
    is_alive = home is not None and home.connectivity is HostConnectivity.UP
    is_idle = vm.phase is Phase.SETTLED and not row.migrating_to and is_alive
    if not is_idle or not vm.holders:
        return vm
    return replace(
        vm,
        host=row.host_id,
        epoch=row.epoch,
        holders=(Holder(host=row.host_id, epoch=row.epoch),),
        is_local=row.has_local_disk,
        seen=reading.seen_of(row),
        seen_s=now_s,
    )


def _with_names(why: str, seen: Snapshot) -> str:
    """Return the reason as people read it: hosts by their names; the core names vms itself."""
    for host_id, host in seen.hosts.items():
        if host_id in why:
            why = why.replace(host_id, host.name)
    return why


def _is_waiting(vm: VmRecord, seen: Snapshot, now_s: float) -> bool:
    is_held_up = vm.phase is Phase.RESTARTING and bool(vm.group) and now_s >= vm.not_before_s
    return vm.phase is Phase.RECOVERING or is_held_up or _is_stranded(vm, seen)


def _is_stranded(vm: VmRecord, seen: Snapshot) -> bool:
    """Tell whether nothing can be done for a vm whose host is proven off: its disks were there alone."""
    home = seen.hosts.get(vm.host)
    return vm.is_local and vm.is_kept and home is not None and home.connectivity is HostConnectivity.FENCED


def _end_of(operation: Operation, vm: VmRecord) -> list[Event]:
    is_running = operation.state is OperationState.DONE
    error = operation.error
    found: list[Event] = []
    if error is not None and error.code == "image-corrupt":
        found.append(MarkedCorrupt(vm=vm.id))
    why = error.message if error is not None else operation.state.value
    return [*found, StartEnded(vm=vm.id, host=vm.host, epoch=vm.epoch, is_running=is_running, why="" if is_running else why)]
