"""A guest may begin its own raw disk like an image that names a file of its host: whatever is done to the disk, it is its bytes."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.agent.kvm.test_evil_backups import CANARY, SIZE_BYTES, canary, evil_disks
from trimtab_agent.backup.restoring import read_only_volume
from trimtab_agent.hypervisor.kvm import move_files, moves, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import DiskFormat, PoolSpec, VolumeSpec
from trimtab_protos.volume_messages import VolumeMove

__all__ = ["canary"]
KINDS = ["backing file", "backing file by its options", "an export", "data file", "flat vmdk"]


def written(pool: PoolSpec, layout: PoolLayout, content: bytes) -> tuple[VolumeSpec, Path]:
    """Return a raw volume into which its guest has written this."""
    volume = VolumeSpec(volume_id="vol-01hdisk0", pool_id=pool.pool_id, format=DiskFormat.RAW, size_bytes=SIZE_BYTES)
    volumes.ensure(volume, layout)
    file = Path(layout.volume(volume.volume_id, DiskFormat.RAW))
    with file.open("r+b") as opened:
        opened.write(content)
    return volume, file


@pytest.mark.parametrize("to", [DiskFormat.RAW, DiskFormat.QCOW2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_goes_to_another_pool_is_its_bytes_there(
    pool: PoolSpec, layout: PoolLayout, canary: Path, tmp_path: Path, kind: str, to: DiskFormat
) -> None:
    content = evil_disks(canary)[kind]
    volume, file = written(pool, layout, content)
    other = PoolSpec(pool_id="pool-other", path=str(tmp_path / "other"))
    Path(other.path).mkdir()
    there = PoolLayout.of(other)
    there.create_subdirectories()
    move = VolumeMove(
        volume_id=volume.volume_id,
        source_pool=pool,
        target_pool=other,
        source_format=DiskFormat.RAW,
        target_format=to,
        size_bytes=SIZE_BYTES,
    )
    move_files.copy(move, volumes.CopyWatch(cancelled=threading.Event()))
    moved = Path(there.volume(volume.volume_id, to))
    with read_only_volume(moved, format=to.value, socket=tmp_path / "s.sock") as client:
        assert dict(client.read_pieces([(0, SIZE_BYTES)], SIZE_BYTES)) == {0: content.ljust(SIZE_BYTES, b"\0")}
    assert CANARY not in moved.read_bytes(), "what it names was not read"
    assert file.read_bytes() == content.ljust(SIZE_BYTES, b"\0")
    assert f'type="{to.value}"' in moves.mirror_xml(move), "as under a guest: nobody looks what it might be"


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_grows_by_the_size_that_is_recorded_and_not_by_what_it_says(
    pool: PoolSpec, layout: PoolLayout, canary: Path, kind: str
) -> None:
    content = evil_disks(canary)[kind]
    volume, file = written(pool, layout, content)
    before = canary.read_bytes()
    grown = replace(volume, size_bytes=2 * SIZE_BYTES)
    for _twice in range(2):
        assert volumes.grow(grown, layout).size_bytes == 2 * SIZE_BYTES
    assert file.read_bytes() == content.ljust(2 * SIZE_BYTES, b"\0"), "no header was written anew, nothing was read in"
    with pytest.raises(TrimtabError) as refused:
        volumes.grow(volume, layout)
    assert refused.value.code == "volume-shrink"
    assert canary.read_bytes() == before, "nor was it written to"


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_lies_over_it_and_none_is_merged_into_it(pool: PoolSpec, layout: PoolLayout, canary: Path, kind: str) -> None:
    content = evil_disks(canary)[kind]
    volume, file = written(pool, layout, content)
    over = replace(volume, layer_id="lay-1", format=DiskFormat.QCOW2, base_volume_id=volume.volume_id)
    with pytest.raises(TrimtabError) as refused:
        volumes.ensure(over, layout)
    assert refused.value.code == "volume-differs", "it is raw, and layers lie over qcow2 only"
    clone = replace(volume, volume_id="vol-01hclone", format=DiskFormat.QCOW2, copy_volume_id=volume.volume_id)
    with pytest.raises(TrimtabError):
        volumes.ensure(clone, layout)
    assert file.read_bytes() == content.ljust(SIZE_BYTES, b"\0")
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    with layout.open("volumes") as directory:
        assert volumes.frozen_names(directory) <= {""}, "it lies over nothing, whatever it says"
    volumes.refuse_if_below("vol-01hother", layout)
