"""A volume that is written as a file is, for QEMU, the disk that was meant; until all of it is durable it is an empty one."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from trimtab_agent.backup.mapped_volume import first_difference, mapped
from trimtab_agent.backup.volume_file import Place, VolumeFile
from trimtab_protos.errors import Conflict

KIB, MIB = 1 << 10, 1 << 20
PIECE = 256 * KIB


def image(path: Path, size_bytes: int, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size_bytes)], check=True)
    return path


def qemu(*command: str, code: int = 0) -> str:
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout


def extents_of(file: Path) -> list[tuple[int, int]]:
    """Return begin and end of what QEMU takes for data."""
    found = json.loads(qemu("qemu-img", "map", "--output=json", "-f", "qcow2", str(file)))
    return [(one["start"], one["start"] + one["length"]) for one in found if not one["zero"]]


def test_qemu_finds_what_was_written_where_it_belongs_over_many_tables_and_counts(tmp_path: Path) -> None:
    size = 5 * 1024 * MIB + 3 * 512
    file = image(tmp_path / "disk.qcow2", size)
    offsets = [0, 512 * MIB - PIECE, 512 * MIB, 1024 * MIB + 7 * PIECE, size // PIECE * PIECE]
    with VolumeFile(file, format="qcow2", size_bytes=size) as volume:
        for offset in offsets[:-1]:
            volume.write(volume.place(offset, PIECE), (offset + 7).to_bytes(8, "big") * (PIECE // 8))
        # Room alone, so that there is more than one block of reference counts: a sparse file.
        for offset in range(2048 * MIB, 4608 * MIB, PIECE):
            volume.place(offset, PIECE)
        tail = size - offsets[-1]
        volume.write(volume.place(offsets[-1], tail), b"x" * tail)
        volume.finish()
    qemu("qemu-img", "check", "-q", "-f", "qcow2", str(file))
    for offset in offsets[:-1]:
        pattern = qemu("qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {offset + PIECE - 512} 16", str(file))
        assert " ".join(f"{one:02x}" for one in (offset + 7).to_bytes(8, "big")) in pattern
    assert "78 78" in qemu("qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {size - 512} 16", str(file))
    assert [begin for begin, _ in extents_of(file)] == offsets


def test_a_death_before_the_end_leaves_an_empty_volume_and_no_half_a_disk(tmp_path: Path) -> None:
    file = image(tmp_path / "disk.qcow2", 1024 * MIB)
    synced: list[list[tuple[int, int]]] = []

    def sync(descriptor: int) -> None:
        os.fdatasync(descriptor)
        synced.append(extents_of_copy(file, tmp_path))

    with VolumeFile(file, format="qcow2", size_bytes=1024 * MIB, sync=sync) as volume:
        for offset in range(0, 640 * MIB, 64 * MIB):
            volume.write(volume.place(offset, PIECE), b"\1" * PIECE)
        assert extents_of_copy(file, tmp_path) == []
        volume.finish()
    assert synced[0] == [], "nothing refers to data before it is durable"
    assert len(synced[-1]) == 10, "what refers to it is durable at the end"


def extents_of_copy(file: Path, folder: Path) -> list[tuple[int, int]]:
    """QEMU refuses to look at a file that is being filled: so it looks at a copy."""
    copy = folder / "copy.qcow2"
    subprocess.run(["cp", "--sparse=always", str(file), str(copy)], check=True)
    return extents_of(copy)


def test_a_volume_that_is_none_of_a_fresh_disk_is_not_written(tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2", MIB)
    for number, options in enumerate(
        (["-b", str(base), "-F", "qcow2"], ["-o", "cluster_size=4k"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"])
    ):
        file = image(tmp_path / f"{number}.qcow2", MIB, *options)
        before = file.read_bytes()
        with pytest.raises(Conflict) as refused:
            VolumeFile(file, format="qcow2", size_bytes=MIB)
        assert refused.value.code == "volume-not-empty"
        assert file.read_bytes() == before
    with pytest.raises(Conflict):
        VolumeFile(base, format="luks", size_bytes=MIB)


def test_qemu_says_where_it_finds_what_was_written_and_not_where_it_was_meant_to_be(tmp_path: Path) -> None:
    file, ranges = image(tmp_path / "disk.qcow2", 8 * MIB), [(0, PIECE), (2 * MIB, PIECE)]
    with VolumeFile(file, format="qcow2", size_bytes=8 * MIB) as volume:
        for offset, byte in ((0, b"a"), (2 * MIB, b"b")):
            at = volume.place(offset, PIECE)
            volume.write(at, byte * PIECE)
            assert volume.reads_back(at, byte * PIECE)
            assert not volume.reads_back(at, byte * (PIECE - 1) + b"c")
        volume.finish()

    def elsewhere(wanted: list[tuple[int, int]]) -> int | None:
        with mapped(file) as told:
            return first_difference(told, volume.places(wanted))

    assert elsewhere(ranges) is None
    assert elsewhere(ranges[:1]) == 2 * MIB, "data where a hole was meant"
    assert elsewhere([*ranges, (4 * MIB, PIECE)]) == 4 * MIB, "a hole where data was meant"
    with file.open("r+b") as opened:  # entries of the two pieces change places in the L2 table
        l1_at = struct.unpack(">Q", os.pread(opened.fileno(), 8, 40))[0]
        l2_at = struct.unpack(">Q", os.pread(opened.fileno(), 8, l1_at))[0] & ~(1 << 63)
        first, second = (os.pread(opened.fileno(), 32, l2_at + at) for at in (0, 256))
        os.pwrite(opened.fileno(), second, l2_at)
        os.pwrite(opened.fileno(), first, l2_at + 256)
    assert elsewhere(ranges) == 0
    with file.open("r+b") as opened:
        os.pwrite(opened.fileno(), second, l2_at + 256)
    with pytest.raises(Conflict) as inconsistent:
        elsewhere(ranges)
    assert inconsistent.value.code == "volume-inconsistent"


def test_ranges_are_compared_however_they_are_cut() -> None:
    told = [Place(0, 100, 1000), Place(100, 50, 2000), Place(200, 50, 3000)]
    wanted = [Place(0, 30, 1000), Place(30, 70, 1030), Place(100, 50, 2000), Place(200, 50, 3000)]
    assert first_difference(iter(told), wanted) is None
    assert first_difference(iter(wanted), told) is None
    assert first_difference(iter(told), [*wanted[:1], Place(30, 70, 1031), *wanted[2:]]) == 30
    assert first_difference(iter(told), wanted[:-1]) == 200
    assert first_difference(iter(told[:-1]), wanted) == 200
    assert first_difference(iter([]), []) is None
