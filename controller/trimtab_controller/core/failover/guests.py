"""What hosts say about single guests: how starts and stops ended, guests that ended alone, guests without storage.

A guest that ends alone starts again on its own host first, later after each crash, and is left to its owner after the fifth.
"""

from dataclasses import replace

from trimtab_controller.core.failover.draft import Draft, holder_on, without_holder
from trimtab_controller.core.failover.effects import DestroyCopy, Inspect, StopVm
from trimtab_controller.core.failover.events import MarkedCorrupt, Observed, StartEnded, StopEnded
from trimtab_controller.core.failover.homes import choose
from trimtab_controller.core.failover.moves import observe_side
from trimtab_controller.core.failover.records import (
    GONE,
    NEVER_S,
    Desired,
    Holder,
    HostRecord,
    Phase,
    Seen,
    VmRecord,
    reaches_disks,
)
from trimtab_controller.core.failover.recovery import bury, hosts_that_have_not_listed, needs_attention, orphan, start
from trimtab_controller.core.failover.start_groups import StartGroups
from trimtab_controller.core.lifecycle import HostConnectivity


def start_ended(draft: Draft, event: StartEnded) -> None:
    """Take the proven end of a start; one of a lower epoch says nothing about the present."""
    vm = draft.vms.get(event.vm)
    if vm is None or event.epoch != vm.epoch or vm.phase is not Phase.STARTING:
        return
    if event.is_running:
        vm = replace(vm, phase=Phase.SETTLED, seen=Seen.RUNNING, seen_s=draft.now, ran_s=draft.now, why="")
        draft.put_vm(replace(vm, restarts=0, relocations=0, failed_hosts=()))
        return
    vm = replace(without_holder(vm, event.host), seen=Seen.ABSENT, seen_s=draft.now)
    if vm.desired is not Desired.RUNNING or vm.is_corrupt:
        orphan(draft, replace(vm, phase=Phase.SETTLED), because=event.why)
    elif vm.restarts < vm.max_restart:
        start(draft, replace(vm, restarts=vm.restarts + 1), event.host)
    elif vm.relocations < vm.max_relocate:
        failed = tuple(dict.fromkeys((*vm.failed_hosts, event.host)))
        vm = replace(vm, restarts=0, relocations=vm.relocations + 1, failed_hosts=failed)
        draft.put_vm(replace(vm, phase=Phase.RECOVERING, since_s=draft.now, not_before_s=NEVER_S, why=event.why))
    else:
        needs_attention(draft, vm, f"it failed to start on {', '.join((*vm.failed_hosts, event.host))}: {event.why}")


def stop_ended(draft: Draft, event: StopEnded) -> None:
    vm = draft.vms.get(event.vm)
    if vm is None or holder_on(vm, event.host) is None:
        return
    if not event.is_gone:
        needs_attention(draft, vm, f"it does not stop: {event.why}")
        return
    vm = replace(without_holder(vm, event.host), phase=Phase.SETTLED, seen=Seen.STOPPED, seen_s=draft.now, why="")
    if vm.desired is Desired.DELETED and not vm.holders:
        bury(draft, vm)
    elif vm.desired is Desired.RUNNING and not vm.holders:
        orphan(draft, vm, because="it was stopped and is wished to run")
    else:
        draft.put_vm(vm)


def observed(draft: Draft, event: Observed) -> None:
    """Take what a host with a live session says about one of our domains."""
    vm = draft.vms.get(event.vm)
    if vm is None:
        return
    holder = holder_on(vm, event.host)
    if holder is None:
        _stranger(draft, vm, event)
    elif vm.phase is Phase.MOVING:
        observe_side(draft, vm, event.host, event.seen)
    elif event.seen not in GONE:
        _alive(draft, vm, event)
    elif event.epoch < holder.epoch and vm.phase is Phase.STARTING:
        return  # said before the start
    elif vm.phase is not Phase.STARTING:
        _ended(draft, without_holder(vm, event.host), event)


def _stranger(draft: Draft, vm: VmRecord, event: Observed) -> None:
    if event.seen in GONE:
        return
    if not vm.holders and vm.phase in {Phase.SETTLED, Phase.NEEDS_ATTENTION, Phase.RECOVERING}:
        # Moved or started behind our back while nobody held it: its place is adopted, it is not started twice.
        epoch = max(vm.epoch, event.epoch)
        held = (Holder(host=event.host, epoch=epoch),)
        phase = Phase.SETTLED if vm.phase is Phase.RECOVERING else vm.phase
        draft.put_vm(replace(vm, host=event.host, epoch=epoch, holders=held, phase=phase, seen=event.seen, seen_s=draft.now))
        return
    draft.alarm(vm.id, "stale-copy", f"{event.host} runs {vm.id}, which belongs to {vm.host}")
    if event.epoch < vm.epoch:
        draft.do(DestroyCopy(vm=vm.id, host=event.host, epoch=event.epoch))


