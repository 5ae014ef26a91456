"""What becomes of vms whose host is fenced or came back: holders are dropped on proof only, then they queue for a new home."""

from dataclasses import replace

from trimtab_controller.core.failover.detection import return_to_service
from trimtab_controller.core.failover.draft import Draft, holder_on, without_holder
from trimtab_controller.core.failover.effects import DestroyCopy, RemoveLeftover, StartVm
from trimtab_controller.core.failover.events import ClosedCleanly, SessionOpened
from trimtab_controller.core.failover.homes import choose
from trimtab_controller.core.failover.records import (
    GONE,
    NEVER_S,
    Closing,
    Desired,
    Holder,
    HostRecord,
    Phase,
    Proof,
    Seen,
    VmRecord,
)
from trimtab_controller.core.failover.start_groups import StartGroups
from trimtab_controller.core.lifecycle import HostConnectivity


def let_go(draft: Draft, host: HostRecord, proof: Proof) -> None:
    """Drop the fenced host as a holder of each vm that the proof covers."""
    for vm in draft.at_home_on(host.id):
        if vm.desired is Desired.STOPPED and not vm.holders:
            _rehome_stopped(draft, vm)
    for vm in draft.held_by(host.id):
        if not _covers(host, proof, vm):
            draft.put_vm(replace(vm, seen=Seen.UNKNOWN, seen_s=draft.now, why=_why_not_covered(host, vm)))
            continue
        rest = without_holder(vm, host.id)
        if rest.holders:
            # A migration was in flight: the other side is asked before anything else happens.
            draft.put_vm(replace(rest, sides={}, seen=Seen.UNKNOWN, seen_s=draft.now))
        else:
            orphan(draft, replace(rest, seen=Seen.ABSENT, seen_s=draft.now), because=f"{host.id} was fenced ({proof.value})")


def _covers(host: HostRecord, proof: Proof, vm: VmRecord) -> bool:
    match proof:
        case Proof.CLEAN_STOP:
            return host.clean_vms is not None and vm.id in host.clean_vms
        case Proof.LEASE_BOUND:
            # The warden kills exactly what may be restarted elsewhere.
            return (vm.is_kept and not vm.is_local) or vm.desired is Desired.DELETED
        case Proof.POWER_OFF | Proof.OPERATOR:
            return True


def _why_not_covered(host: HostRecord, vm: VmRecord) -> str:
    if vm.is_local:
        return _lost_with(host.id)
    return f"{host.id} is silent, and nothing proves that this guest ended"


def _lost_with(host_id: str) -> str:
    return f"its disks lie on {host_id} alone; it runs again when that host returns; else `trimtab backup restore` brings it back"


def orphan(draft: Draft, vm: VmRecord, *, because: str, is_recovery: bool = True) -> None:
    """Decide about a vm that nobody holds any more."""
    host = draft.hosts.get(vm.host)
    vm = replace(vm, move_to="", is_end_unknown=False, sides={}, token="")
    if vm.desired is Desired.DELETED:
        bury(draft, vm)
    elif vm.phase is Phase.NEEDS_ATTENTION or not vm.is_kept:
        draft.put_vm(vm)
    elif vm.desired is Desired.STOPPED:
        draft.put_vm(replace(vm, phase=Phase.SETTLED, why=""))
        _rehome_stopped(draft, vm)
    elif vm.is_corrupt:
        needs_attention(draft, vm, "its image is marked corrupt; starting it could destroy the rest: restore it from a backup")
    elif vm.is_local and host is not None and host.standing is HostConnectivity.FENCED:
        draft.put_vm(replace(vm, phase=Phase.SETTLED, why=_lost_with(vm.host)))
    else:
        draft.put_vm(
            replace(
                vm,
                phase=Phase.RECOVERING,
                since_s=draft.now,
                not_before_s=draft.now + vm.start_delay_s if is_recovery and vm.start_delay_s and not vm.group else NEVER_S,
                recoveries=vm.recoveries + is_recovery,
                why=f"waits for a home: {because}",
            )
        )


def _rehome_stopped(draft: Draft, vm: VmRecord) -> None:
    choice = choose(draft, vm)
    if choice.host and not vm.is_local:
        draft.put_vm(replace(vm, phase=Phase.SETTLED, host=choice.host, epoch=vm.epoch + 1, why=""))


