"""The exports that guests of this host run on, and the files that are read out of backups.

An export is found by its socket and by what it answers there, never by what this process remembers: it may be of an earlier agent.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import structlog

from trimtab_agent.backup.access import Repositories
from trimtab_agent.backup.export.content import DiskContent
from trimtab_agent.backup.export.files import ImageFile, image_file
from trimtab_agent.backup.export.process import Order, export_name
from trimtab_agent.backup.nbd import NbdClient
from trimtab_agent.backup.repository.reader import BackupReader, open_backup
from trimtab_agent.clock import Clock
from trimtab_protos.errors import ErrorKind, Internal, TrimtabError, Unavailable, rebuild

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0
_FILES_OPEN = 3
_IDLE_S = 120.0


@dataclass(frozen=True, slots=True)
class Exported:
    """A disk of a backup, and the volume that lies over it."""

    repository: str
    vm_id: str
    backup_id: str
    disk: str


class Exports:
    """Starts and ends the processes. Thread-safe."""

    def __init__(self, repositories: Repositories, *, holder: str) -> None:
        self._repositories = repositories
        self._holder = holder
        self._lock = threading.Lock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def ensure(self, exported: Exported, path: Path, *, owner: tuple[int, int] | None) -> None:
        """Have the disk served at this socket. Unavailable `repository-not-open` where that needs a key that is not here now."""
        with self._lock:
            if answers(path, export_name(exported.backup_id, exported.disk)):
                return
            end(path)
            self._reap()
            order = Order(
                access=self._repositories.access(exported.repository),
                holder=self._holder,
                vm_id=exported.vm_id,
                backup_id=exported.backup_id,
                disk=exported.disk,
                socket=str(path),
                owner=owner,
            )
            self._children[str(path)] = _start(order)
            log.info("serving a backup to a guest", backup_id=exported.backup_id, disk=exported.disk, socket=str(path))

    def end(self, path: Path) -> None:
        """End what is served there. Idempotent."""
        with self._lock:
            end(path)
            self._reap()

    def _reap(self) -> None:
        for name, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[name]


def answers(path: Path, name: str) -> bool:
    """Tell whether a server at this socket has such an export now."""
    if not path.exists():
        return False
    try:
        NbdClient.connect(path, name).close()
    except TrimtabError:
        return False
    return True


def end(path: Path) -> None:
    """End the process that serves at this socket, whoever started it."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_END_TIMEOUT_S)
        try:
            peer.connect(str(path))
            process_id, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            # By a descriptor: the number may be another process's by the time that the signal is sent.
            process = os.pidfd_open(process_id)
        except OSError:
            process = -1
        if process >= 0:
            try:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                with contextlib.suppress(OSError):
                    while peer.recv(4096):  # its end is the end of this connection
                        pass
            except ProcessLookupError:
                pass
            finally:
                os.close(process)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _start(order: Order) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen(
        [sys.executable, "-m", "trimtab_agent.backup.export.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    timer = threading.Timer(START_TIMEOUT_S, child.kill)
    timer.start()
    try:
        child.stdin.write(order.encoded())
        child.stdin.close()
        said = child.stdout.readline()
    except BrokenPipeError:
        said = b""
    finally:
        timer.cancel()
        child.stdout.close()
    if not said:
        child.kill()
        raise Unavailable(
            "export-not-started", f"nothing served {order.disk} of {order.backup_id} within {START_TIMEOUT_S:.0f} s"
        )
    answer = json.loads(said)
    if answer:
        child.wait(_END_TIMEOUT_S)
        raise rebuild(ErrorKind(answer["kind"]), answer["code"], answer["message"])
    return child


class BackupFiles:
    """Reads disks of backups as files, piece by piece; what was read lately is kept open, under its lease. Thread-safe."""

    def __init__(self, repositories: Repositories, clock: Clock) -> None:
        self._repositories = repositories
        self._clock = clock
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[Exported, str], _OpenFile] = OrderedDict()

    def read(self, exported: Exported, format: str, offset: int, length: int) -> tuple[bytes, int, int]:
        """Return a piece, how many bytes of zeros come instead of one, and the file's size; past the end the piece is empty."""
        with self._lock:  # one piece at a time: reading ahead keeps both cores busy
            file = self._opened(exported, format)
            size_bytes = file.image.size_bytes
            length = max(0, min(length, size_bytes - offset))
            zeros = file.image.zeros_from(offset) if length else 0
            if zeros:
                return b"", zeros, size_bytes
            return file.image.read(offset, length) if length else b"", 0, size_bytes

    def close(self) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _opened(self, exported: Exported, format: str) -> "_OpenFile":
        now_s = self._clock.boottime_s()
        for key, idle in list(self._open.items()):
            if now_s - idle.used_s > _IDLE_S and key != (exported, format):
                self._open.pop(key).close()
        found = self._open.get((exported, format))
        if found is None:
            if len(self._open) >= _FILES_OPEN:
                self._open.popitem(last=False)[1].close()
            found = self._open[exported, format] = self._open_anew(exported, format)
        self._open.move_to_end((exported, format))
        found.used_s = now_s
        return found

    def _open_anew(self, exported: Exported, format: str) -> "_OpenFile":
        repository = self._repositories.open(exported.repository)
        with contextlib.ExitStack() as stack:
            stack.callback(repository.close)
            reader: BackupReader = stack.enter_context(open_backup(repository, exported.vm_id, exported.backup_id))
            content = stack.enter_context(DiskContent(reader.disk(exported.disk), cache_bytes=16 << 20))
            image = image_file(content, format)
            return _OpenFile(image, stack.pop_all())
        raise Internal("backup-not-opened", "the backup could not be opened")  # the block above returns or raises


class _OpenFile:
    def __init__(self, image: ImageFile, stack: contextlib.ExitStack) -> None:
        self.image = image
        self.used_s = 0.0
        self._stack = stack

    def close(self) -> None:
        self._stack.close()
