"""Carries out what `trimtab_agent.ballooning` decides: reads the host and its guests, and tells each balloon its target.

A thread of its own asks, since statistics come from QEMU, which may hang; a guest that libvirt is busy with is left out of the round.
"""

import threading
import time
from collections import Counter
from typing import Any

import libvirt
import structlog

from trimtab_agent import ballooning
from trimtab_agent.ballooning import Change, GuestMemory, HostMemory, Remembered, Rules
from trimtab_agent.hypervisor.kvm import domain_facts, errors, observe, resource_xml
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.host_load import HostLoadReader
from trimtab_agent.hypervisor.kvm.identifiers import vm_id_of
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_agent.hypervisor.statistics import BalloonStatistics

log = structlog.get_logger(__name__)

EVERY_S = 5.0
"""How often guests tell their statistics, too (`domain_xml`)."""
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


class Balloons:
    """The balloons of this host's guests. `look` is called by one thread only, the rest by any."""

    def __init__(self, connection: Connection, load: HostLoadReader, rules: Rules) -> None:
        self._connection = connection
        self._load = load
        self._rules = rules
        self._remembered: dict[str, Remembered] = {}
        self._lock = threading.Lock()
        self._seen: tuple[BalloonStatistics, ...] = ()
        self._changes: Counter[str] = Counter()

    def statistics(self) -> tuple[BalloonStatistics, ...]:
        """Return what the last round saw, of guests with a floor."""
        with self._lock:
            return self._seen

    def changes(self) -> dict[str, int]:
        """Return how often targets were changed, by reason."""
        with self._lock:
            return dict(self._changes)

    def look(self) -> None:
        """Look at host and guests once, and change what has to change."""
        if not self._connection.is_up:
            return
        with self._connection.use("look at balloons") as connection:
            domains = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING)
            found = {guest.vm_id: (domain, guest) for domain in domains if (guest := _guest(domain)) is not None}
            guests = [guest for _domain, guest in found.values()]
            self._note(guests)
            if not guests:
                self._remembered = {}
                return
            round_ = ballooning.decide(self._host(), guests, self._remembered, now_s=time.monotonic(), rules=self._rules)
            self._remembered = dict(round_.remembered)
            for change in round_.changes:
                domain, guest = found[change.vm_id]
                self._set(domain, guest, change)

    def _host(self) -> HostMemory:
        load = self._load.read_memory()
        return HostMemory(total_mib=load.total_mib, available_mib=load.available_mib, pressure_percent=load.pressure_percent)

    def _note(self, guests: list[GuestMemory]) -> None:
        with self._lock:
            self._seen = tuple(
                BalloonStatistics(
                    guest.vm_id,
                    floor_mib=guest.floor_mib,
                    ceiling_mib=guest.ceiling_mib,
                    given_mib=guest.given_mib,
                    usable_mib=guest.usable_mib,
                )
                for guest in guests
            )

    def _set(self, domain: Any, guest: GuestMemory, change: Change) -> None:
        try:
            domain.setMemoryFlags(change.target_mib << 10, _LIVE)
        except libvirt.libvirtError as error:
            log.info("balloon not changed", vm_id=change.vm_id, error=error.get_error_message())
            return
        with self._lock:
            self._changes[change.why.value] += 1
        log.info(
            "balloon changed",
            vm_id=change.vm_id,
            why=change.why.value,
            from_mib=guest.given_mib,
            to_mib=change.target_mib,
            usable_mib=guest.usable_mib,
            floor_mib=guest.floor_mib,
            ceiling_mib=guest.ceiling_mib,
        )


def _guest(domain: Any) -> GuestMemory | None:
    """Return the guest's memory; None for one that is not ours, has no floor, moves away, or whose QEMU is busy."""
    try:
        if domain.controlInfo()[0] != libvirt.VIR_DOMAIN_CONTROL_OK:
            return None
        xml = domain.XMLDesc(0)
        floor_mib, facts = resource_xml.read_floor(parse(xml)), domain_facts.read(xml)
        if not floor_mib or facts.vm_id != vm_id_of(domain.name()) or observe.migration_operation(domain) is not None:
            return None
        statistics = domain.memoryStats()
    except libvirt.libvirtError as error:
        if not errors.is_gone(error):
            log.debug("balloon not seen", domain=domain.name(), error=error.get_error_message())
        return None
    # A kernel that does not reckon what is usable says what is unused, which is less.
    usable_kib = statistics.get("usable", statistics.get("unused"))
    told_at = statistics.get("last_update", 0)
    return GuestMemory(
        vm_id=facts.vm_id,
        floor_mib=floor_mib,
        ceiling_mib=facts.memory_mib,
        given_mib=statistics.get("actual", facts.memory_mib << 10) >> 10,
        usable_mib=usable_kib >> 10 if usable_kib is not None and told_at else None,
        swapped_in_kib=statistics.get("swap_in", 0),
        age_s=max(0.0, time.time() - told_at),
    )