def bury(draft: Draft, vm: VmRecord) -> None:
    """End a deleted vm; its id is never used again."""
    del draft.vms[vm.id]
    draft.tombstones |= {vm.id}


def needs_attention(draft: Draft, vm: VmRecord, why: str) -> None:
    draft.put_vm(replace(vm, phase=Phase.NEEDS_ATTENTION, why=why, since_s=draft.now))
    draft.alarm(vm.id, "vm-needs-attention", f"{vm.id}: {why}")


# --- the queue ---------------------------------------------------------------------------------------------------------------


def recover(draft: Draft) -> None:
    """Start those that may start, the most important first, within slots; the rest learn why they wait."""
    if draft.is_paused:
        return
    unheard = hosts_that_have_not_listed(draft)
    waiting = [vm for vm in draft.vms.values() if vm.phase is Phase.RECOVERING and not vm.holders]
    groups = StartGroups(draft) if waiting else None
    for queued in sorted(waiting, key=lambda vm: _urgency(draft, vm)):
        vm = draft.vms[queued.id]
        blocker = f"waits until {unheard[0]} has said what it holds" if unheard else _blocker(draft, vm, groups)
        if blocker:
            draft.put_vm(replace(vm, why=blocker))
            continue
        choice = choose(draft, vm, is_start=True)
        if choice.host:
            start(draft, vm, choice.host)
        else:
            draft.put_vm(replace(vm, why=f"no host can take it: {choice.why}"))


def hosts_that_have_not_listed(draft: Draft) -> list[str]:
    """Return the live hosts whose list this leader has not seen; lost ones are the ladder's."""
    alive = {HostConnectivity.UP, HostConnectivity.SUSPECT}
    return sorted(host.id for host in draft.hosts.values() if host.standing in alive and not host.has_listed)


def _urgency(draft: Draft, vm: VmRecord) -> tuple[int, int, int, float, str]:
    bound_vms = {other for rule in draft.rules if vm.id in rule.vms and not hasattr(rule, "hosts") for other in rule.vms}
    return -vm.priority, vm.group_order, -len(bound_vms), vm.since_s, vm.id


def _blocker(draft: Draft, vm: VmRecord, groups: StartGroups | None) -> str:
    """Return what the vm has to wait for, '' for nothing."""
    if draft.now < vm.not_before_s:
        return vm.why
    return groups.blocker(vm) if groups is not None else ""


def start(draft: Draft, vm: VmRecord, host: str) -> None:
    """Assign and start: the epoch rises in the transaction that assigns; a lower one never acts again."""
    vm = replace(
        vm,
        host=host,
        epoch=vm.epoch + 1,
        holders=(Holder(host=host, epoch=vm.epoch + 1),),
        phase=Phase.STARTING,
        since_s=draft.now,
        seen=Seen.UNKNOWN,
        seen_s=draft.now,
        why=f"starting on {host}",
    )
    draft.put_vm(vm)
    draft.do(StartVm(vm=vm.id, host=host, epoch=vm.epoch, is_recovery=vm.recoveries > 0))


# --- the return of the dead ---------------------------------------------------------------------------------------------------


def session_opened(draft: Draft, event: SessionOpened) -> None:
    """Take a host's whole list. What it no longer has is gone; what moved away from it must not run there."""
    host = draft.hosts.get(event.host)
    if host is None or (host.power is not None and host.power.is_under_way and host.standing is HostConnectivity.LOST):
        return
    listed = {vm_id: (epoch, seen) for vm_id, epoch, seen in event.domains}
    _check_power_proof(draft, host, event)
    host = draft.put(replace(host, boot_id=event.boot_id or host.boot_id, has_listed=True))
    if host.standing in {HostConnectivity.LOST, HostConnectivity.FENCED}:
        host = return_to_service(draft, host, "it came back and listed what it holds")
    elif host.standing is HostConnectivity.SUSPECT or host.closing is not Closing.NO:
        host = return_to_service(draft, host, "it opened a new session")
    for vm in draft.held_by(host.id):
        _compare(draft, vm, host.id, listed.get(vm.id))
    for vm in draft.at_home_on(host.id):
        # Its disks waited here while the host was away.
        if vm.is_local and not vm.holders and vm.desired is Desired.RUNNING and vm.phase is Phase.SETTLED:
            orphan(draft, vm, because=f"{host.id} is back", is_recovery=False)
    for vm_id, (epoch, seen) in sorted(listed.items()):
        _put_away(draft, host.id, vm_id, epoch, seen)


