"""The engine process around the real core: feeds it facts, carries out its effects, dies and comes back from what it stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.scenarios.hosts import Domain, SimHost
from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.failover import step
from trimtab_controller.core.failover.events import (
    ClosedCleanly,
    Event,
    GrantingEnded,
    IntentProven,
    IntentWritten,
    LeaderStarted,
    MoveEnded,
    Observed,
    PowerAnswered,
    Renewed,
    StartEnded,
    StopEnded,
    Tick,
)
from trimtab_controller.core.failover.records import NEVER_S, Desired, HostRecord, Seen, State, VmRecord

if TYPE_CHECKING:
    from tests.scenarios.world import World

TICK_S = 1.0


@dataclass
class Deed:
    """An operation of the engine that lives in SQL: it goes on with whatever engine lives."""

    kind: str
    vm: str
    host: str
    epoch: int
    effect: Any
    is_done: bool = False
    began_s: float = 0.0
    ended_s: float | None = None


class EngineProcess:
    def __init__(self, world: World) -> None:
        self.world = world
        self.state = State(settings=world.settings)
        self.is_alive = False
        self.is_frozen = False
        self.loses_uplink = False
        self.generation = 0
        self.revoked: set[str] = set()
        self.handled: dict[str, float] = {}
        self.seen_slots: dict[str, float] = {}
        self.deeds: list[Deed] = []
        self.audit: list[tuple[float, str, str]] = []
        self.snapshots: list[tuple[float, State]] = []
        self.refusals: list[do.Refuse] = []
        self.alarms: list[tuple[float, do.Alarm]] = []
        self._under_way: set[Any] = set()
        self._jobs: set[Any] = set()
        self._held: list[Event] = []

    # --- life ------------------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start, lead, and take every open operation up again."""
        self.is_alive, self.is_frozen = True, False
        self.generation += 1
        self._under_way.clear()
        self.feed(LeaderStarted())
        for host in self.world.hosts.values():
            host.session_is_open = False
        self._tick(self.generation)

    def kill(self) -> None:
        self.is_alive = False
        self.generation += 1

    def thaw(self) -> None:
        self.is_frozen = False
        held, self._held = self._held, []
        for event in held:
            self.feed(event)

    def _tick(self, generation: int) -> None:
        if generation != self.generation:
            return
        self.world.after(TICK_S, lambda: self._tick(generation))
        if self.is_frozen or not self.world.has_sql:
            return
        self._read_slots()
        self.feed(Tick(has_lease=True, has_uplink=not self.loses_uplink))
        for deed in [one for one in self.deeds if not one.is_done]:
            self._drive(deed)
        self.snapshots.append((self.world.now, self.state))
        del self.snapshots[:-600]

    def _read_slots(self) -> None:
        for name, written_s in self.world.slots.items():
            if self.seen_slots.get(name) == written_s:
                continue
            is_new = name in self.seen_slots
            self.seen_slots[name] = written_s
            host = self.world.hosts[name]
            gateway_s = self.handled.get(name, NEVER_S)
            if is_new and self.world.now - gateway_s > self.world.settings.suspect_after_s / 2:
                is_granted = name not in self.world.intents
                renewal = Renewed(
                    host=name,
                    at_s=self.world.now,
                    is_granted=is_granted,
                    is_armed=host.warden_is_alive,
                    is_beacon=True,
                    kill_s=host.kill_s,
                )
                self.feed(renewal)

    # --- events in, effects out ----------------------------------------------------------------------------------------------------

    def gateway_handled(self, host: SimHost, now: float, *, is_granted: bool) -> None:
        if is_granted:
            self.handled[host.name] = now

    def feed(self, event: Event) -> None:
        if not self.is_alive:
            return
        if self.is_frozen:
            self._held.append(event)
            return
        self.state, effects = step(self.state, event, self.world.now)
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: do.Effect) -> None:
        world, generation = self.world, self.generation
        match effect:
            case do.SetStanding():
                self.audit.append((world.now, effect.host, effect.standing.value))
                world.tell(f"host_{effect.standing.value}", host=effect.host, detail=effect.proof)
                if effect.standing.value == "fenced":
                    world.tell("fence_confirmed", host=effect.host, detail=effect.proof)
            case do.EndGranting():
                if self._once(("revoke", effect.host)):
                    world.after(0.5, lambda: self._revoke(effect.host, generation))
            case do.WriteIntent():
                if self._once(("intent", effect.host)):
                    world.after(0.2, lambda: self._write_intent(effect.host, generation))
            case do.ProveIntent():
                world.after(0.2, lambda: self._prove_intent(effect.host, generation))
            case do.ResumeGranting():
                self._under_way -= {("revoke", effect.host), ("intent", effect.host)}
                self.revoked.discard(effect.host)
                world.intents.discard(effect.host)
            case do.PowerOff():
                world.tell("power_off_asked", host=effect.host, detail=effect.number)
                self._power_off(effect)
            case do.GoDown():
                self._go_down(world.hosts[effect.host], is_reboot=effect.is_reboot)
            case do.Alarm():
                self.alarms.append((world.now, effect))
                world.tell("alarm", effect.subject, detail=effect.code)
            case do.Refuse():
                self.refusals.append(effect)
                world.tell("refused", effect.subject, detail=effect.message)
            case do.Inspect():
                world.call(effect.host, lambda host: self._inspect(host, effect.vm))
            case do.RemoveLeftover():
                world.call(effect.host, lambda host: self._remove_leftover(host, effect.vm))
            case do.StartVm() | do.StopVm() | do.DestroyCopy() | do.MoveVm() | do.ResumeVm():
                self._accept(effect)

    def _once(self, key: Any) -> bool:
        if key in self._under_way:
            return False
        self._under_way.add(key)
        return True

    def _once_for_all(self, key: Any) -> bool:
        """As `_once`, for what lives on the hosts and outlives an engine."""
        if key in self._jobs:
            return False
        self._jobs.add(key)
        return True

    # --- granting, intent, power ---------------------------------------------------------------------------------------------------

    def _revoke(self, name: str, generation: int) -> None:
        if generation != self.generation or ("revoke", name) not in self._under_way:
            return
        self.revoked.add(name)
        self.feed(GrantingEnded(host=name, handled_s=self.handled.get(name, NEVER_S)))

    def _write_intent(self, name: str, generation: int) -> None:
        if generation != self.generation or ("intent", name) not in self._under_way:
            return
        self.world.intents.add(name)
        at_s = self.world.now if self.world.hosts[name].has_beacon else NEVER_S
        self.feed(IntentWritten(host=name, at_s=at_s))

    def _prove_intent(self, name: str, generation: int) -> None:
        if generation == self.generation:
            self.feed(IntentProven(host=name, why="" if name in self.world.intents else "it is gone"))

    def _power_off(self, effect: do.PowerOff) -> None:
        world, host, generation = self.world, self.world.hosts[effect.host], self.generation
        device = host.power_device

        def answer(*, is_off: bool, message: str = "") -> None:
            if generation == self.generation:
                event = PowerAnswered(host=host.name, path=effect.path, number=effect.number, is_off=is_off, message=message)
                self.feed(event)

        def works() -> None:
            if host.is_powered:
                world.tell("switched_off", host=host.name)
            host.cut_power()
            world.after(0.5, lambda: answer(is_off=True))

        match device:
            case "works":
                world.after(1.0, works)
            case "slow":
                world.after(host.power_slow_s, works)
            case "lying":
                # It says yes and does nothing; the status that is read back is still on.
                world.after(1.5, lambda: answer(is_off=False, message="it was told to switch off and its status is still on"))
            case _:
                world.after(1.0, lambda: answer(is_off=False, message="the device does not answer"))

    def _go_down(self, host: SimHost, *, is_reboot: bool) -> None:
        """Stop the guests cleanly, say so, go down; come back after a reboot."""
        if not host.is_powered or host.goes_down:
            return
        host.goes_down = True
        stopped = frozenset(one.vm for one in host.domains.values() if one.vm not in self.world.unmanaged)

        def closed() -> None:
            if not host.is_powered or not host.goes_down:
                return
            for vm in stopped:
                host.domains.pop(vm, None)
                self.world.tell("stopped", vm, host.name)
            self.feed(ClosedCleanly(host=host.name, vms=stopped))
            host.cut_power()
            self.world.tell("went_down", host=host.name)
            if is_reboot:
                self.world.after(60.0, host.boot_up)

        self.world.after(3.0, closed)

    # --- operations ------------------------------------------------------------------------------------------------------------------

    def _accept(self, effect: Any) -> None:
        kind = type(effect).__name__
        host = effect.target if isinstance(effect, do.MoveVm) else effect.host
        for deed in self.deeds:
            if deed.is_done:
                continue
            if (deed.kind, deed.vm, deed.host, deed.epoch) == (kind, effect.vm, host, effect.epoch):
                return
            if deed.vm == effect.vm and kind in {"StartVm", "StopVm", "MoveVm"}:
                deed.is_done, deed.ended_s = True, self.world.now  # superseded in the transaction that accepts this one
        deed = Deed(kind, effect.vm, host, effect.epoch, effect, began_s=self.world.now)
        self.deeds.append(deed)
        self.world.tell(f"begun_{kind}", effect.vm, host, effect.epoch)
        self._drive(deed)

    def _end(self, deed: Deed, event: Event) -> None:
        if deed.is_done or not self.is_alive:
            return
        deed.is_done, deed.ended_s = True, self.world.now
        self.feed(event)

    def _drive(self, deed: Deed) -> None:
        """Call the agent again until it answered: the same key gets the recorded answer."""
        vm = self.state.vms.get(deed.vm)
        if vm is not None and deed.epoch < vm.epoch and deed.kind in {"StartVm", "MoveVm"}:
            deed.is_done, deed.ended_s = True, self.world.now
            return
        if deed.kind == "MoveVm" and (vm is None or not vm.move_to):
            deed.is_done, deed.ended_s = True, self.world.now  # decided without it: a side was fenced, or both were asked
            return
        match deed.kind:
            case "StartVm":
                self.world.call(deed.host, lambda host: self._agent_start(host, deed))
            case "StopVm":
                self.world.call(deed.host, lambda host: self._agent_stop(host, deed))
            case "DestroyCopy":
                self.world.call(deed.host, lambda host: self._agent_destroy(host, deed))
            case "ResumeVm":
                self.world.call(deed.host, lambda host: self._agent_resume(host, deed))
            case "MoveVm":
                self._drive_move(deed)

    def _agent_start(self, host: SimHost, deed: Deed) -> None:
        world = self.world
        if host.highest_epoch.get(deed.vm, 0) > deed.epoch or not host.has_lease(world.now, world.settings.lease_ttl_s):
            return
        host.highest_epoch[deed.vm] = deed.epoch
        recorded = host.journal.get((deed.vm, deed.epoch))
        if recorded is not None:
            self._end(deed, recorded)
            return
        present = host.domains.get(deed.vm)
        if present is not None and present.epoch == deed.epoch and present.seen is Seen.RUNNING:
            self._end(deed, StartEnded(vm=deed.vm, host=host.name, epoch=deed.epoch, is_running=True))
            return
        if not self._once_for_all(("start", deed.vm, deed.epoch, host.name, host.boot)):
            return
        boot = host.boot
        world.after(2.0, lambda: self._agent_started(host, deed, boot))

    def _agent_started(self, host: SimHost, deed: Deed, boot: int) -> None:
        world = self.world
        self._jobs.discard(("start", deed.vm, deed.epoch, host.name, boot))
        if host.boot != boot or not host.agent_acts or not host.has_lease(world.now, world.settings.lease_ttl_s):
            return
        if host.highest_epoch.get(deed.vm, 0) > deed.epoch or (deed.vm, deed.epoch) in host.journal:
            return  # a newer command, or a stop with a higher turn, came in between
        double = world.doubles.get(deed.vm)
        why = "the guest's process ended at once" if double is not None and double.start_fails_on(host.name) else ""
        if deed.vm in world.locked_vms:
            why = "a lock of kind create is left on it"
        if world.locks_disks and world.running_on(deed.vm):
            why = 'Failed to get "write" lock'
        if why:
            world.tell("start_failed", deed.vm, host.name, why)
            host.journal[deed.vm, deed.epoch] = StartEnded(
                vm=deed.vm, host=host.name, epoch=deed.epoch, is_running=False, why=why
            )
            self._end(deed, host.journal[deed.vm, deed.epoch])
            return
        host.domains[deed.vm] = Domain(deed.vm, deed.epoch, Seen.RUNNING)
        world.tell("started", deed.vm, host.name, deed.epoch)
        self._end(deed, StartEnded(vm=deed.vm, host=host.name, epoch=deed.epoch, is_running=True))

    def _agent_stop(self, host: SimHost, deed: Deed) -> None:
        double = self.world.doubles.get(deed.vm)
        if double is not None and double.stop_fails and deed.vm in host.domains:
            if self._once_for_all(("stop", deed.vm, deed.epoch)):
                failed = StopEnded(vm=deed.vm, host=host.name, is_gone=False, why="its process does not end")
                self.world.after(20.0, lambda: self._end(deed, failed))
            return
        host.journal[deed.vm, deed.epoch] = StartEnded(vm=deed.vm, host=host.name, epoch=deed.epoch, is_running=False)
        if deed.vm in host.domains:
            host.domains.pop(deed.vm)
            self.world.tell("stopped", deed.vm, host.name)
        self._end(deed, StopEnded(vm=deed.vm, host=host.name, is_gone=True))

    def _agent_destroy(self, host: SimHost, deed: Deed) -> None:
        domain = host.domains.get(deed.vm)
        if domain is not None and domain.epoch <= deed.epoch:
            host.domains.pop(deed.vm)
            self.world.tell("destroyed", deed.vm, host.name, domain.epoch)
        host.highest_epoch[deed.vm] = max(host.highest_epoch.get(deed.vm, 0), deed.epoch)
        # A start under this epoch that arrives late finds that it is over.
        host.journal[deed.vm, deed.epoch] = StartEnded(vm=deed.vm, host=host.name, epoch=deed.epoch, is_running=False)
        gone = Observed(vm=deed.vm, host=host.name, epoch=deed.epoch, seen=Seen.ABSENT)
        self._end(deed, gone)

    def _agent_resume(self, host: SimHost, deed: Deed) -> None:
        domain = host.domains.get(deed.vm)
        if domain is not None and domain.seen is Seen.PAUSED:
            domain.seen = Seen.RUNNING
            self.world.tell("resumed", deed.vm, host.name)
        deed.is_done, deed.ended_s = True, self.world.now

    def _inspect(self, host: SimHost, vm: str) -> None:
        domain = host.domains.get(vm, Domain(vm, host.highest_epoch.get(vm, 0), Seen.ABSENT))
        self.feed(Observed(vm=vm, host=host.name, epoch=domain.epoch, seen=domain.seen))
        record = self.state.vms.get(vm)
        if record is not None and record.phase.value == "starting" and domain.seen is Seen.ABSENT:
            self._jobs = {key for key in self._jobs if key[:2] != ("start", vm)}

    def _remove_leftover(self, host: SimHost, vm: str) -> None:
        domain = host.domains.get(vm)
        if domain is not None and domain.seen in {Seen.STOPPED, Seen.ABSENT}:
            host.domains.pop(vm)
            self.world.tell("leftover_removed", vm, host.name)

    # --- migration ---------------------------------------------------------------------------------------------------------------------

    def _drive_move(self, deed: Deed) -> None:
        world, effect = self.world, deed.effect
        source, target = world.hosts[effect.source], world.hosts[effect.target]
        domain = source.domains.get(deed.vm)
        if not effect.is_live:
            self._drive_relocation(deed, source, target, domain)
            return
        if ("move", deed.vm, deed.epoch) not in self._jobs:
            has_lease = target.has_lease(world.now, world.settings.lease_ttl_s)
            if not (source.hears_controller and target.hears_controller and domain is not None and has_lease):
                return
            self._jobs.add(("move", deed.vm, deed.epoch))
            target.domains[deed.vm] = Domain(deed.vm, deed.epoch, Seen.INCOMING)
            target.highest_epoch[deed.vm] = deed.epoch
            world.tell("migrate:0%", deed.vm, effect.target)
            for share in (10, 50, 99):
                world.after(10.0 * share / 100, lambda share=share: self._at_share(deed, share))
            world.after(9.95, lambda: self._switch_over(deed, source, target))
            world.after(10.0, lambda: self._complete(deed, source, target))
            return
        job = f"move-{deed.vm}-{deed.epoch}"
        is_apart = not source.runs or not target.runs or target.name in source.peers_cut or deed.vm not in target.domains
        if ("ended", job) not in self._jobs and is_apart:
            self._break_off(deed, source, target)

    def _at_share(self, deed: Deed, share: int) -> None:
        if not deed.is_done:
            self.world.tell(f"migrate:{share}%", deed.vm, deed.host)

    def _switch_over(self, deed: Deed, source: SimHost, target: SimHost) -> None:
        domain = source.domains.get(deed.vm)
        if domain is None or not source.runs or not target.runs or ("ended", f"move-{deed.vm}-{deed.epoch}") in self._jobs:
            return
        domain.seen = Seen.PAUSED
        self.world.tell("migrate:switchover", deed.vm, deed.host)

    def _complete(self, deed: Deed, source: SimHost, target: SimHost) -> None:
        """libvirt ends the job by itself: the agents and the engine need not live for it."""
        job = ("ended", f"move-{deed.vm}-{deed.epoch}")
        if job in self._jobs or not source.runs or not target.runs:
            return
        domain, incoming = source.domains.get(deed.vm), target.domains.get(deed.vm)
        double = self.world.doubles.get(deed.vm)
        if target.name in source.peers_cut or domain is None or incoming is None:
            return  # paused on one side, incomplete on the other: the controller decides
        self._jobs.add(job)
        if double is not None and double.migrate_failures > 0:
            double.migrate_failures -= 1
            domain.seen = Seen.RUNNING
            target.domains.pop(deed.vm)
            self.world.tell("migration_failed", deed.vm, target.name)
            self._end(deed, MoveEnded(vm=deed.vm, epoch=deed.epoch, host=source.name, is_proven=True))
            return
        source.domains.pop(deed.vm)
        incoming.seen = Seen.RUNNING
        self.world.tell("migrated", deed.vm, target.name)
        self._observe_end(deed, source, target)

    def _observe_end(self, deed: Deed, source: SimHost, target: SimHost) -> None:
        if deed.is_done:
            return
        if not (source.hears_controller and target.hears_controller and self.is_alive):
            self.world.after(1.0, lambda: self._observe_end(deed, source, target))
            return
        if deed.vm in target.domains and deed.vm not in source.domains:
            self._end(deed, MoveEnded(vm=deed.vm, epoch=deed.epoch, host=target.name, is_proven=True))

    def _break_off(self, deed: Deed, source: SimHost, target: SimHost) -> None:
        """The job failed; a source that still ran goes on by itself, one that was paused at the switch waits for the token."""
        self._jobs.add(("ended", f"move-{deed.vm}-{deed.epoch}"))
        self.world.tell("migration_broke", deed.vm, target.name)
        self._end(deed, MoveEnded(vm=deed.vm, epoch=deed.epoch, host="", is_proven=False))

    def _drive_relocation(self, deed: Deed, source: SimHost, target: SimHost, domain: Domain | None) -> None:
        if domain is not None and source.hears_controller:
            source.domains.pop(deed.vm)
            self.world.tell("stopped", deed.vm, source.name)
        if deed.vm in source.domains or not self._once_for_all(("relocate", deed.vm, deed.epoch)):
            return

        def started() -> None:
            world = self.world
            self._jobs.discard(("relocate", deed.vm, deed.epoch))
            if deed.is_done or not target.hears_controller or not target.has_lease(world.now, world.settings.lease_ttl_s):
                return
            target.highest_epoch[deed.vm] = deed.epoch
            target.domains[deed.vm] = Domain(deed.vm, deed.epoch, Seen.RUNNING)
            world.tell("started", deed.vm, target.name, deed.epoch)
            self._end(deed, MoveEnded(vm=deed.vm, epoch=deed.epoch, host=target.name, is_proven=True))

        self.world.after(2.0, started)


def record_of(host: SimHost) -> HostRecord:
    paths = () if host.power_device == "none" else ("power",)
    return HostRecord(id=host.name, power_paths=paths, memory_bytes=host.memory_bytes, cpus=host.cpus)


def is_wished_to_run(vm: VmRecord) -> bool:
    return vm.desired is Desired.RUNNING
