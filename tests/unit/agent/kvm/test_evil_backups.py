"""A disk of a backup may begin with any bytes, a guest's or a forger's: restored it is those bytes, and what they name is never read."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import pytest

from tests.unit.agent.backup.kit import CHUNK, Disk, MemoryBlobs, back_up, new_repository
from tests.unit.agent.kvm import factories as make
from tests.unit.agent.kvm.test_domain_xml import STAMP, TCG
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.restoring import read_only_volume
from trimtab_agent.backup.source import InstantSource
from trimtab_agent.hypervisor.kvm import domain_xml, volumes
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.filling import export_of
from trimtab_agent.hypervisor.kvm.image_header import read_qcow2
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.messages import DiskFormat, PoolSpec, VolumeSpec

SIZE_BYTES = 4 * make.MIB
CANARY = b"what no guest may read" * 64


@pytest.fixture
def canary(pool: PoolSpec) -> Path:
    """A file that lies where an image of the pool does, so that one who believes a header takes the volume for its clone."""
    path = Path(PoolLayout.of(pool).image("img-canary", DiskFormat.RAW))
    path.write_bytes(CANARY.ljust(SIZE_BYTES, b"\0"))
    return path


def evil_disks(canary: Path) -> Mapping[str, bytes]:
    name = str(canary).encode()
    data_file = (0x44415441).to_bytes(4, "big") + len(name).to_bytes(4, "big") + name
    return {
        "backing file": make.qcow2_header(backing=name, virtual_size_bytes=SIZE_BYTES),
        "backing file by its options": make.qcow2_header(
            backing=f'json:{{"driver":"file","filename":"{canary}"}}'.encode(), virtual_size_bytes=SIZE_BYTES
        ),
        "an export": make.qcow2_header(backing=b"nbd+unix:///b?socket=/run/s", virtual_size_bytes=SIZE_BYTES),
        "data file": make.qcow2_header(incompatible=4, extensions=data_file, virtual_size_bytes=SIZE_BYTES),
        "flat vmdk": f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 2 FLAT "{canary}" 0\n'.encode(),
    }


def restored(pool: PoolSpec, content: bytes, format: DiskFormat) -> VolumeSpec:
    disk = Disk(SIZE_BYTES // CHUNK)
    disk.content[: len(content)] = content
    repository = new_repository(MemoryBlobs())
    back_up(repository, disk, "bk-1")
    volume = VolumeSpec(volume_id="vol-01hdisk0", pool_id=pool.pool_id, format=format, size_bytes=SIZE_BYTES)
    backups = Backups(cast(Connection, None), instants=cast(InstantSource, None))
    with open_backup(repository, "vm-1", "bk-1") as reader:
        backups.restore_volume(volume, pool, reader.disk("vda"), on_progress=lambda _done, _total: None)
    return volume


@pytest.mark.parametrize("format", [DiskFormat.RAW, DiskFormat.QCOW2])
@pytest.mark.parametrize("kind", ["backing file", "backing file by its options", "an export", "data file", "flat vmdk"])
def test_a_restored_disk_is_its_bytes_whatever_they_name(
    pool: PoolSpec, layout: PoolLayout, canary: Path, tmp_path: Path, kind: str, format: DiskFormat
) -> None:
    content = evil_disks(canary)[kind]
    volume = restored(pool, content, format)
    file = Path(layout.volume(volume.volume_id, format))

    with read_only_volume(file, format=format.value, socket=tmp_path / "s.sock") as client:
        pieces = dict(client.read_pieces([(0, SIZE_BYTES)], SIZE_BYTES))
    assert pieces == {0: content.ljust(SIZE_BYTES, b"\0")}, "as its guest and its next backup read it"
    if format is DiskFormat.RAW:
        assert file.read_bytes() == pieces[0]
    else:
        with file.open("rb") as opened:
            assert read_qcow2(opened, file.stat().st_size).backing_file == "", "the header is ours"

    # Nobody who looks into volumes takes the disk's first bytes for a header.
    seen = volumes.observe(volume.volume_id, layout)
    assert (seen.size_bytes, volumes.clones_of("img-canary", layout)) == (SIZE_BYTES, ())
    assert export_of(volume.volume_id, layout) is None
    assert volumes.ensure(volume, layout).size_bytes == SIZE_BYTES
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        assert volumes.backing_file(directory, file.name) == ""
    finally:
        os.close(directory)


@pytest.mark.parametrize("format", [DiskFormat.RAW, DiskFormat.QCOW2])
def test_it_grows_as_what_it_is_and_its_guest_is_told_what_it_is(
    pool: PoolSpec, layout: PoolLayout, canary: Path, tmp_path: Path, format: DiskFormat
) -> None:
    content = evil_disks(canary)["backing file"]
    volume = restored(pool, content, format)
    grown = replace(volume, size_bytes=2 * SIZE_BYTES)
    assert volumes.grow(grown, layout).size_bytes == 2 * SIZE_BYTES
    file = Path(layout.volume(volume.volume_id, format))
    with read_only_volume(file, format=format.value, socket=tmp_path / "s.sock") as client:
        assert dict(client.read_pieces([(0, SIZE_BYTES)], SIZE_BYTES)) == {0: content.ljust(SIZE_BYTES, b"\0")}
    spec = make.domain(disks=(make.disk(format=format),), pools=(pool,))
    built = ElementTree.fromstring(domain_xml.build(spec, STAMP, TCG))
    [disk] = [one for one in built.findall("devices/disk") if one.find(f"source[@file='{file}']") is not None]
    driver = disk.find("driver")
    assert driver is not None
    assert driver.get("type") == format.value
