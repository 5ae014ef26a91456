"""A post-copy whose connection broke: the guest's memory lies on both hosts, and neither runs it without the other.

What libvirt 9.0 calls broken is its own connection to the other libvirtd. QEMU has one of its own, which may be as good as ever: then
memory goes on as soon as the link is back, and libvirt ends the migration when QEMU has ended it. It may stand still, since TCP waits
longer and longer before it sends again. Or it ended, on one side or on both. libvirt resumes what ended on both sides only, and refuses
anything else ("QEMU reports migration is still running"). So what goes on is left alone, and what stands still is ended on both sides.
"""

import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import monitor
from trimtab_agent.hypervisor.kvm.domains import find
from trimtab_protos.errors import Internal

log = structlog.get_logger(__name__)

STANDS_STILL_AFTER_S = 6.0
"""Memory that did not move for so long is on a connection that is better begun anew."""
_ACTIVE, _PAUSED, _COMPLETED = "postcopy-active", "postcopy-paused", "completed"
_PORTS = {"qemu+tls": 16514, "qemu+tcp": 16509}
_CONNECT_TIMEOUT_S = 3.0


class Step(StrEnum):
    LET_GO_ON = "let_go_on"
    END_HERE = "end_here"
    RESUME = "resume"
    IS_OVER = "is_over"


@dataclass(slots=True)
class TornMigration:
    """The source's side of one, looked at again and again; `moved_s` is when memory was last seen to move."""

    moved_s: float
    sent_bytes: int = -1

    def look(self, status: str, sent_bytes: int, now_s: float) -> Step:
        """Return what to do next, from what QEMU says of its connection (`progress`)."""
        if status == _ACTIVE and sent_bytes > self.sent_bytes:
            self.sent_bytes, self.moved_s = sent_bytes, now_s
        if not status:
            return Step.IS_OVER
        if status == _COMPLETED:
            return Step.LET_GO_ON  # libvirt is about to end the guest here
        if status == _ACTIVE:
            return Step.END_HERE if now_s - self.moved_s > STANDS_STILL_AFTER_S else Step.LET_GO_ON
        return Step.RESUME


def end_connection(domain: Any) -> None:
    """Let QEMU end the connection that memory goes over, so that it can be begun anew; where it ended already nothing is done."""
    try:
        if progress(domain)[0] == _ACTIVE:
            monitor.ask(domain, "migrate-pause")
    except (libvirt.libvirtError, Internal) as error:
        log.info("the migration's connection is not ended", error=str(error)[:300])


def end_connection_there(libvirt_uri: str, vm_id: str) -> None:
    """Do the same on the target, which may not have seen that the connection is dead; where it is not reached, the next try may be."""
    place = urlsplit(libvirt_uri)
    try:
        # libvirt itself would wait for minutes for a host that says nothing.
        socket.create_connection((place.hostname or "", place.port or _PORTS[place.scheme]), _CONNECT_TIMEOUT_S).close()
        there = libvirt.open(libvirt_uri)
    except (OSError, libvirt.libvirtError) as error:
        log.info("the target is not reached", vm_id=vm_id, error=str(error)[:300])
        return
    try:
        domain = find(there, vm_id)
        if domain is not None:
            end_connection(domain)
    except libvirt.libvirtError as error:
        log.info("the target does not answer", vm_id=vm_id, error=str(error)[:300])
    finally:
        there.close()


def progress(domain: Any) -> tuple[str, int]:
    """Return how QEMU calls the migration and how many bytes of memory it sent; '' where there is no QEMU."""
    if not domain.isActive():
        return "", 0
    try:
        told = monitor.ask(domain, "query-migrate")
    except libvirt.libvirtError:
        if domain.isActive():
            raise
        return "", 0
    return str(told.get("status", "")), int(told.get("ram", {}).get("transferred", 0))
