"""A disk of a backup into an empty volume, and the proof that it is what was backed up (level L2).

The volume is a fresh file of ours, without a backing file, and is written as such (`volume_file`). Holes stay holes. Each piece is read back
from where it was written and compared with what was checked against its id; once all is durable, QEMU says where it finds each range of
the disk (`mapped_volume`), which has to be there and nowhere else. So nobody uses a volume of which any byte was not compared. Reading
all of it anew afterwards took a quarter of a restore's time, and proved nothing more.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trimtab_agent.backup.mapped_volume import first_difference, mapped
from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.volume_file import VolumeFile
from trimtab_protos.errors import Conflict, Internal, TrimtabError, Unavailable

EXPORT = "volume"
START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
OnProgress = Callable[[int, int], None]


def restore_disk(
    disk: DiskReader, file: Path, *, format: str, on_progress: OnProgress, open_volume: type[VolumeFile] = VolumeFile
) -> int:
    """Write the disk into the volume `file`, which exists, is empty and of its size; return the bytes written.

    Conflict `restore-differs` where reading back shows anything else, and where a chunk of the backup is damaged. The caller removes the
    volume after any error. `on_progress` gets bytes done and in all, from several threads; what it raises ends the restore.
    """
    total = sum(disk.manifest.length_of(chunk) for chunk, _ in disk.chunks())
    with open_volume(file, format=format, size_bytes=disk.manifest.size_bytes) as volume:
        lock, done = threading.Lock(), 0

        def write(at: int, content: bytes) -> None:
            nonlocal done
            volume.write(at, content)
            if not volume.reads_back(at, content):
                raise _differs(at)
            with lock:
                done += len(content)
                on_progress(done, total)

        written = disk.copy_to(write, place=volume.place)
        volume.finish()
    if format == "qcow2":
        ranges = ((chunk * disk.manifest.chunk_bytes, disk.manifest.length_of(chunk)) for chunk, _ in disk.chunks())
        with mapped(file) as told:
            elsewhere = first_difference(told, volume.places(ranges))
        if elsewhere is not None:
            raise _differs(elsewhere)
    return written


def _differs(offset: int) -> Conflict:
    return Conflict("restore-differs", f"what was written reads back differently at byte {offset}", offset=offset)


@contextlib.contextmanager
def served_volume(file: Path, *, format: str, socket: Path) -> Iterator[NbdClient]:
    """Lend a connection to a volume that nobody else uses."""
    options = ["--discard=unmap", "--detect-zeroes=unmap", "--cache=writeback"]
    with _served(file, format=format, socket=socket, options=options, contexts=(ALLOCATION,)) as client:
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
def read_only_network(
    opened: str, *, socket: Path, objects: Sequence[str] = (), pass_fds: Sequence[int] = ()
) -> Iterator[NbdClient]:
    """Lend a connection for reading what QEMU's own drivers open in the network; `objects` hold its secrets, in `pass_fds`."""
    named = [word for one in objects for word in ("--object", one)]
    command = [*_server(socket), "--read-only", *named, "--image-opts", opened]
    with _running(command, socket=socket, contexts=(ALLOCATION,), pass_fds=pass_fds) as client:
        yield client


@contextlib.contextmanager
def _served(
    file: Path, *, format: str, socket: Path, options: Sequence[str], contexts: Sequence[str] = ()
) -> Iterator[NbdClient]:
    command = [*_server(socket), f"--format={format}", *options, "--", str(file)]
    with _running(command, socket=socket, contexts=contexts) as client:
        yield client


def _server(socket: Path) -> list[str]:
    return ["qemu-nbd", "--persistent", f"--socket={socket}", f"--export-name={EXPORT}"]


@contextlib.contextmanager
def _running(
    command: Sequence[str], *, socket: Path, contexts: Sequence[str], pass_fds: Sequence[int] = ()
) -> Iterator[NbdClient]:
    socket.unlink(missing_ok=True)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=tuple(pass_fds),
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
