"""An exported backup reads as the disk was, to QEMU's programs and to our client; what is damaged is an error and never wrong bytes."""

import hashlib
import json
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import CHUNK, Disk, MemoryBlobs, back_up, new_repository, reopen, subject
from trimtab_agent.backup.export.content import DiskContent
from trimtab_agent.backup.export.files import image_file
from trimtab_agent.backup.export.nbd_server import NbdServer
from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.writer import begin_backup
from trimtab_protos.errors import TrimtabError, Unavailable


def made(seed: int = 1) -> tuple[MemoryBlobs, Disk]:
    """Return a repository with one backup of a disk: a run of data, holes, an end that is no whole chunk."""
    blobs = MemoryBlobs()
    disk = Disk(600, tail=1536, seed=seed)
    for chunk in (*range(100), *range(300, 340), 600):
        disk.write(chunk)
    back_up(new_repository(blobs), disk, "bk-1")
    return blobs, disk


@contextmanager
def exported(blobs: MemoryBlobs, path: Path, *, ahead_chunks: int = 16, offers_allocation: bool = True) -> Iterator[NbdServer]:
    with (
        open_backup(reopen(blobs), "vm-1", "bk-1") as reader,
        DiskContent(reader.disk("vda"), ahead_chunks=ahead_chunks) as content,
    ):
        server = NbdServer(path, {"vda": content}, offers_allocation=offers_allocation)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.close()
            thread.join(30)