def _check_power_proof(draft: Draft, host: HostRecord, event: SessionOpened) -> None:
    """A host that was off comes back in another boot. One that does not was never off, whatever its power device said."""
    is_same_boot = bool(event.boot_id) and event.boot_id == host.boot_id
    if host.standing is HostConnectivity.FENCED and host.proof is Proof.POWER_OFF and is_same_boot:
        what = (
            "comes back in the boot in which it was lost: it was never off, although its power device had said so. Its guests may have "
            f"run twice; look at their disks, and at the device: `trimtab fence remove {host.id}`"
        )
        draft.alarm(host.id, "fence-false", f"{host.id} {what}")


def _compare(draft: Draft, vm: VmRecord, host: str, found: tuple[int, Seen] | None) -> None:
    holder = holder_on(vm, host)
    assert holder is not None
    if vm.phase in {Phase.STARTING, Phase.MOVING} and len(vm.holders) == 1 and vm.phase is Phase.STARTING:
        return  # its operation goes on, and says how it ended
    if found is not None and found[1] not in GONE and found[0] >= holder.epoch:
        if vm.phase is not Phase.MOVING:
            draft.put_vm(replace(vm, seen=found[1], seen_s=draft.now, epoch=max(vm.epoch, found[0]), why=""))
        return
    if vm.phase is Phase.MOVING and len(vm.holders) > 1:
        return  # the move's own end decides about both sides
    vm = without_holder(vm, host)
    orphan(draft, replace(vm, seen=Seen.ABSENT, seen_s=draft.now), because=f"{host} came back without it")


def _put_away(draft: Draft, host: str, vm_id: str, epoch: int, seen: Seen) -> None:
    vm = draft.vms.get(vm_id)
    if vm is None and vm_id not in draft.tombstones:
        return  # unmanaged: shown, counted, never touched
    if vm is not None and holder_on(vm, host) is not None:
        return
    if vm is not None and seen not in GONE and (epoch > vm.epoch or (epoch == vm.epoch and not vm.holders)):
        _adopt(draft, vm, host, epoch, seen)
    elif seen not in GONE:
        draft.do(DestroyCopy(vm=vm_id, host=host, epoch=epoch))
        draft.alarm(vm_id, "stale-copy", f"{host} came back running {vm_id} at epoch {epoch}, which is not its any more")
    elif vm is None:
        draft.do(RemoveLeftover(vm=vm_id, host=host))
    else:
        record = draft.hosts[host]
        draft.put(replace(record, leftovers=record.leftovers | {vm_id}))


def _adopt(draft: Draft, vm: VmRecord, host: str, epoch: int, seen: Seen) -> None:
    """Take a running copy over that our store does not know of: it lost the transaction that assigned it."""
    holders = (*vm.holders, Holder(host=host, epoch=epoch))
    vm = replace(vm, host=host, epoch=epoch, holders=holders, phase=Phase.SETTLED, seen=seen, seen_s=draft.now)
    draft.put_vm(replace(vm, why="" if len(holders) == 1 else "adopted; its former host has not said yet that it is gone"))
    draft.alarm(vm.id, "vm-adopted", f"{host} runs {vm.id} at epoch {epoch}, which the store did not know; it is taken over")


def clear_leftovers(draft: Draft) -> None:
    """Remove what moved vms left behind, once their new home was seen running."""
    for host in [one for one in draft.hosts.values() if one.leftovers and one.standing is HostConnectivity.UP]:
        done = {vm_id for vm_id in host.leftovers if _is_proven_elsewhere(draft, vm_id, host.id)}
        for vm_id in sorted(done):
            draft.do(RemoveLeftover(vm=vm_id, host=host.id))
        if done:
            draft.put(replace(host, leftovers=host.leftovers - done))


def _is_proven_elsewhere(draft: Draft, vm_id: str, host: str) -> bool:
    vm = draft.vms.get(vm_id)
    if vm is None:
        return True
    return vm.host != host and vm.phase is Phase.SETTLED and vm.seen is Seen.RUNNING


def closed_cleanly(draft: Draft, event: ClosedCleanly) -> None:
    host = draft.hosts.get(event.host)
    if host is not None:
        draft.put(replace(draft.note(host, f"its agent stopped {len(event.vms)} guests"), clean_vms=event.vms))
