"""Volumes: made whole or not at all, compared, and never looked for through a link."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.kvm.factories import MIB, BytesReader, Control, upload
from trimtab_agent.hypervisor.kvm import images, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import DiskFormat, ImageSpec, PoolSpec, VolumeSpec


def volume(**changes: Any) -> VolumeSpec:
    return replace(
        VolumeSpec(volume_id="vol-01hdata", pool_id="pool-fast", format=DiskFormat.QCOW2, size_bytes=16 * MIB), **changes
    )


@pytest.fixture
def base(pool: PoolSpec, layout: PoolLayout) -> str:
    content = b"base" * 1024 + bytes(8 * MIB - 4096)
    spec = ImageSpec(image_id="img-base", pool_id="pool-fast", format=DiskFormat.RAW)
    images.import_image(spec, pool, layout, upload(content), reader=BytesReader(content), control=Control())
    return "img-base"


def names(pool: PoolSpec) -> list[str]:
    return sorted(os.listdir(Path(pool.path) / "volumes"))


@pytest.mark.parametrize("format", [DiskFormat.QCOW2, DiskFormat.RAW])
def test_an_empty_volume_is_sparse(pool: PoolSpec, layout: PoolLayout, format: DiskFormat) -> None:
    seen = volumes.ensure(volume(format=format, size_bytes=1024 * MIB), layout)
    assert (seen.is_present, seen.size_bytes) == (True, 1024 * MIB)
    assert seen.allocated_bytes < MIB
    assert volumes.observe("vol-01hdata", layout) == volumes.ensure(volume(format=format, size_bytes=1024 * MIB), layout)
    assert names(pool) == [f"vol-01hdata.{format.value}"]
    assert volumes.growth(layout) == (1024 * MIB - seen.allocated_bytes, seen.allocated_bytes)


def test_a_clone_reads_its_image_and_is_larger(layout: PoolLayout, base: str, tmp_path: Path) -> None:
    volumes.ensure(volume(base_image_id=base, base_image_format=DiskFormat.QCOW2), layout)
    back = tmp_path / "back.raw"
    path = layout.volume("vol-01hdata", DiskFormat.QCOW2)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, str(back)], check=True, timeout=60)
    assert back.stat().st_size == 16 * MIB
    assert back.read_bytes()[:4096] == b"base" * 1024
    assert volumes.clones_of(base, layout) == ("vol-01hdata",)


@pytest.mark.parametrize("format", [DiskFormat.QCOW2, DiskFormat.RAW])
def test_a_copy_is_independent_of_its_image(pool: PoolSpec, layout: PoolLayout, base: str, format: DiskFormat) -> None:
    volumes.ensure(volume(copy_image_id=base, format=format), layout)
    images.delete(base, layout)
    seen = volumes.observe("vol-01hdata", layout)
    assert (seen.is_present, seen.size_bytes) == (True, 16 * MIB)


def test_size_zero_takes_the_images(layout: PoolLayout, base: str) -> None:
    assert volumes.ensure(volume(base_image_id=base, size_bytes=0), layout).size_bytes == 8 * MIB


@pytest.mark.parametrize(
    "other",
    [
        volume(size_bytes=32 * MIB),
        volume(format=DiskFormat.RAW),
        volume(base_image_id="img-base"),
    ],
)
def test_another_volume_under_the_same_id_is_a_conflict(layout: PoolLayout, base: str, other: VolumeSpec) -> None:
    volumes.ensure(volume(), layout)
    with pytest.raises(Conflict) as refused:
        volumes.ensure(other, layout)
    assert refused.value.code == "volume-differs"


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (volume(size_bytes=0), "volume-size"),
        (volume(size_bytes=1000), "volume-size"),
        (volume(size_bytes=1 << 60), "volume-size"),
        (volume(format=DiskFormat.ISO), "volume-format"),
        (volume(base_image_id="img-base", format=DiskFormat.RAW), "volume-format"),
        (volume(base_image_id="img-base", size_bytes=MIB), "volume-smaller-than-image"),
        (volume(base_image_id="img-base", copy_image_id="img-base"), "volume-sources"),
        (volume(volume_id="vol-../x"), "field-malformed"),
        (volume(volume_id="-o"), "field-malformed"),
    ],
)
def test_impossible_volumes_are_refused_and_leave_nothing(
    pool: PoolSpec, layout: PoolLayout, base: str, spec: VolumeSpec, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        volumes.ensure(spec, layout)
    assert refused.value.code == code
    assert names(pool) == []


def test_a_missing_base_is_named(pool: PoolSpec, layout: PoolLayout) -> None:
    with pytest.raises(NotFound) as refused:
        volumes.ensure(volume(base_image_id="img-none"), layout)
    assert refused.value.code == "image-not-found"
    assert names(pool) == []


def test_a_base_of_another_format_than_recorded_is_a_conflict(layout: PoolLayout, base: str) -> None:
    with pytest.raises(Conflict) as refused:
        volumes.ensure(volume(base_image_id=base, base_image_format=DiskFormat.RAW), layout)
    assert refused.value.code == "image-format-differs"


def test_a_link_in_a_volumes_place_is_refused(pool: PoolSpec, layout: PoolLayout, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(bytes(16 * MIB))
    os.symlink(tmp_path / "victim", Path(pool.path) / "volumes" / "vol-01hdata.raw")
    with pytest.raises(InvalidRequest):
        volumes.ensure(volume(format=DiskFormat.RAW), layout)
    with pytest.raises(InvalidRequest):
        volumes.observe("vol-01hdata", layout)


def test_a_link_in_place_of_the_directory_is_refused(pool: PoolSpec, layout: PoolLayout, tmp_path: Path) -> None:
    directory = Path(pool.path) / "volumes"
    directory.rmdir()
    os.symlink(tmp_path, directory)
    with pytest.raises(InvalidRequest) as refused:
        volumes.ensure(volume(), layout)
    assert refused.value.code == "pool-path-unusable"
    assert os.listdir(tmp_path) == []


def test_what_a_killed_agent_left_is_removed_and_what_is_being_made_is_not(pool: PoolSpec, layout: PoolLayout) -> None:
    directory = Path(pool.path) / "volumes"
    dead, alive = directory / ".vol-01hdata.dead.part", directory / ".vol-01hdata.alive.part"
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (1.0e9, 1.0e9))
    volumes.ensure(volume(), layout)
    assert names(pool) == [".vol-01hdata.alive.part", "vol-01hdata.qcow2"]


def test_delete_is_repeatable(layout: PoolLayout) -> None:
    volumes.ensure(volume(), layout)
    volumes.delete("vol-01hdata", layout)
    volumes.delete("vol-01hdata", layout)
    assert not volumes.observe("vol-01hdata", layout).is_present


def test_a_guests_qcow2_header_in_its_raw_volume_is_not_believed(layout: PoolLayout) -> None:
    volumes.ensure(volume(format=DiskFormat.RAW), layout)
    with open(layout.volume("vol-01hdata", DiskFormat.RAW), "r+b") as file:
        file.write(b"QFI\xfb" + bytes(20) + (1 << 60).to_bytes(8, "big"))
    assert volumes.ensure(volume(format=DiskFormat.RAW), layout).size_bytes == 16 * MIB


@pytest.mark.parametrize("format", [DiskFormat.QCOW2, DiskFormat.RAW])
def test_a_volume_grows_keeps_its_content_and_never_shrinks(layout: PoolLayout, format: DiskFormat) -> None:
    small = volume(format=format)
    volumes.ensure(small, layout)
    path = layout.volume(small.volume_id, format)
    subprocess.run(["qemu-io", "-f", format.value, "-c", "write -P 7 0 4096", path], check=True, timeout=60, capture_output=True)
    grown = replace(small, size_bytes=1024 * MIB)
    for _twice in range(2):
        assert volumes.grow(grown, layout).size_bytes == 1024 * MIB
    subprocess.run(["qemu-io", "-f", format.value, "-c", "read -P 7 0 4096", path], check=True, timeout=60, capture_output=True)
    with pytest.raises(InvalidRequest, match="not shrink"):
        volumes.grow(small, layout)
    assert volumes.observe(small.volume_id, layout).size_bytes == 1024 * MIB


def test_a_volume_that_a_guest_has_open_elsewhere_does_not_grow(layout: PoolLayout) -> None:
    volumes.ensure(volume(), layout)
    path = layout.volume("vol-01hdata", DiskFormat.QCOW2)
    opened = ["qemu-io", "-f", "qcow2", path]
    with subprocess.Popen(opened, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write(b"length\n")
        guest.stdin.flush()
        guest.stdout.readline()  # it answers, so it has the image open
        with pytest.raises(Conflict) as refused:
            volumes.grow(volume(size_bytes=32 * MIB), layout)
        assert refused.value.code == "image-locked"
        guest.stdin.close()
    assert volumes.grow(volume(size_bytes=32 * MIB), layout).size_bytes == 32 * MIB


def test_a_volume_that_is_not_there_does_not_grow(layout: PoolLayout) -> None:
    with pytest.raises(NotFound):
        volumes.grow(volume(), layout)
