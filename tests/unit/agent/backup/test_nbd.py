"""Reading an export against QEMU's own server: what is dirty, what is allocated, every byte; and what a broken one is told as."""

import json
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import MemoryBlobs, new_repository, restore, subject
from tests.unit.agent.waiting import until_now
from trimtab_agent.backup.copying import Copied, copy_disk
from trimtab_agent.backup.extents import ChunkRun, plan, touched
from trimtab_agent.backup.nbd import ALLOCATION, DIRTY, HOLE, ZERO, Extent, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency, Manifest
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.writer import begin_backup
from trimtab_agent.backup.restoring import restore_disk
from trimtab_agent.backup.volume_file import VolumeFile
from trimtab_protos.errors import Conflict, NotFound, TrimtabError, Unavailable

MIB = 1 << 20
SIZE = 40 * MIB + 5 * 512
BITMAP = "qemu:dirty-bitmap:b0"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def write_image(image: Path, offset: int, content: bytes) -> None:
    piece = image.with_suffix(".piece")
    piece.write_bytes(content)
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {piece} {offset} {len(content)}", str(image))


def listens(path: Path) -> bool:
    """qemu-nbd binds its socket, then opens the image, then listens."""
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(path))
        except OSError:
            return False
    return True


@contextmanager
def served(image: Path, *arguments: str, format_: str = "qcow2") -> Iterator[Path]:
    """Serve an image by qemu-nbd until the block ends; give its socket."""
    path = image.with_suffix(f".{random.randrange(1 << 30)}.sock")
    server = subprocess.Popen(
        ["qemu-nbd", "-t", "-f", format_, "-k", str(path), "-x", "vda", "-e", "4", "--discard=unmap", *arguments, str(image)]
    )
    try:
        until_now(lambda: listens(path), what="qemu-nbd to listen", deadline_s=30)
        yield path
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # seen once on a machine under heavy load; all was flushed before
            server.kill()
            server.wait(20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image with data at both ends and in the middle, a zeroed range, and a bitmap that is active since then."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    dice = random.Random(1)
    write_image(path, 0, dice.randbytes(700_416))
    write_image(path, 9 * MIB, dice.randbytes(3 * MIB))
    write_image(path, SIZE - 512, dice.randbytes(512))
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -z {10 * MIB} {MIB}", str(path))
    run("qemu-img", "bitmap", "--add", "-g", "65536", str(path), "b0")
    return path


def whole(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    return raw.read_bytes()


def test_extents_are_those_that_qemu_tells(image: Path) -> None:
    write_image(image, 20 * MIB + 4096, b"x" * 4096)
    with served(image, "-r", "-B", "b0") as path:
        with NbdClient.connect(path, "vda", contexts=[ALLOCATION, BITMAP]) as client:
            assert client.size_bytes == SIZE
            dirty = [extent for extent in client.extents(BITMAP) if extent.flags & DIRTY]
            allocation = list(client.extents(ALLOCATION))
        told = json.loads(run("nbdinfo", "--map", "--json", f"nbd+unix:///vda?socket={path}"))
    assert dirty == [Extent(20 * MIB, 65536, DIRTY)]
    assert merge_flags(allocation) == [(entry["offset"], entry["length"], entry["type"]) for entry in told]
    assert sum(extent.length for extent in allocation) == SIZE


def merge_flags(extents: list[Extent]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for extent in extents:
        if found and found[-1][2] == extent.flags:
            found[-1] = (found[-1][0], found[-1][1] + extent.length, extent.flags)
        else:
            found.append((extent.offset, extent.length, extent.flags))
    return found


def test_every_byte_comes_as_it_is(image: Path) -> None:
    content = whole(image)
    with served(image, "-r") as path, NbdClient.connect(path, "vda") as client:
        pieces = dict(client.read_pieces(((at, min(MIB, SIZE - at)) for at in range(0, SIZE, MIB)), 256 * 1024))
        middle = client.read(9 * MIB + 512, 3072)
    assert b"".join(pieces[offset] for offset in sorted(pieces)) == content
    assert middle == content[9 * MIB + 512 :][:3072]


def test_what_is_written_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    content = os.urandom(MIB + 512)
    with served(path) as served_at, NbdClient.connect(served_at, "vda") as client:
        client.write(MIB, content)
        client.flush()
    assert whole(path) == bytes(MIB) + content + bytes(SIZE - 2 * MIB - 512)


def back_up_image(repository: Repository, image: Path, backup_id: str, *, base_id: str | None = None) -> tuple[Manifest, Copied]:
    bitmap = BITMAP if base_id else None
    arguments = ["-r", *(["-B", "b0"] if bitmap else [])]
    with (
        served(image, *arguments) as path,
        NbdClient.connect(path, "vda", contexts=[ALLOCATION, *([bitmap] if bitmap else [])]) as client,
        begin_backup(repository, subject(), backup_id, base_id=base_id) as writer,
    ):
        base = writer.base.disk("vda") if writer.base else None
        disk = writer.open_disk("vda", client.size_bytes, base=base)
        copied = copy_disk(client, disk, bitmap=bitmap, on_progress=lambda _done, _total: None)
        part = writer.finish(disk, dirty_bytes=copied.dirty_bytes)
        return writer.commit([part], created_ms=repository.clock.now_ms(), consistency=Consistency.CRASH), copied


def test_a_full_and_an_increment_read_only_what_they_must_and_restore_byte_identical(image: Path) -> None:
    repository = new_repository(MemoryBlobs())
    first = whole(image)
    _, full = back_up_image(repository, image, "bk-1")
    dice = random.Random(2)
    write_image(image, 300_000 // 512 * 512, dice.randbytes(8192))
    write_image(image, 30 * MIB, dice.randbytes(100 * 512))
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -z {9 * MIB} {MIB}", str(image))

    _, increment = back_up_image(repository, image, "bk-2", base_id="bk-1")

    assert restore(repository, "bk-1") == first
    assert restore(repository, "bk-2") == whole(image)
    assert full.read_bytes < 4 * MIB, "holes and zeros are not read"
    assert increment.read_bytes <= 3 * 256 * 1024
    assert increment.hole_bytes == MIB


class Forgetful(VolumeFile):
    """Keeps other bytes at one place than it was told."""

    def write(self, at: int, content: bytes) -> None:
        super().write(at, b"evil" + content[4:] if not self.has_lied else content)
        self.has_lied = True

    has_lied = False


class Misplacing(VolumeFile):
    """Lets the disk begin with what lies somewhere else."""

    def finish(self) -> None:
        super().finish()
        l1_at = int.from_bytes(os.pread(self._descriptor, 8, 40))
        l2_at = int.from_bytes(os.pread(self._descriptor, 8, l1_at)) & ~(1 << 63)
        entries = [os.pread(self._descriptor, 8, l2_at + 8 * number) for number in (0, 1)]
        os.pwrite(self._descriptor, b"".join(reversed(entries)), l2_at)


def test_a_restored_volume_is_read_back_and_compared(image: Path, tmp_path: Path) -> None:
    repository = new_repository(MemoryBlobs())
    back_up_image(repository, image, "bk-1")
    target, other = tmp_path / "restored.qcow2", tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(target), str(SIZE))
    seen: list[tuple[int, int]] = []
    with open_backup(repository, "vm-1", "bk-1") as reader:
        disk = reader.disk("vda")
        written = restore_disk(disk, target, format="qcow2", on_progress=lambda done, total: seen.append((done, total)))
        assert whole(target) == whole(image)
        assert seen[-1] == (written, written)
        assert target.stat().st_size < 5 * MIB, "holes stay holes"
        for wrong in (Forgetful, Misplacing):
            run("qemu-img", "create", "-q", "-f", "qcow2", str(other), str(SIZE))
            with pytest.raises(Conflict) as differs:
                restore_disk(disk, other, format="qcow2", on_progress=lambda _done, _total: None, open_volume=wrong)
            assert differs.value.code == "restore-differs", wrong


def test_a_raw_volume_is_restored_sparse(image: Path, tmp_path: Path) -> None:
    repository = new_repository(MemoryBlobs())
    back_up_image(repository, image, "bk-1")
    target = tmp_path / "restored.raw"
    target.touch()
    os.truncate(target, SIZE)
    with open_backup(repository, "vm-1", "bk-1") as reader:
        restore_disk(reader.disk("vda"), target, format="raw", on_progress=lambda _done, _total: None)
    assert target.read_bytes() == whole(image)
    assert target.stat().st_blocks * 512 < 5 * MIB, "holes stay holes"


def test_a_volume_of_another_size_or_in_use_is_not_written(image: Path, tmp_path: Path) -> None:
    repository = new_repository(MemoryBlobs())
    back_up_image(repository, image, "bk-1")
    target = tmp_path / "small.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(target), str(MIB))
    with open_backup(repository, "vm-1", "bk-1") as reader:
        disk = reader.disk("vda")
        with pytest.raises(Conflict) as refused:
            restore_disk(disk, target, format="qcow2", on_progress=lambda _done, _total: None)
        assert refused.value.code == "volume-size-differs"
        with served(target) as path:
            NbdClient.connect(path, "vda").close()  # it listens before it has the image open
            with pytest.raises(Conflict) as locked:
                restore_disk(disk, target, format="qcow2", on_progress=lambda _done, _total: None)
        assert locked.value.code == "image-locked"


def test_a_missing_export_or_bitmap_is_told(image: Path) -> None:
    with served(image, "-r") as path:
        with pytest.raises(NotFound) as refused:
            NbdClient.connect(path, "vdb")
        assert refused.value.code == "export-not-found"
        with pytest.raises(Conflict) as missing:
            NbdClient.connect(path, "vda", contexts=[ALLOCATION, BITMAP])
        assert missing.value.code == "context-missing"
    with pytest.raises(Unavailable):
        NbdClient.connect(path, "vda")


def test_a_guest_that_stops_meanwhile_breaks_the_backup_off_and_lists_nothing(image: Path) -> None:
    repository = new_repository(MemoryBlobs())
    with served(image, "-r") as path:
        client = NbdClient.connect(path, "vda", contexts=[ALLOCATION])
        writer = begin_backup(repository, subject(), "bk-1")
        disk = writer.open_disk("vda", client.size_bytes)
    # The server is gone.
    with pytest.raises(TrimtabError) as lost, writer:
        copy_disk(client, disk, bitmap=None, on_progress=lambda _done, _total: None)
    client.close()
    assert lost.value.code == "disk-export-lost"
    assert repository.list_backups().manifests == []


def test_a_server_that_speaks_something_else_is_told(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            peer.close()

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(TrimtabError) as told:
            NbdClient.connect(path, "vda")
        server.join()
    assert told.value.code == "nbd-protocol"


def test_chunks_to_read_are_those_touched_and_not_zero() -> None:
    extents = [Extent(0, 10, 1), Extent(10, 90, 0), Extent(100, 100, 1), Extent(200, 100, 0), Extent(300, 1, 1)]
    assert list(touched(extents, 100, flag=1)) == [(0, 2), (3, 4)]
    assert list(plan([(0, 2), (3, 9)], [(1, 4), (5, 6)])) == [
        ChunkRun(0, 1, is_hole=True),
        ChunkRun(1, 1, is_hole=False),
        ChunkRun(3, 1, is_hole=False),
        ChunkRun(4, 1, is_hole=True),
        ChunkRun(5, 1, is_hole=False),
        ChunkRun(6, 3, is_hole=True),
    ]
    assert HOLE | ZERO == 3
