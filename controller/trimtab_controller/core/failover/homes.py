"""Where a vm may run and where it runs best, by rules between vms and hosts. Pure; capacity is memory, load is the count of vms.

The placement engine decides in production among the hosts that this module leaves; here the choice is by fewest vms, then name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.records import (
    ApartRule,
    Closing,
    Desired,
    Hold,
    HostRecord,
    HostRule,
    Phase,
    TogetherRule,
    VmRecord,
    reaches_disks,
)
from trimtab_controller.core.lifecycle import HostConnectivity


@dataclass(frozen=True, slots=True)
class Choice:
    """`host` '' means none; `why` then names every host's reason."""

    host: str
    why: str = ""


def places(vm: VmRecord) -> frozenset[str]:
    """Return the hosts where the vm is, may be, or is going."""
    found = {holder.host for holder in vm.holders} | ({vm.move_to} if vm.move_to else set())
    return frozenset(found)


def refusal(draft: Draft, host: HostRecord, vms: Sequence[VmRecord] = (), *, is_last_resort: bool = False) -> str:
    """Return why no guest (of `vms`, where it is about these) may be placed on the host now, '' for no reason.

    `is_last_resort`: no host without a quarantine can take a guest that is down. One that was heard for a minute then may, however
    long its quarantine: where every host was lost some times within the hour, as by a bad switch, nothing would start for that hour.
    """
    if host.standing is not HostConnectivity.UP:
        return f"it is {host.standing.value}"
    if host.hold is not Hold.NO or host.is_cordoned:
        return "it is in maintenance" if host.hold is not Hold.NO else "it is cordoned"
    if host.closing is not Closing.NO:
        return "it is going down"
    if not host.has_storage and not (vms and all(reaches_disks(host, vm) for vm in vms)):
        return "its storage is lost"
    is_steady = draft.now - host.since_s >= draft.settings.steady_s
    if draft.now < host.quarantined_until_s and not (is_last_resort and is_steady):
        return f"it is in quarantine for {host.quarantined_until_s - draft.now:.0f} s more after {len(host.losses)} losses"
    if any(text.startswith(("commands", "renewals")) for text in host.degraded):
        return f"it is degraded: {host.degraded[0]}"
    return ""


def may_stay(host: HostRecord) -> bool:
    is_alive = host.standing in {HostConnectivity.UP, HostConnectivity.SUSPECT}
    return is_alive and host.hold is Hold.NO and host.closing is not Closing.DRAIN


def rank(draft: Draft, vm: VmRecord, host: str) -> int | None:
    """Return how much the rules prefer the host for this vm (higher is better), None where a strict rule forbids it."""
    best = 0
    for rule in draft.rules:
        if not isinstance(rule, HostRule) or vm.id not in rule.vms:
            continue
        if host in rule.hosts:
            best = max(best, 1 + rule.hosts[host])
        elif rule.is_strict:
            return None
    return best


def enemies_on(draft: Draft, vm: VmRecord, host: str, *, besides: frozenset[str] = frozenset()) -> list[str]:
    """Return the vms on (or going to) the host from which this one must be kept apart."""
    found = []
    for rule in draft.rules:
        if isinstance(rule, ApartRule) and vm.id in rule.vms:
            others = (draft.vms.get(other) for other in sorted(rule.vms - {vm.id} - besides))
            found += [other.id for other in others if other is not None and host in places(other)]
    return found


def partners(draft: Draft, vm: VmRecord) -> list[VmRecord]:
    """Return every vm that must run where this one runs, itself first."""
    ids = {vm.id}
    for rule in draft.rules:
        if isinstance(rule, TogetherRule) and vm.id in rule.vms:
            ids |= rule.vms
    others = [draft.vms[other] for other in sorted(ids - {vm.id}) if other in draft.vms]
    return [vm, *(other for other in others if other.desired is Desired.RUNNING and other.phase is not Phase.NEEDS_ATTENTION)]


