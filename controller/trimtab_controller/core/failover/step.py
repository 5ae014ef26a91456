"""`step(state, event, now) -> (state, effects)`: the whole of failover as one pure function.

The leader feeds it facts as events and carries out its effects; simulations do the same on a virtual clock. Same input, same output.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from trimtab_controller.core.failover import detection, guests, ladder, moves, recovery
from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.effects import Effect, Refuse
from trimtab_controller.core.failover.events import (
    Added,
    ClosedCleanly,
    ConfirmedOff,
    Event,
    GrantingEnded,
    IntentProven,
    IntentWritten,
    LeaderStarted,
    MaintenanceAsked,
    MarkedCorrupt,
    MoveAsked,
    MoveEnded,
    Observed,
    PauseAsked,
    PowerAnswered,
    ReleaseAsked,
    Renewed,
    SessionOpened,
    ShutdownAsked,
    StartEnded,
    StopAsked,
    StopEnded,
    Tick,
    Wished,
)
from trimtab_controller.core.failover.records import Desired, Phase, State


def step(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Return the next state and what is to be done, in order. `now`: seconds of the leader's CLOCK_BOOTTIME."""
    return steps(state, (event,), now)


def steps(state: State, events: Iterable[Event], now: float) -> tuple[State, tuple[Effect, ...]]:
    """Take several events of one instant in order, as `step` one by one would, copying the records once: 10,000 renewals a round."""
    draft = Draft(state, now)
    for event in events:
        _HANDLERS[type(event)](draft, event)
    return draft.finish(), tuple(draft.effects)


def _tick(draft: Draft, event: Tick) -> None:
    if not detection.judge(draft, event):
        return
    parts: tuple[Callable[[Draft], None], ...] = (
        ladder.climb,
        guests.watch_starts,
        moves.watch_moves,
        guests.restart_crashed,
        recovery.recover,
        moves.move_what_should,
        moves.close_hosts,
        recovery.clear_leftovers,
    )
    for part in parts:
        part(draft)


def _wish(draft: Draft, event: Wished) -> None:
    vm = draft.vms.get(event.vm)
    if vm is None:
        return
    vm = draft.put_vm(replace(vm, desired=event.desired))
    is_off = vm.phase in {Phase.RECOVERING, Phase.RESTARTING, Phase.NEEDS_ATTENTION} and not vm.holders
    match event.desired:
        case Desired.RUNNING:
            if not vm.holders and vm.phase in {Phase.SETTLED, Phase.NEEDS_ATTENTION}:
                vm = replace(vm, phase=Phase.SETTLED, restarts=0, relocations=0, failed_hosts=())
                recovery.orphan(draft, vm, because="it is wished to run", is_recovery=False)
        case Desired.DELETED if not vm.holders:
            recovery.bury(draft, vm)
        case Desired.IGNORED:
            if is_off:
                draft.put_vm(replace(vm, phase=Phase.SETTLED))
        case Desired.STOPPED | Desired.DISABLED | Desired.DELETED:
            if is_off:
                draft.put_vm(replace(vm, phase=Phase.SETTLED, why=""))
            elif vm.holders and vm.phase is not Phase.MOVING:
                guests.stop(draft, vm)


def _stop_asked(draft: Draft, event: StopAsked) -> None:
    vm = draft.vms.get(event.vm)
    if vm is None or not vm.holders:
        message = f"{event.vm} is stopped already"
        draft.do(Refuse(subject=event.vm, code="already-stopped", message=message))
        return
    guests.stop(draft, replace(vm, desired=Desired.STOPPED), timeout_s=event.timeout_s)


def _pause_asked(draft: Draft, event: PauseAsked) -> None:
    draft.is_paused = event.is_on
    draft.judging_from_s = draft.now


def _release_asked(draft: Draft, event: ReleaseAsked) -> None:
    if event.host in draft.hosts:
        draft.put(replace(draft.hosts[event.host], is_released=True))


def _added(draft: Draft, event: Added) -> None:
    draft.put_vm(event.vm)


_HANDLERS: dict[type, Callable[[Draft, Any], None]] = {
    LeaderStarted: detection.start_leading,
    Tick: _tick,
    Renewed: detection.hear,
    GrantingEnded: ladder.granting_ended,
    IntentWritten: ladder.intent_written,
    IntentProven: ladder.intent_proven,
    PowerAnswered: ladder.power_answered,
    ConfirmedOff: ladder.confirmed_off,
    ClosedCleanly: recovery.closed_cleanly,
    SessionOpened: recovery.session_opened,
    Observed: guests.observed,
    StartEnded: guests.start_ended,
    StopEnded: guests.stop_ended,
    MoveEnded: moves.move_ended,
    MoveAsked: moves.move_asked,
    MaintenanceAsked: moves.maintenance_asked,
    ShutdownAsked: moves.shutdown_asked,
    MarkedCorrupt: guests.marked_corrupt,
    Wished: _wish,
    StopAsked: _stop_asked,
    PauseAsked: _pause_asked,
    ReleaseAsked: _release_asked,
    Added: _added,
}
