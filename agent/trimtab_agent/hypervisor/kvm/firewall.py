"""Keeps nftables as guests' cards and security groups say: before the first packet of a start, of a plugged card, of a migration.

What is installed is kept beside it in the runtime folder, one file per vm: rules that somebody flushed, as a firewall manager that
starts anew does, are put back within seconds, and a change of a group needs the groups only. Both are gone when the host boots, and
every start defines its domain first.
"""

import dataclasses
import json
import os
import threading
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm import nftables, packet_rules
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.packet_rules import FAMILY, TABLE, GuestPackets, tap_name
from trimtab_protos.messages import DomainSpec, NetworkKind, NicSpec
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

log = structlog.get_logger(__name__)

INCOMING_GRACE_S = 6 * 3600
"""From the moment that a host is readied for a guest; the migration's end cuts it to `RECEIVED_GRACE_S`."""
RECEIVED_GRACE_S = 120
"""For a guest that was just received: the time to take up its connections again, and then no more."""


class Firewall:
    """The rules of this host's guests. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def ensure(self, domain: DomainSpec, *, grace_s: int = 0) -> None:
        """Put the rules of a domain's cards in place; those of cards that it no longer has go. A newer firewall than the spec's stays."""
        firewall = domain.firewall or FirewallSpec(generation=0)
        keepers = {network.network_id for network in domain.networks if network.keeps_groups}
        wired = {network.network_id for network in domain.networks if network.kind is NetworkKind.WIRE}
        wanted = GuestPackets(
            vm_id=check_id(domain.vm_id, "vm_id"),
            nics=tuple(nic for nic in domain.nics if nic.network_id not in wired),
            firewall=firewall,
            elsewhere=tuple(nic.nic_id for nic in domain.nics if nic.network_id in keepers),
        )
        with self._lock:
            known = self._read(wanted.vm_id)
            if known is not None and known.firewall.generation > firewall.generation:
                wanted = dataclasses.replace(wanted, firewall=known.firewall)
            gone = {nic.nic_id for nic in known.nics} - {nic.nic_id for nic in wanted.nics} if known is not None else set()
            if not wanted.nics and not gone:
                return
            # Written first: what died in between is put right by `repair`.
            self._write(wanted)
            there = nftables.names()
            commands = packet_rules.install(wanted, there=there, grace_s=grace_s)
            nftables.apply([*packet_rules.table(), *commands, *packet_rules.remove(sorted(gone), there=there)])

    def set(self, vm_id: str, firewall: FirewallSpec) -> int:
        """Change what may reach a vm that is here; return the generation that it is under now, 0 where it is not here."""
        with self._lock:
            known = self._read(check_id(vm_id, "vm_id"))
            if known is None:
                return 0
            if known.firewall.generation < firewall.generation:
                known = dataclasses.replace(known, firewall=firewall)
                self._write(known)
                nftables.apply([*packet_rules.table(), *packet_rules.install(known, there=nftables.names())])
            return known.firewall.generation

    def drop(self, vm_id: str) -> None:
        """Forget a vm that is not on this host any more."""
        with self._lock:
            known = self._read(check_id(vm_id, "vm_id"))
            if known is None:
                return
            if known.nics:
                commands = packet_rules.remove([nic.nic_id for nic in known.nics], there=nftables.names())
                nftables.apply([*packet_rules.table(), *commands])
            self._path(vm_id).unlink(missing_ok=True)

    def repair(self) -> int:
        """Put back what somebody took away; return how many vms had lost rules."""
        with self._lock:
            known = [packets for path in sorted(self._folder.glob("*.json")) if (packets := self._read(path.stem)) is not None]
            if not known:
                return 0
            there = nftables.names()
            lost = [packets for packets in known if any(f"to-{tap_name(nic.nic_id)}" not in there for nic in packets.nics)]
            if lost:
                log.warning("packet rules were gone and are put back", vms=len(lost))
                commands = [command for packets in lost for command in packet_rules.install(packets, there=there)]
                nftables.apply([*packet_rules.table(), *commands])
            return len(lost)

    def _path(self, vm_id: str) -> Path:
        return self._folder / f"{vm_id}.json"

    def _read(self, vm_id: str) -> GuestPackets | None:
        try:
            found = json.loads(self._path(vm_id).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            log.error("file of packet rules cannot be read; the next definition writes it anew", vm_id=vm_id)
            return None
        firewall = found["firewall"]
        rules = tuple(FirewallRule(**rule) for rule in firewall.pop("rules"))
        nics = tuple(NicSpec(**{**nic, "addresses": tuple(nic["addresses"])}) for nic in found["nics"])
        # A file of an earlier release does not say it: groups are kept here then, too.
        elsewhere = tuple(found.get("elsewhere", ()))
        return GuestPackets(vm_id=vm_id, nics=nics, firewall=FirewallSpec(**firewall, rules=rules), elsewhere=elsewhere)

    def _write(self, packets: GuestPackets) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(packets.vm_id)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(dataclasses.asdict(packets)))
        os.replace(beside, path)


def forget_all(folder: Path) -> bool:
    """Take every rule of ours off this host; tell whether there were any."""
    # Files first: what is not known is not put back.
    for path in folder.glob("*.json"):
        path.unlink(missing_ok=True)
    if not nftables.names():
        return False
    nftables.apply([{"delete": {"table": {"family": FAMILY, "name": TABLE}}}])
    return True
