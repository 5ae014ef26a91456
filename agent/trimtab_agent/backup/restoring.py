"""A disk of a backup into an empty volume, and the proof that it is what was backed up (level L2).

The volume is written through `qemu-nbd`, which knows its format by name and never by its content; it is a fresh file of ours, without a
backing file. Holes stay holes. What was written is flushed, read back and compared before anybody may use it.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_protos.errors import Conflict, Internal, TrimtabError, Unavailable

EXPORT = "volume"
START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
OnProgress = Callable[[int, int], None]


def restore_disk(disk: DiskReader, file: Path, *, format: str, socket: Path, on_progress: OnProgress) -> int:
    """Write the disk into the volume `file`, which exists, is empty and of its size; return the bytes written.

    Conflict `restore-differs` where reading back shows anything else, and where a chunk of the backup is damaged. The caller removes the
    volume after any error. `on_progress` gets bytes done and in all, from several threads; what it raises ends the restore.
    """
    total = sum(disk.manifest.length_of(chunk) for chunk, _ in disk.chunks())
    with served_volume(file, format=format, socket=socket) as client:
        if client.size_bytes != disk.manifest.size_bytes:
            raise Conflict(
                "volume-size-differs",
                f"the volume has {client.size_bytes} bytes and the disk of the backup {disk.manifest.size_bytes}",
                field="size_bytes",
            )
        lock, done = threading.Lock(), 0

        def write(offset: int, content: bytes) -> None:
            nonlocal done
            with lock:
                client.write(offset, content)
                done += len(content)
                on_progress(done, total)

        written = disk.copy_to(write)
        client.flush()
        differs_at = disk.compare(client.read)
    if differs_at is not None:
        raise Conflict("restore-differs", f"what was written reads back differently at byte {differs_at}", offset=differs_at)
    return written


@contextlib.contextmanager
def served_volume(file: Path, *, format: str, socket: Path) -> Iterator[NbdClient]:
    """Lend a connection to a volume that nobody else uses."""
    options = ["--discard=unmap", "--detect-zeroes=unmap", "--cache=writeback"]
    with _served(file, format=format, socket=socket, options=options) as client:
        yield client


@contextlib.contextmanager
def read_only_volume(
    file: Path, *, format: str, socket: Path, bitmap: str = "", contexts: Sequence[str] = (ALLOCATION,)
) -> Iterator[NbdClient]:
    """Lend a connection for reading a volume whose vm does not run, with a persistent bitmap of it where one is named."""
    options = ["--read-only", "--cache=none", *([f"--bitmap={bitmap}"] if bitmap else [])]
    with _served(file, format=format, socket=socket, options=options, contexts=contexts) as client:
        yield client


@contextlib.contextmanager
def _served(
    file: Path, *, format: str, socket: Path, options: Sequence[str], contexts: Sequence[str] = ()
) -> Iterator[NbdClient]:
    socket.unlink(missing_ok=True)
    command = ["qemu-nbd", "--persistent", f"--format={format}", f"--socket={socket}", f"--export-name={EXPORT}"]
    command += [*options, "--", str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            with _connected(server, socket, contexts) as client:
                yield client
        finally:
            server.terminate()
            try:
                server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
            socket.unlink(missing_ok=True)


def _connected(server: "subprocess.Popen[str]", socket: Path, contexts: Sequence[str]) -> NbdClient:
    """Connect once it listens. It binds its socket, then opens the file, then listens, and tells nobody of any of it."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return NbdClient.connect(socket, EXPORT, contexts=list(contexts))
        except Unavailable:
            if server.poll() is not None:
                raise _not_served(server) from None
            if time.monotonic() > deadline_s:
                raise Internal("volume-not-served", f"qemu-nbd did not serve the volume within {START_TIMEOUT_S:.0f} s") from None
        time.sleep(0.02)


def _not_served(server: "subprocess.Popen[str]") -> TrimtabError:
    assert server.stderr is not None
    detail = server.stderr.read(400)
    if "lock" in detail:
        return Conflict("image-locked", "the volume is in use by another QEMU, on this host or on another", detail=detail)
    return Internal("volume-not-served", f"qemu-nbd does not open the volume: {detail}")
