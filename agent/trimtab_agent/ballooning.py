"""Decides how much memory the balloon of each guest leaves it. Pure: no clock, no libvirt.

A guest was promised its ceiling and agreed to live with its floor. While the host has memory to spare, every guest has its ceiling.

    host short (little available, or work waits for memory) ─► guests with most to spare give, a bounded step each round
    host between the marks                                  ─► nothing changes: the gap between the marks is the hysteresis
    host has plenty                                         ─► guests get back, a bounded step each round, within what is spare
    guest short (little usable, or it swaps in)             ─► it has its ceiling back at once, whatever the host thinks of it
    guest silent (no statistics, or old ones)               ─► the same: nobody knows what it needs, as while it boots

Never is a guest asked to go below its floor, nor below what it uses with a margin on top: a guest that was squeezed to 128 of 192 MiB
without looking killed its processes. What the host then lacks, the host has to bear: the ceiling is what was promised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

DEFAULT_LOW_PERMILLE = 100
DEFAULT_HIGH_PERMILLE = 200
_WHOLE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How eager the balloons are."""

    low_permille: int = DEFAULT_LOW_PERMILLE
    """Guests give while less of the host's memory than this is available."""
    high_permille: int = DEFAULT_HIGH_PERMILLE
    """Guests get back while more than this is; above `low_permille`, or they would give and get in turns."""
    pressure_percent: int = 5
    """Guests give while tasks of the host waited for memory in more than this share of the last 10 s."""
    step_permille: int = 100
    """Of a guest's ceiling: most that it gives or gets in one round, unless it is short."""
    margin_permille: int = 125
    """Of a guest's ceiling: what it keeps above what it uses."""
    margin_min_mib: int = 32
    fresh_s: float = 20.0
    """Older statistics are none."""
    rest_s: float = 120.0
    """A guest that was short gives nothing for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    total_mib: int
    available_mib: int
    pressure_percent: int = 0
    """Share of the last 10 s in which something waited for memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMemory:
    """One running guest that has a floor."""

    vm_id: str
    floor_mib: int
    ceiling_mib: int
    given_mib: int
    """What its balloon leaves it now."""
    usable_mib: int | None = None
    """What its programs could still take without swapping, as its kernel reckons, caches that it can drop among it; None: unknown."""
    swapped_in_kib: int = 0
    """Since it booted."""
    age_s: float = 0.0
    """Of these figures."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What of a guest is kept from round to round."""

    swapped_in_kib: int
    rests_until_s: float = 0.0


class Why(StrEnum):
    HOST_SHORT = "host-short"
    HOST_HAS_PLENTY = "host-has-plenty"
    GUEST_SHORT = "guest-short"
    GUEST_SILENT = "guest-silent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    vm_id: str
    target_mib: int
    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round decided, and what the next one must know."""

    changes: tuple[Change, ...]
    remembered: Mapping[str, Remembered] = field(default_factory=dict)


def decide(
    host: HostMemory, guests: Sequence[GuestMemory], remembered: Mapping[str, Remembered], *, now_s: float, rules: Rules
) -> Round:
    """Return the new targets, at most one for each guest."""
    changes: dict[str, Change] = {}
    kept = {guest.vm_id: _remember(guest, remembered.get(guest.vm_id), now_s=now_s, rules=rules) for guest in guests}
    for guest in guests:
        why = _cry_of(guest, remembered.get(guest.vm_id), rules)
        if why is not None and guest.given_mib < guest.ceiling_mib:
            changes[guest.vm_id] = Change(vm_id=guest.vm_id, target_mib=guest.ceiling_mib, why=why)
    calm = [guest for guest in guests if _cry_of(guest, remembered.get(guest.vm_id), rules) is None]
    low_mib, high_mib = (host.total_mib * mark // _WHOLE for mark in (rules.low_permille, rules.high_permille))
    if host.available_mib < low_mib or host.pressure_percent > rules.pressure_percent:
        # Under pressure alone no figure says how much is missing: half of what is kept free, and another look.
        missing_mib = max(low_mib - host.available_mib, low_mib // 2 if host.pressure_percent > rules.pressure_percent else 0)
        rested = [guest for guest in calm if kept[guest.vm_id].rests_until_s <= now_s]
        changes |= _take(rested, missing_mib, rules)
    elif host.available_mib > high_mib:
        changes |= _give(calm, host.available_mib - high_mib, rules)
    return Round(changes=tuple(changes[vm_id] for vm_id in sorted(changes)), remembered=kept)


def least_mib(guest: GuestMemory, rules: Rules) -> int:
    """Return the lowest target that the guest may be given: its floor, or what it uses and a margin, its ceiling at most."""
    if guest.usable_mib is None:
        return guest.ceiling_mib
    used_mib = max(0, guest.given_mib - guest.usable_mib)
    return min(guest.ceiling_mib, max(guest.floor_mib, used_mib + margin_mib(guest, rules)))


def margin_mib(guest: GuestMemory, rules: Rules) -> int:
    return max(rules.margin_min_mib, guest.ceiling_mib * rules.margin_permille // _WHOLE)


def _cry_of(guest: GuestMemory, before: Remembered | None, rules: Rules) -> Why | None:
    """Return why the guest must have everything at once; None where it is well."""
    if guest.usable_mib is None or guest.age_s > rules.fresh_s:
        return Why.GUEST_SILENT
    swaps_in = before is not None and guest.swapped_in_kib > before.swapped_in_kib
    if guest.usable_mib < margin_mib(guest, rules) // 2 or swaps_in:
        return Why.GUEST_SHORT
    return None


def _remember(guest: GuestMemory, before: Remembered | None, *, now_s: float, rules: Rules) -> Remembered:
    was_short = _cry_of(guest, before, rules) is not None
    rests_until_s = now_s + rules.rest_s if was_short else before.rests_until_s if before is not None else 0.0
    return Remembered(guest.swapped_in_kib, rests_until_s)


def _take(guests: Sequence[GuestMemory], missing_mib: int, rules: Rules) -> dict[str, Change]:
    """Have those with most to spare give first, until what is missing is found."""
    changes = {}
    spare = {guest.vm_id: guest.given_mib - least_mib(guest, rules) for guest in guests}
    for guest in sorted(guests, key=lambda each: (-spare[each.vm_id], each.vm_id)):
        taken_mib = min(spare[guest.vm_id], _step_mib(guest, rules), missing_mib)
        if taken_mib <= 0:
            continue
        missing_mib -= taken_mib
        target_mib = guest.given_mib - taken_mib
        changes[guest.vm_id] = Change(vm_id=guest.vm_id, target_mib=target_mib, why=Why.HOST_SHORT)
    return changes


def _give(guests: Sequence[GuestMemory], spare_mib: int, rules: Rules) -> dict[str, Change]:
    """Give back to those with least usable memory first, within what the host has to spare."""
    changes = {}
    for guest in sorted(guests, key=lambda each: (each.usable_mib or 0, each.vm_id)):
        given_mib = min(guest.ceiling_mib - guest.given_mib, _step_mib(guest, rules), spare_mib)
        if given_mib <= 0:
            continue
        spare_mib -= given_mib
        target_mib = guest.given_mib + given_mib
        changes[guest.vm_id] = Change(vm_id=guest.vm_id, target_mib=target_mib, why=Why.HOST_HAS_PLENTY)
    return changes


def _step_mib(guest: GuestMemory, rules: Rules) -> int:
    return max(1, guest.ceiling_mib * rules.step_permille // _WHOLE)
