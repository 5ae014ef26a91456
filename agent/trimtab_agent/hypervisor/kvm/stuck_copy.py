"""A disk whose copy to a migration's target stands still, since the connection that it goes over is dead.

libvirt 9.0 notices within seconds that it lost the other libvirtd, and asks QEMU to give the copy up. QEMU waits for an answer to what it
sent to the target, on a connection of its own, until TCP gives up after a quarter of an hour: for so long the migration would neither go
on nor end (seen with QEMU 7.2). Once QEMU is told to drop that connection libvirt ends the migration at once, and the guest stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import monitor
from trimtab_protos.errors import Internal

log = structlog.get_logger(__name__)

STANDS_STILL_AFTER_S = 15.0
"""More than libvirt's keepalive needs, and than a target's busy disk takes for a block; ended for nothing the guest still stays here."""
_MIGRATION_NODE = "migration-"
"""So libvirt begins the name of what a migration copies to; a guest may have other disks behind a network, which are left alone."""


@dataclass(slots=True)
class DiskCopy:
    """One migration's, looked at again and again; `moved_s` is when a disk was last seen to move."""

    moved_s: float
    done_bytes: int = -1

    def stands_still(self, statistics: Mapping[str, Any], now_s: float) -> bool:
        """Tell whether it did not move for too long, from what libvirt says of the job."""
        done_bytes = int(statistics.get("disk_processed", 0))
        if not statistics.get("disk_remaining") or done_bytes != self.done_bytes:
            self.done_bytes, self.moved_s = done_bytes, now_s
        return now_s - self.moved_s > STANDS_STILL_AFTER_S


def end_connections(domain: Any) -> None:
    """Let QEMU drop the connections that disks are copied over; where there are none any more nothing is done."""
    try:
        instances = [
            one for one in monitor.ask(domain, "query-yank") if str(one.get("node-name", "")).startswith(_MIGRATION_NODE)
        ]
        log.warning("the copy of a disk stands still", domain=domain.name(), connections=len(instances))
        if instances:
            monitor.ask(domain, "yank", instances=instances)
    except (libvirt.libvirtError, Internal) as error:
        log.info("the connections are not dropped", error=str(error)[:300])
