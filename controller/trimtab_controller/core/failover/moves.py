"""Moves: drains, rules that are broken, preferences, operators' requests; and the end of a move whose outcome is not known.

A move has two holders from before the target is prepared until one side was observed absent or its host is fenced.
"""

from dataclasses import replace

from trimtab_controller.core.failover.draft import Draft, without_holder
from trimtab_controller.core.failover.effects import DestroyCopy, GoDown, Inspect, MoveVm, Refuse, ResumeVm, SettleMove
from trimtab_controller.core.failover.events import MaintenanceAsked, MoveAsked, MoveEnded, ShutdownAsked
from trimtab_controller.core.failover.homes import (
    choose,
    enemies_on,
    has_memory,
    may_stay,
    partners,
    places,
    rank,
    refusal,
)
from trimtab_controller.core.failover.records import GONE, Closing, Desired, Hold, Holder, HostRecord, Phase, Seen, VmRecord
from trimtab_controller.core.failover.recovery import orphan
from trimtab_controller.core.lifecycle import HostConnectivity


def begin_move(draft: Draft, vm: VmRecord, target: str, *, is_live: bool = True, fallback: str | None = None) -> None:
    """Record the second holder, its claim and the next epoch in one transaction, then prepare the target."""
    source = vm.host
    vm = replace(
        vm,
        epoch=vm.epoch + 1,
        holders=(*vm.holders, Holder(host=target, epoch=vm.epoch + 1)),
        phase=Phase.MOVING,
        move_to=target,
        is_live_move=is_live,
        since_s=draft.now,
        is_end_unknown=False,
        sides={},
        token="",
        fallback=vm.fallback if fallback is None else fallback,
        why=f"moves to {target}",
    )
    draft.put_vm(vm)
    draft.do(MoveVm(vm=vm.id, source=source, target=target, epoch=vm.epoch, is_live=is_live))


def move_ended(draft: Draft, event: MoveEnded) -> None:
    """Take the observed end. Without proof both stay holders and both are asked."""
    vm = draft.vms.get(event.vm)
    if vm is None or vm.phase is not Phase.MOVING or event.epoch != vm.epoch:
        return
    if not event.is_proven:
        draft.put_vm(replace(vm, is_end_unknown=True, sides={}, why="the end of its move is not known; both hosts are asked"))
        _ask_sides(draft, vm)
    elif event.host:
        _settle_on(draft, vm, event.host)
    else:
        orphan(draft, replace(vm, holders=(), seen=Seen.ABSENT, seen_s=draft.now), because="its move failed on both sides")


def _settle_on(draft: Draft, vm: VmRecord, host: str) -> None:
    held = tuple(holder for holder in vm.holders if holder.host == host)
    vm = replace(vm, host=host, holders=held, phase=Phase.SETTLED, move_to="", is_end_unknown=False, sides={}, why="")
    draft.put_vm(replace(vm, seen=Seen.RUNNING, seen_s=draft.now, since_s=draft.now, failed_hosts=()))


def _settle_broken(draft: Draft, vm: VmRecord, host: str) -> None:
    """End a move that could not tell its own end."""
    draft.do(SettleMove(vm=vm.id, host=host, epoch=vm.epoch))
    _settle_on(draft, vm, host)


# --- a move whose end is not known --------------------------------------------------------------------------------------------


def watch_moves(draft: Draft) -> None:
    """Keep asking about moves that lost a side, or that nobody reports on."""
    for vm in sorted(draft.vms.values(), key=lambda one: one.id):
        if vm.phase is Phase.MOVING and _has_broken(vm):
            _ask_sides(draft, vm)


def _has_broken(vm: VmRecord) -> bool:
    """Tell whether this move will not report its own end: one side is proven gone, nobody can tell, or a side was chosen."""
    return len(vm.holders) == 1 or vm.is_end_unknown or bool(vm.token)


def _ask_sides(draft: Draft, vm: VmRecord) -> None:
    for holder in vm.holders:
        draft.do(Inspect(vm=vm.id, host=holder.host))