def test_our_client_reads_what_was_backed_up_and_learns_where_zeros_are(tmp_path: Path) -> None:
    blobs, disk = made()
    with exported(blobs, tmp_path / "s"), NbdClient.connect(tmp_path / "s", "vda", contexts=[ALLOCATION]) as client:
        assert client.size_bytes == len(disk.content)
        assert client.read(0, len(disk.content)) == disk.content
        dice = random.Random(3)
        for _ in range(50):
            offset = dice.randrange(len(disk.content) - 1)
            length = dice.randrange(1, len(disk.content) - offset)
            assert client.read(offset, length) == disk.content[offset : offset + length]
        holes = [(one.offset // CHUNK, one.length // CHUNK) for one in client.extents(ALLOCATION) if one.flags]
        assert holes == [(100, 200), (340, 260)]


@pytest.mark.parametrize("ahead_chunks", [0, 4])
def test_qemu_and_nbdcopy_read_the_same(tmp_path: Path, ahead_chunks: int) -> None:
    blobs, disk = made()
    with exported(blobs, tmp_path / "s", ahead_chunks=ahead_chunks):
        uri = f"nbd+unix:///vda?socket={tmp_path / 's'}"
        for command in (
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(tmp_path / "out")],
            ["nbdcopy", "--connections=3", uri, str(tmp_path / "out")],
        ):
            subprocess.run(command, check=True, timeout=60)
            got = (tmp_path / "out").read_bytes()
            assert hashlib.sha256(got[: len(disk.content)]).digest() == hashlib.sha256(disk.content).digest()
            (tmp_path / "out").unlink()


@pytest.mark.parametrize("offers_allocation", [False, True])
def test_a_guest_whose_disk_is_filled_reads_no_wrong_byte_while_its_export_is_away(
    tmp_path: Path, offers_allocation: bool
) -> None:
    """QEMU's block-stream puts its copy-on-read filter over the layer; the guest reads through that, and then the export dies."""
    blobs, disk = made()
    layer, path = tmp_path / "layer.qcow2", tmp_path / "s"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(layer), str(len(disk.content))], check=True, timeout=60)
    served = {"driver": "nbd", "server": {"type": "unix", "path": str(path)}, "export": "vda"}
    backing = {"driver": "raw", "node-name": "backup", "file": served}
    over = {"driver": "qcow2", "file": {"driver": "file", "filename": str(layer)}, "backing": backing}
    chain = json.dumps({"driver": "copy-on-read", "bottom": "backup", "file": over})
    with exported(blobs, path, offers_allocation=offers_allocation) as server:
        guest = subprocess.Popen(
            ["qemu-io", f"json:{chain}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("read 0 4k\n")
        guest.stdin.flush()
        while "ops/sec" not in (line := guest.stdout.readline()):
            assert line, "qemu-io ended"
        server.close()
        said, _ = guest.communicate(f"read {50 * CHUNK} 64k\n", timeout=60)
    if offers_allocation:
        # Where this fails QEMU has mended its filter, and exports may tell again where zeros are.
        assert "read 65536/65536 bytes" in said, said
    else:
        assert "read failed: Input/output error" in said, said


def test_qemu_is_told_of_no_zeros_by_the_process_that_serves_it(tmp_path: Path) -> None:
    blobs, _disk = made()
    with exported(blobs, tmp_path / "s", offers_allocation=False), pytest.raises(TrimtabError):
        NbdClient.connect(tmp_path / "s", "vda", contexts=[ALLOCATION])


def test_a_damaged_chunk_is_an_error_and_its_neighbours_are_read(tmp_path: Path) -> None:
    blobs, disk = made()
    pack = max(blobs.names("packs/"), key=lambda name: len(blobs.blobs[name]))
    blobs.flip_bit(pack, 20 * (CHUNK + 40))  # within one of the first chunks, which are random and stored as they are
    bad = []
    with exported(blobs, tmp_path / "s"):
        for chunk in range(100):
            with NbdClient.connect(tmp_path / "s", "vda") as client:
                try:
                    assert client.read(chunk * CHUNK, CHUNK) == disk.chunk(chunk)
                except Unavailable:
                    bad.append(chunk)
    assert len(bad) == 1


def test_nothing_can_be_written_to_it(tmp_path: Path) -> None:
    blobs, disk = made()
    with exported(blobs, tmp_path / "s"), NbdClient.connect(tmp_path / "s", "vda") as client:
        with pytest.raises(TrimtabError):
            client.write(0, b"x" * 512)
        assert client.read(0, 512) == disk.content[:512]


def test_a_peer_that_speaks_nonsense_harms_nobody(tmp_path: Path) -> None:
    blobs, disk = made()
    with exported(blobs, tmp_path / "s"):
        dice = random.Random(9)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.connect(str(tmp_path / "s"))
                rude.sendall(dice.randbytes(200))
        with NbdClient.connect(tmp_path / "s", "vda") as client:
            assert client.read(CHUNK, CHUNK) == disk.chunk(1)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_file_of_a_backup_can_be_read_from_any_offset_and_is_what_qemu_expects(tmp_path: Path, format: str) -> None:
    blobs, chunk = MemoryBlobs(), 256 << 10
    disk = bytearray(41 * chunk + 512)
    dice = random.Random(4)
    for number in (0, 1, 7, 33, 41):
        begin = number * chunk
        disk[begin : begin + chunk] = dice.randbytes(min(chunk, len(disk) - begin))
    with begin_backup(new_repository(blobs), subject(), "bk-1") as writer:
        opened = writer.open_disk("vda", len(disk))
        for number in range(42):
            opened.put(number, bytes(disk[number * chunk : (number + 1) * chunk]))
        writer.commit([writer.finish(opened)], created_ms=1, consistency=Consistency.CRASH)
    with open_backup(reopen(blobs), "vm-1", "bk-1") as reader, DiskContent(reader.disk("vda")) as content:
        file = image_file(content, format)
        whole = file.read(0, file.size_bytes)
        for _ in range(30):
            offset = dice.randrange(file.size_bytes)
            length = dice.randrange(1, min(1 << 20, file.size_bytes - offset) + 1)
            assert file.read(offset, length) == whole[offset : offset + length]
            assert not whole[offset : offset + file.zeros_from(offset)].strip(b"\0")
    path, raw = tmp_path / "image", tmp_path / "raw"
    path.write_bytes(whole)
    if format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True, timeout=60)
    subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(raw)], check=True, timeout=60)
    assert raw.read_bytes() == disk
