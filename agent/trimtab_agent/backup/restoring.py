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

from trimtab_agent.backup import extents
from trimtab_agent.backup.mapped_volume import first_difference, mapped
from trimtab_agent.backup.nbd import ALLOCATION, REQUEST_BYTES, STATUS_BYTES, ZERO, NbdClient
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.source import DiskContent
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


def restore_over(
    disk: DiskReader,
    opened: Callable[[bool], contextlib.AbstractContextManager[NbdClient]],
    *,
    is_empty: bool,
    on_progress: OnProgress,
) -> int:
    """Write the disk over what QEMU's own drivers open; return the bytes written. `opened(is_writable)` lends a connection to it.

    Unless it `is_empty` its holes are written too, and what is behind its end. Conflict `restore-differs`, and where a chunk of the
    backup is damaged: what it held before is lost by then, and what it holds is half of either. `on_progress` as with `restore_disk`.
    """
    total = sum(disk.manifest.length_of(chunk) for chunk, _ in disk.chunks())
    lock, done = threading.Lock(), 0
    with opened(True) as client:
        if client.size_bytes < disk.manifest.size_bytes:
            what = f"it has {client.size_bytes} bytes and the disk of the backup {disk.manifest.size_bytes}"
            raise Conflict("volume-size-differs", f"the backup does not fit into the volume: {what}", field="size_bytes")

        def write(at: int, content: bytes) -> None:
            nonlocal done
            with lock:
                client.begin_write(at, content)
                done += len(content)
                on_progress(done, total)

        for offset, length in () if is_empty else holes(disk, client.size_bytes):
            client.begin_zero(offset, length)
        written = disk.copy_to(write)
        client.flush()
    with opened(False) as readable:
        # What is behind the end of the backup's disk it says nothing of.
        readable.size_bytes = disk.manifest.size_bytes
        different = differs_at(disk, readable)
    if different is not None:
        raise _differs(different)
    return written


def holes(disk: DiskReader, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of what the backup holds nothing of in a volume of this size, in order."""
    at = 0
    for chunk, _ in disk.chunks():
        begin = chunk * disk.manifest.chunk_bytes
        if begin > at:
            yield at, begin - at
        at = begin + disk.manifest.length_of(chunk)
    if at < size_bytes:
        yield at, size_bytes - at


def differs_at(disk: DiskReader, client: DiskContent) -> int | None:
    """Return an offset at which a volume is not what was backed up, None where there is none.

    What the server says reads as zeros is not read: it must be a hole in the backup. `client` was connected with `base:allocation`.
    """
    chunk_bytes = disk.manifest.chunk_bytes
    for begin in range(0, client.size_bytes, STATUS_BYTES):  # asked and read in turn, so that memory does not grow with the disk
        length = min(STATUS_BYTES, client.size_bytes - begin)
        told = client.extents(ALLOCATION, offset=begin, length=length)
        holding = list(extents.with_data(told, chunk_bytes, zero=ZERO))
        at, end = begin // chunk_bytes, -(-(begin + length) // chunk_bytes)
        for first, after in [*holding, (end, end)]:
            missing = disk.first_content(at, first)
            if missing is not None:
                return missing * chunk_bytes
            at = after
        for offset, content in client.read_pieces(_requests(holding, chunk_bytes, client), chunk_bytes):
            if not disk.is_content(offset // chunk_bytes, content):
                return offset
    return None


def _requests(runs: Sequence[tuple[int, int]], chunk_bytes: int, client: DiskContent) -> Iterator[tuple[int, int]]:
    step = max(1, min(REQUEST_BYTES, client.request_max_bytes) // chunk_bytes) * chunk_bytes
    for first, end in runs:
        after = min(end * chunk_bytes, client.size_bytes)
        for offset in range(first * chunk_bytes, after, step):
            yield offset, min(step, after - offset)


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
def network_volume(
    opened: str, *, socket: Path, objects: Sequence[str] = (), pass_fds: Sequence[int] = (), is_writable: bool = False
) -> Iterator[NbdClient]:
    """Lend a connection to what QEMU's own drivers open in the network; `objects` hold its secrets, in `pass_fds`."""
    named = [word for one in objects for word in ("--object", one)]
    command = [*_server(socket), *(() if is_writable else ("--read-only",)), *named, "--image-opts", opened]
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