def observe_side(draft: Draft, vm: VmRecord, host: str, seen: Seen) -> None:
    """Take one side's word of a broken move, and decide once every remaining holder has spoken."""
    if not _has_broken(vm):
        return  # the migration goes on, and its own end will be observed
    if seen in GONE:
        vm = without_holder(vm, host)
        if not vm.holders:
            orphan(draft, replace(vm, seen=Seen.ABSENT, seen_s=draft.now), because="its move failed")
            return
        if vm.token == vm.holders[0].host and len(vm.holders) == 1:
            draft.do(ResumeVm(vm=vm.id, host=vm.token, epoch=vm.epoch))
            _settle_broken(draft, vm, vm.token)
            return
    vm = draft.put_vm(replace(vm, sides={**vm.sides, host: seen}))
    if vm.token or any(holder.host not in vm.sides for holder in vm.holders):
        return
    _decide(draft, vm)


def _decide(draft: Draft, vm: VmRecord) -> None:
    """Give the token to one side: the one that runs, else the source, whose memory is whole until it was told to go."""
    running = [holder.host for holder in vm.holders if vm.sides[holder.host] is Seen.RUNNING]
    if len(vm.holders) == 1:
        only = vm.holders[0]
        if running:
            _settle_broken(draft, vm, only.host)
        elif only.host == vm.host and vm.sides[only.host] is Seen.PAUSED:
            draft.put_vm(replace(vm, token=only.host))
            draft.do(ResumeVm(vm=vm.id, host=only.host, epoch=vm.epoch))
            _settle_broken(draft, vm, only.host)
        else:
            # Half a copy: it never had the whole memory. It goes before the vm starts from its disks.
            draft.do(DestroyCopy(vm=vm.id, host=only.host, epoch=vm.epoch))
        return
    token = running[0] if running else vm.host
    vm = draft.put_vm(replace(vm, token=token, why=f"its move broke; {token} goes on, the other side is destroyed"))
    for holder in vm.holders:
        if holder.host != token:
            draft.do(DestroyCopy(vm=vm.id, host=holder.host, epoch=vm.epoch))


# --- what should move ---------------------------------------------------------------------------------------------------------


def move_what_should(draft: Draft) -> None:
    """Begin moves that a drain, a rule or a preference asks for, within slots. What cannot leave says why."""
    if draft.frozen or draft.is_paused:
        return
    for vm_id in sorted(draft.vms):
        vm = draft.vms[vm_id]
        host = draft.hosts.get(vm.host)
        is_movable = vm.phase is Phase.SETTLED and vm.seen is Seen.RUNNING and vm.desired is Desired.RUNNING
        if not is_movable or host is None or host.standing is not HostConnectivity.UP or len(vm.holders) != 1:
            continue
        reason, target = _wanted_move(draft, vm, host)
        if reason and not target:
            draft.put_vm(replace(vm, why=reason))
        elif target and _moves_on(draft, vm.host) < draft.settings.moves_per_host:
            is_drain = not may_stay(host)
            fallback = (vm.fallback or vm.host) if is_drain else ("" if target == vm.fallback else None)
            begin_move(draft, vm, target, fallback=fallback)


def _moves_on(draft: Draft, host: str) -> int:
    return sum(1 for vm in draft.vms.values() if vm.phase is Phase.MOVING and host in places(vm))


def _wanted_move(draft: Draft, vm: VmRecord, host: HostRecord) -> tuple[str, str]:
    """Return (reason, target): neither where it is well placed, a reason without target where it cannot leave."""
    choice = choose(draft, vm)
    must = _must_leave(draft, vm, host, choice.host)
    if must:
        if vm.is_local:
            return f"{must}; it cannot leave: its disks lie on {host.id} alone", ""
        if not choice.host or choice.host == host.id:
            return f"{must}; it cannot leave: {choice.why}", ""
        return must, choice.host
    if vm.is_local or not vm.has_failback or not choice.host or choice.host == host.id:
        return "", ""
    if (rank(draft, vm, choice.host) or 0) > (rank(draft, vm, host.id) or 0):
        return "a preferred host is free", choice.host
    back = draft.hosts.get(vm.fallback)
    if back is not None and not refusal(draft, back, [vm]) and has_memory(draft, vm, back) and not enemies_on(draft, vm, back.id):
        is_allowed = rank(draft, vm, back.id) is not None and len(partners(draft, vm)) == 1
        return ("it goes back to where it was", back.id) if is_allowed else ("", "")
    return "", ""