def _alive(draft: Draft, vm: VmRecord, event: Observed) -> None:
    why = vm.why
    if event.is_io_error:
        why = f"paused by an I/O error: {event.host} does not reach its storage"
    elif vm.seen is Seen.PAUSED and event.seen is Seen.RUNNING:
        why = ""
    since = vm.since_s if vm.seen is event.seen else draft.now
    has_lost_storage = event.is_io_error and event.seen is Seen.PAUSED
    draft.put_vm(replace(vm, seen=event.seen, seen_s=draft.now, since_s=since, why=why, has_lost_storage=has_lost_storage))


def _ended(draft: Draft, vm: VmRecord, event: Observed) -> None:
    vm = replace(vm, seen=event.seen, seen_s=draft.now)
    if vm.phase is Phase.STOPPING or not event.was_crash or vm.desired is not Desired.RUNNING:
        was_taken_off = vm.phase is Phase.STOPPING and vm.desired is Desired.RUNNING
        because = f"it was taken off {event.host}" if was_taken_off else "it ended"
        orphan(draft, replace(vm, phase=Phase.SETTLED), because=because)
        return
    settings = draft.settings
    crashes = (*(at for at in vm.crashes if draft.now - at < settings.crash_window_s), draft.now)
    vm = replace(vm, crashes=crashes)
    if vm.is_corrupt:
        orphan(draft, vm, because="it ended alone")
    elif len(crashes) >= settings.crash_limit:
        minutes = settings.crash_window_s / 60
        needs_attention(draft, vm, f"it crashed {len(crashes)} times within {minutes:.0f} minutes; it is not started again")
    else:
        delay_s = settings.crash_backoff_s * 2 ** (len(crashes) - 1)
        why = f"it ended alone on {event.host}; it starts again there in {delay_s:.0f} s"
        draft.put_vm(replace(vm, phase=Phase.RESTARTING, since_s=draft.now, not_before_s=draft.now + delay_s, why=why))


def restart_crashed(draft: Draft) -> None:
    """Start those whose back-off is over: on their own host where it can, else elsewhere.

    In the order of their groups: hosts that lost power and came back before anybody missed them have guests that ended, too.
    """
    if draft.is_paused or hosts_that_have_not_listed(draft):
        return
    due = [vm for vm in draft.vms.values() if vm.phase is Phase.RESTARTING and draft.now >= vm.not_before_s]
    groups = StartGroups(draft) if due else None
    for vm in sorted(due, key=lambda one: (-one.priority, one.group_order, one.id)):
        blocker = groups.blocker(vm) if groups is not None else ""
        if blocker:
            draft.put_vm(replace(vm, why=blocker))
            continue
        host = draft.hosts.get(vm.host)
        is_home_alive = host is not None and host.standing is HostConnectivity.UP and reaches_disks(host, vm)
        if is_home_alive:
            start(draft, vm, vm.host)
        elif host is None or host.standing is not HostConnectivity.SUSPECT:
            orphan(draft, vm, because="its host is not there")


def watch_starts(draft: Draft) -> None:
    """Ask about starts that do not end, and about guests that their storage left."""
    for vm in sorted(draft.vms.values(), key=lambda one: one.id):
        if vm.phase is Phase.STARTING and draft.now - vm.since_s > draft.settings.start_timeout_s:
            draft.do(Inspect(vm=vm.id, host=vm.host))
        if vm.phase is Phase.SETTLED and vm.seen is Seen.PAUSED and vm.has_lost_storage and vm.is_kept:
            _leave_dead_storage(draft, vm, draft.hosts.get(vm.host))


def _leave_dead_storage(draft: Draft, vm: VmRecord, host: HostRecord | None) -> None:
    """Take a guest off a host that lost the storage; it moves only after its process was seen gone."""
    if host is None or reaches_disks(host, vm) or host.standing is not HostConnectivity.UP or vm.is_local or draft.is_paused:
        return
    if draft.now - host.has_storage_since_s < draft.settings.storage_grace_s or not choose(draft, vm).host:
        return
    why = f"taken off {host.id}, which lost its storage; it starts elsewhere once its process is gone"
    draft.put_vm(replace(vm, phase=Phase.STOPPING, since_s=draft.now, why=why))
    draft.do(DestroyCopy(vm=vm.id, host=host.id, epoch=vm.epoch))


def stop(draft: Draft, vm: VmRecord, *, timeout_s: float = 60.0) -> None:
    draft.put_vm(replace(vm, phase=Phase.STOPPING, since_s=draft.now))
    for holder in vm.holders:
        draft.do(StopVm(vm=vm.id, host=holder.host, epoch=vm.epoch, timeout_s=timeout_s))


def marked_corrupt(draft: Draft, event: MarkedCorrupt) -> None:
    vm = draft.vms.get(event.vm)
    if vm is not None:
        draft.put_vm(replace(vm, is_corrupt=True))
