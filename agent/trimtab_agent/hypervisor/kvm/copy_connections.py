"""The connections over which a migration's disks are copied: none outlives the link that it goes over by more than some seconds.

libvirt 9.0 notices soon that it lost the other libvirtd, and ends the migration. QEMU 7.2 waits for what it sent to the target's export
until TCP gives up, a quarter of an hour: where the disk was still being filled the job does not end for so long, and where memory was
on its way already QEMU's main loop waits (`bdrv_drain_all`), the guest and the monitor with it (both seen). By then QEMU cannot be told to
drop the connection (`yank`), so the kernel is told beforehand how long to try.
"""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog

from trimtab_agent.peer_check import MIGRATION_PORTS

log = structlog.get_logger(__name__)

GIVES_UP_AFTER_S = 15.0
"""More than a target's busy disk takes for a block; a connection that is given up for nothing ends a migration, and the guest stays."""
_PIDFD_GETFD = 438
"""The same number on every architecture (Linux 5.6, pidfd_getfd(2)); Python has no name for it."""
_ESTABLISHED = "01"
_SOCKET = "socket:["


def bound(process_id: int) -> int:
    """Let the kernel give up every connection of a QEMU to another host's migration ports once nothing that it sent was acknowledged for
    GIVES_UP_AFTER_S, or its window stayed closed. Return how many were bound; that the process is gone or the kernel refuses is logged.
    """
    count = 0
    try:
        with _opened(process_id) as pidfd:
            for descriptor in _sockets(process_id, _leaving(process_id)):
                _bound(pidfd, descriptor)
                count += 1
    except OSError as error:
        log.warning("connections that a disk is copied over may outlive their link", process_id=process_id, error=str(error))
    return count


def _leaving(process_id: int) -> frozenset[str]:
    """Return the inodes of the connections to others' migration ports in the process' network namespace."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process_id}/net/{table}").read_text().splitlines()[1:]:
            _, _, remote, state, *_, inode = line.split()[:10]
            if state == _ESTABLISHED and MIGRATION_PORTS[0] <= int(remote.rpartition(":")[2], 16) <= MIGRATION_PORTS[1]:
                found.add(inode)
    return frozenset(found)


def _sockets(process_id: int, inodes: frozenset[str]) -> Iterator[int]:
    """Yield the process' descriptors of these sockets; its others, of disks behind a network, are nobody's here."""
    for entry in Path(f"/proc/{process_id}/fd").iterdir() if inodes else ():
        target = ""
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            target = os.readlink(entry)
        if target.startswith(_SOCKET) and target.removeprefix(_SOCKET).removesuffix("]") in inodes:
            yield int(entry.name)


@contextlib.contextmanager
def _opened(process_id: int) -> Iterator[int]:
    pidfd = os.pidfd_open(process_id)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _bound(pidfd: int, descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ours = libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    if ours < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(fileno=ours) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * GIVES_UP_AFTER_S))