def _must_leave(draft: Draft, vm: VmRecord, host: HostRecord, chosen: str) -> str:
    if host.hold is not Hold.NO:
        return f"{host.id} is in maintenance"
    if host.closing is Closing.DRAIN:
        return f"{host.id} is going down"
    if rank(draft, vm, host.id) is None:
        return f"a strict rule keeps it off {host.id}"
    # Of two that are kept apart, the later one by name moves; a mover is counted where it goes.
    enemies = [other for other in enemies_on(draft, vm, host.id) if draft.vms[other].host == host.id]
    if any(other < vm.id for other in enemies if draft.vms[other].phase is not Phase.MOVING):
        return f"it is kept apart from {enemies[0]}"
    group = partners(draft, vm)
    if len(group) > 1 and chosen and chosen != host.id and any(host.id not in places(other) for other in group[1:]):
        return "its group runs elsewhere"
    if len(group) > 1 and chosen and any(_is_forbidden(draft, member, host.id) for member in group):
        return "its group may not run here"
    return ""


def _is_forbidden(draft: Draft, member: VmRecord, host: str) -> bool:
    ids = frozenset(other.id for other in partners(draft, member))
    return rank(draft, member, host) is None or bool(enemies_on(draft, member, host, besides=ids)) or host in member.failed_hosts


# --- hosts that close ---------------------------------------------------------------------------------------------------------


def maintenance_asked(draft: Draft, event: MaintenanceAsked) -> None:
    """Begin or end maintenance. The hold survives crashes and reboots of the host until an operator ends it."""
    host = draft.hosts.get(event.host)
    if host is not None:
        draft.put(replace(host, hold=Hold.DRAINING if event.is_on else Hold.NO))


def shutdown_asked(draft: Draft, event: ShutdownAsked) -> None:
    """Let a host go down by policy: `conditional` freezes for a reboot and recovers elsewhere for a power-off."""
    host = draft.hosts.get(event.host)
    if host is None:
        return
    match event.policy:
        case "migrate":
            closing = Closing.DRAIN
        case "freeze":
            closing = Closing.FREEZE
        case "failover":
            closing = Closing.RECOVER
        case _:
            closing = Closing.FREEZE if event.is_reboot else Closing.RECOVER
    draft.put(replace(host, closing=closing, is_reboot=event.is_reboot, closing_since_s=draft.now, may_go_down=False))


def close_hosts(draft: Draft) -> None:
    """End drains that are done, and let hosts go down whose guests have left or will not leave in time."""
    for host in sorted(draft.hosts.values(), key=lambda one: one.id):
        is_empty = not any(vm.desired is Desired.RUNNING for vm in draft.held_by(host.id))
        if host.hold is Hold.DRAINING and is_empty:
            draft.put(replace(draft.hosts[host.id], hold=Hold.HELD))
        if host.closing is Closing.NO or host.may_go_down or host.standing is not HostConnectivity.UP:
            continue
        is_late = draft.now - host.closing_since_s > draft.settings.drain_timeout_s
        if host.closing is not Closing.DRAIN or is_empty or is_late:
            draft.put(replace(draft.hosts[host.id], may_go_down=True))
            draft.do(GoDown(host=host.id, is_reboot=host.is_reboot))


# --- operators ----------------------------------------------------------------------------------------------------------------


def move_asked(draft: Draft, event: MoveAsked) -> None:
    """Carry out a move by hand, with its whole group, or refuse it with the reason."""
    vm = draft.vms.get(event.vm)
    if vm is None:
        return
    group = partners(draft, vm)
    why = _why_no_move(draft, group, event.target)
    if why:
        draft.do(Refuse(subject=vm.id, code="move-refused", message=f"{vm.id} cannot move to {event.target}: {why}"))
        return
    for member in group:
        if not member.holders:
            draft.put_vm(replace(member, host=event.target, epoch=member.epoch + 1))
        elif member.host != event.target:
            begin_move(draft, member, event.target, is_live=event.is_live, fallback="")


def _why_no_move(draft: Draft, group: list[VmRecord], target: str) -> str:
    host = draft.hosts.get(target)
    if host is None:
        return "there is no such host"
    refused = refusal(draft, host, group)
    if refused:
        return refused
    ids = frozenset(member.id for member in group)
    for member in group:
        if member.phase is not Phase.SETTLED:
            return f"{member.id} is {member.phase.value}"
        if rank(draft, member, target) is None:
            return f"a strict rule keeps {member.id} off it"
        enemies = enemies_on(draft, member, target, besides=ids)
        if enemies:
            return f"{member.id} is kept apart from {enemies[0]}, which is there or goes there"
    return "" if has_memory(draft, group[0], host) else "it has not enough memory left"
