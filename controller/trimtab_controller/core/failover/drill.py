"""A host's loss, played on a copy of the fleet: the very core that decides in earnest, on a virtual clock, with answers as assumed.

Pure. What a device, a gateway or a boot takes is an assumption that the answer names; what is decided and in which order is not.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trimtab_controller.core.failover import effects as do
from trimtab_controller.core.failover.events import (
    Event,
    GrantingEnded,
    IntentProven,
    IntentWritten,
    LeaderStarted,
    PowerAnswered,
    Renewed,
    StartEnded,
    Tick,
)
from trimtab_controller.core.failover.records import NEVER_S, HostRecord, Phase, Seen, State, VmRecord
from trimtab_controller.core.failover.settings import FailoverSettings
from trimtab_controller.core.failover.step import steps

END_S = 600.0
WARM_UP_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Seconds. `power_s`: from the order to the status read back; `place_s`: from the proof to the start on the new host."""

    revoke_s: float = 1.5
    power_s: float = 3.0
    place_s: float = 1.0
    boot_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What becomes of one vm. `seconds` from the cut to its start having ended; None: it does not come back by itself."""

    vm: str
    seconds: float | None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """`score`: 0 to 100, the share of the vms that should come back and do. `proof` '' : the host is never proven off."""

    host: str
    lost_s: float | None
    fenced_s: float | None
    proof: str
    frozen: str
    outcomes: tuple[Outcome, ...]
    score: float
    median_s: float | None
    max_s: float | None


@dataclass(slots=True)
class _Play:
    state: State
    lost: str
    assumptions: Assumptions
    has_power: bool
    now: float = 0.0
    due: list[tuple[float, Event]] = field(default_factory=list)
    ran: dict[str, float] = field(default_factory=dict)

    def run(self, until_s: float, *, is_cut: bool) -> None:
        while self.now < until_s and not self._is_over(is_cut=is_cut):
            self.now += 1.0
            ready = [event for at, event in self.due if at <= self.now]
            self.due = [(at, event) for at, event in self.due if at > self.now]
            heard = [
                Renewed(host=host.id, at_s=self.now, is_armed=host.is_armed, kill_s=host.kill_s)
                for host in self.state.hosts.values()
                if not (is_cut and host.id == self.lost)
            ]
            self.state, effects = steps(self.state, [*heard, *ready, Tick()], self.now)
            for event in ready:
                if isinstance(event, StartEnded):
                    self.ran[event.vm] = self.now
            for effect in effects:
                self._answer(effect)

    def _is_over(self, *, is_cut: bool) -> bool:
        busy = {Phase.RECOVERING, Phase.STARTING}
        is_fenced = self.state.hosts[self.lost].proof is not None
        return is_cut and is_fenced and not self.due and not any(vm.phase in busy for vm in self.state.vms.values())

    def _answer(self, effect: do.Effect) -> None:
        given = self.assumptions
        match effect:
            case do.EndGranting():
                self.due.append((self.now + given.revoke_s, GrantingEnded(host=effect.host, handled_s=NEVER_S)))
            case do.WriteIntent():
                self.due.append((self.now + given.revoke_s, IntentWritten(host=effect.host, at_s=self.now)))
            case do.ProveIntent():
                self.due.append((self.now + given.revoke_s, IntentProven(host=effect.host)))
            case do.PowerOff():
                message = "" if self.has_power else "its last test failed"
                answered = PowerAnswered(
                    host=effect.host, path=effect.path, number=effect.number, is_off=self.has_power, message=message
                )
                self.due.append((self.now + given.power_s, answered))
            case do.StartVm():
                ended = StartEnded(vm=effect.vm, host=effect.host, epoch=effect.epoch, is_running=True)
                self.due.append((self.now + given.place_s + given.boot_s, ended))
            case _:
                pass  # nothing else is awaited


def lose_host(
    hosts: Mapping[str, HostRecord],
    vms: Mapping[str, VmRecord],
    lost: str,
    *,
    settings: FailoverSettings,
    refusals: Mapping[str, str],
    has_power: bool,
    assumptions: Assumptions,
) -> Drill:
    """Play the loss of `lost`. `refusals`: vms for which the scheduler proved that no host is left, with its reason.

    `has_power`: a power device of the host was ready at its last test.
    """
    held_up = _held_up(vms, refusals)
    stay_off = refusals.keys() | held_up.keys()
    living = {vm_id: replace(vm, seen=Seen.RUNNING) for vm_id, vm in vms.items() if vm_id not in stay_off}
    calm = {host_id: replace(host, heard_s=0.0, handled_s=0.0, has_listed=True) for host_id, host in hosts.items()}
    play = _Play(State(settings=settings, hosts=calm, vms=living), lost, assumptions, has_power)
    play.state, _effects = steps(play.state, [LeaderStarted()], 0.0)
    listed = {host_id: replace(host, has_listed=True) for host_id, host in play.state.hosts.items()}
    play.state = replace(play.state, hosts=listed)
    play.run(WARM_UP_S, is_cut=False)
    cut_s = play.now
    play.run(cut_s + END_S, is_cut=True)
    host = play.state.hosts[lost]
    off = {vm_id: f"no host could take it: {why}" for vm_id, why in refusals.items()} | held_up
    outcomes = tuple(_outcome(play, vm, cut_s, off) for vm in sorted(vms.values(), key=lambda one: one.id))
    should = [one for one in outcomes if vms[one.vm].is_kept]
    back = [one.seconds for one in should if one.seconds is not None]
    times = {line.proof: line.at_s - cut_s for line in host.evidence if line.at_s > cut_s}
    lost_at = next((line.at_s - cut_s for line in host.evidence[1:] if line.proof is None and line.at_s > cut_s), None)
    return Drill(
        host=lost,
        lost_s=lost_at,
        fenced_s=times.get(host.proof) if host.proof else None,
        proof=host.proof.value if host.proof else "",
        frozen=play.state.frozen,
        outcomes=outcomes,
        score=round(100 * len(back) / len(should), 1) if should else 100.0,
        median_s=statistics.median(back) if back else None,
        max_s=max(back) if back else None,
    )


def _held_up(vms: Mapping[str, VmRecord], refusals: Mapping[str, str]) -> dict[str, str]:
    """Return why vms that would have a host wait all the same: one that has none starts earlier in their start group."""
    found = {}
    for vm in vms.values():
        group = [vms[one] for one in refusals if one in vms and vms[one].is_kept and vms[one].project == vm.project]
        earlier = [one for one in group if vm.group and one.group == vm.group and one.group_order < vm.group_order]
        if vm.is_kept and vm.id not in refusals and earlier:
            first = min(earlier, key=lambda one: (one.group_order, one.id))
            found[vm.id] = f"waits for {first.called}, which starts earlier in group {vm.group}"
    return found


def _outcome(play: _Play, vm: VmRecord, cut_s: float, off: Mapping[str, str]) -> Outcome:
    if not vm.is_kept:
        return Outcome(vm=vm.id, seconds=None, why="it is not kept (ha none): it ends with its host")
    if vm.id in off:
        return Outcome(vm=vm.id, seconds=None, why=off[vm.id])
    if vm.id in play.ran:
        return Outcome(vm=vm.id, seconds=play.ran[vm.id] - cut_s)
    after = play.state.vms.get(vm.id)
    if not play.state.hosts[play.lost].proof:
        why = play.state.frozen or "nothing proves its host off: no power device is ready and its warden is not armed"
        return Outcome(vm=vm.id, seconds=None, why=why)
    return Outcome(vm=vm.id, seconds=None, why=after.why if after else "")