def load(draft: Draft, host: str, *, besides: str = "") -> int:
    """Return how many running or starting vms the host has or expects."""
    return sum(1 for vm in draft.vms.values() if vm.id != besides and host in places(vm) and vm.desired is not Desired.DISABLED)


def has_memory(draft: Draft, vm: VmRecord, host: HostRecord) -> bool:
    if not host.memory_bytes:
        return True
    used = sum(other.memory_bytes for other in draft.vms.values() if other.id != vm.id and host.id in places(other))
    return used + vm.memory_bytes <= host.memory_bytes


def choose(draft: Draft, vm: VmRecord, *, is_start: bool = False, without: Iterable[str] = ()) -> Choice:
    """Return the best host for the vm. Hosts on which it failed to start are used only where no other is left."""
    tried = set(vm.failed_hosts)
    group = partners(draft, vm)
    for other in group:
        tried |= set(other.failed_hosts)
    choice = _choose(draft, group, is_start=is_start, without=set(without) | tried)
    if not choice.host and tried:
        choice = _choose(draft, group, is_start=is_start, without=set(without))
    if not choice.host and is_start:
        last = _choose(draft, group, is_start=is_start, without=set(without), is_last_resort=True)
        choice = last if last.host else choice
    return choice


def _choose(draft: Draft, group: list[VmRecord], *, is_start: bool, without: set[str], is_last_resort: bool = False) -> Choice:
    vm, ids = group[0], frozenset(member.id for member in group)
    found: list[tuple[int, bool, int, int, str]] = []
    reasons = []
    for host in sorted(draft.hosts.values(), key=lambda one: one.id):
        members_there = sum(1 for member in group if member.id != vm.id and host.id in places(member))
        is_home = is_start and _is_own_home(vm, host)
        why = _why_not(draft, group, host, ids, is_home=is_home, is_last_resort=is_last_resort)
        if not why and host.id in without:
            why = "it failed to start there"
        if not why and is_start and _starting_on(draft, host.id) >= draft.settings.starts_per_host:
            why = f"{draft.settings.starts_per_host} guests are starting there already"
            if is_home:
                return Choice("", f"{host.id}: {why}; it starts there next")
        if why:
            reasons.append(f"{host.id}: {why}")
            continue
        preference = max(rank(draft, member, host.id) or 0 for member in group)
        found.append((-members_there, not is_home, -preference, load(draft, host.id, besides=vm.id), host.id))
    return Choice(min(found)[4]) if found else Choice("", "; ".join(reasons) or "there is no host")


def _is_own_home(vm: VmRecord, host: HostRecord) -> bool:
    """A guest that ended with its host may start there again as soon as the host is back, quarantine or not."""
    return vm.host == host.id and host.standing is HostConnectivity.UP


def _why_not(
    draft: Draft, group: list[VmRecord], host: HostRecord, ids: frozenset[str], *, is_home: bool, is_last_resort: bool
) -> str:
    is_inhabited = any(host.id in places(member) for member in group)
    why = refusal(draft, host, group, is_last_resort=is_last_resort)
    if why and not ((is_home or is_inhabited) and may_stay(host) and "quarantine" in why):
        return why
    for member in group:
        if rank(draft, member, host.id) is None:
            return f"a strict rule keeps {member.id} off it"
        enemies = enemies_on(draft, member, host.id, besides=ids)
        if enemies:
            return f"{member.id} is kept apart from {enemies[0]}, which is there"
    local = next((member for member in group if member.is_local and member.host != host.id), None)
    if local is not None:
        return f"the disks of {local.id} lie on {local.host} alone"
    if not has_memory(draft, group[0], host):
        return "it has not enough memory left"
    frozen_home = draft.hosts.get(group[0].host)
    if frozen_home is not None and frozen_home.closing is Closing.FREEZE and host.id != frozen_home.id:
        return f"{group[0].id} waits for its host to come back from its reboot"
    return ""


def _starting_on(draft: Draft, host: str) -> int:
    return sum(1 for vm in draft.vms.values() if vm.phase is Phase.STARTING and vm.host == host)
