"""The process that serves one disk of a backup to QEMU: one of its own, so that a guest that runs on it outlives the agent's restarts.

It is told everything in one line on its standard input, the repository's key too, which is in no file and no argument; answers with one
line, and serves until SIGTERM. Its reader's lease keeps prune away from what it serves.
"""

import json
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab_agent.backup.access import Access, Repositories
from trimtab_agent.backup.export.content import DiskContent
from trimtab_agent.backup.export.nbd_server import NbdServer
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.clock import SystemClock
from trimtab_protos.errors import TrimtabError

RENEW_EVERY_S = 60.0
_NAME = "asked"
_ENDS = frozenset({signal.SIGTERM, signal.SIGINT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one process serves."""

    access: Access
    holder: str
    vm_id: str
    backup_id: str
    disk: str
    socket: str
    owner: tuple[int, int] | None = None
    """User and group who may connect."""

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def decode(line: bytes) -> Order:
    document: Mapping[str, Any] = json.loads(line)
    owner = document["owner"]
    access = Access(**document["access"])
    return Order(**{**document, "access": access, "owner": None if owner is None else (int(owner[0]), int(owner[1]))})


def export_name(backup_id: str, disk: str) -> str:
    """Return the name by which a disk is asked for: a socket that serves another backup does not answer to it."""
    return f"{backup_id}.{disk}"


def serve(order: Order) -> None:
    # Before any thread begins, so that none of them takes the signal that the main one waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    repositories = Repositories(SystemClock(), holder=order.holder)
    repositories.grant(_NAME, order.access, create=False)
    repository = repositories.open(_NAME)
    with open_backup(repository, order.vm_id, order.backup_id) as reader, DiskContent(reader.disk(order.disk)) as content:
        # QEMU's block-stream reads a guest's disk through a filter that takes an answer "no idea where zeros are, the connection is
        # gone" for "nothing to read": the guest gets whatever its buffer held, as if it had been read (7.2, block/copy-on-read.c). One
        # that was never told of zeros has nothing to ask; its read itself fails then, and the guest is paused.
        disks = {export_name(order.backup_id, order.disk): content}
        server = NbdServer(Path(order.socket), disks, owner=order.owner, offers_allocation=False)
        threading.Thread(target=server.serve, name="accept", daemon=True).start()
        _say({})
        while signal.sigtimedwait(_ENDS, RENEW_EVERY_S) is None:
            reader.renew()
        server.close()


def _say(answer: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdout.close()


def main() -> None:
    try:
        serve(decode(sys.stdin.buffer.readline()))
    except TrimtabError as error:
        if not sys.stdout.closed:
            _say({"kind": error.kind.value, "code": error.code, "message": error.message})
        sys.exit(1)


if __name__ == "__main__":
    main()
