"""Imports with the real qemu-img: what gets in, what never does, and that nothing half-made stays."""

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.kvm import factories as make
from tests.unit.agent.kvm.factories import MIB, BytesReader, Control, upload
from trimtab_agent.hypervisor.base import JobControl
from trimtab_agent.hypervisor.kvm import images, qemu_img, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    HostFileSource,
    ImageResult,
    ImageSource,
    ImageSpec,
    JobProgress,
    PeerSource,
    PoolSpec,
    UrlSource,
    VolumeSource,
    VolumeSpec,
)

CANARY = b"CANARY-of-the-host-2f1c" * 40


def run_qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, timeout=60)


def image(format: DiskFormat = DiskFormat.RAW, **changes: Any) -> ImageSpec:
    return replace(ImageSpec(image_id="img-01hbase", pool_id="pool-fast", format=format, max_bytes=256 * MIB), **changes)


def bring(spec: ImageSpec, pool: PoolSpec, content: bytes, *, control: Control | None = None) -> ImageResult:
    return images.import_image(
        spec, pool, PoolLayout.of(pool), upload(content), reader=BytesReader(content), control=control or Control()
    )


def files(pool: PoolSpec) -> list[str]:
    return sorted(str(path.relative_to(pool.path)) for path in Path(pool.path).rglob("*") if not path.is_dir())


def leftovers(pool: PoolSpec) -> list[str]:
    return [entry for entry in os.listdir(Path(pool.path) / "images") if entry.startswith(".")]


def raw_content() -> bytes:
    return b"\x55guest" * 20000 + bytes(4 * MIB - 120000)


def qcow2_content(tmp_path: Path, *options: str) -> bytes:
    raw, made = tmp_path / "content.raw", tmp_path / "content.qcow2"
    raw.write_bytes(raw_content())
    run_qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(made))
    return made.read_bytes()


def test_raw_image_is_stored_as_our_own_qcow2(pool: PoolSpec, layout: PoolLayout, tmp_path: Path) -> None:
    content, control = raw_content(), Control()
    result = bring(image(), pool, content, control=control)
    stored = Path(images.path_of("img-01hbase", layout))
    assert result == ImageResult(
        image_id="img-01hbase",
        format=DiskFormat.QCOW2,
        virtual_size_bytes=len(content),
        file_size_bytes=stored.stat().st_size,
        source_sha256=hashlib.sha256(content).hexdigest(),
        stored_sha256=hashlib.sha256(stored.read_bytes()).hexdigest(),
    )
    run_qemu_img("convert", "-f", "qcow2", "-O", "raw", str(stored), str(tmp_path / "back.raw"))
    assert (tmp_path / "back.raw").read_bytes() == content
    assert stored.stat().st_mode & 0o777 == 0o444
    assert {"transfer", "verify"} <= {report.phase for report in control.reports}
    assert files(pool) == ["images/img-01hbase.json", "images/img-01hbase.qcow2"]
    assert leftovers(pool) == []


@pytest.mark.parametrize("options", [(), ("-o", "compat=0.10"), ("-o", "compression_type=zstd", "-c"), ("-o", "extended_l2=on")])
def test_qcow2_image_is_rewritten(pool: PoolSpec, layout: PoolLayout, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = bring(image(DiskFormat.QCOW2), pool, qcow2_content(tmp_path, *options))
    run_qemu_img("convert", "-f", "qcow2", "-O", "raw", images.path_of("img-01hbase", layout), str(tmp_path / "back.raw"))
    assert (tmp_path / "back.raw").read_bytes() == raw_content()
    assert result.virtual_size_bytes == len(raw_content())


def test_iso_is_kept_byte_for_byte(pool: PoolSpec, layout: PoolLayout) -> None:
    content = bytes(32769) + b"CD001" + bytes(4 * MIB)
    result = bring(image(DiskFormat.ISO), pool, content)
    assert result.format is DiskFormat.ISO
    assert result.stored_sha256 == result.source_sha256 == hashlib.sha256(content).hexdigest()
    assert images.path_of("img-01hbase", layout).endswith("/images/img-01hbase.iso")


def test_plain_bytes_that_call_themselves_an_iso_are_refused_and_nothing_is_kept(pool: PoolSpec, layout: PoolLayout) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bring(image(DiskFormat.ISO), pool, bytes(4 * MIB))
    assert refused.value.code == "image-format-mismatch"
    assert os.listdir(layout.path / "images") == []


def test_a_copy_from_a_peer_is_kept_byte_for_byte(pool: PoolSpec, tmp_path: Path) -> None:
    content = qcow2_content(tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    source = PeerSource(
        host_id="host-2",
        address="192.0.2.2:1",
        pool_id="pool-fast",
        ticket="t",
        stored_sha256=digest,
        file_size_bytes=len(content),
        virtual_size_bytes=len(raw_content()),
    )
    result = images.import_image(
        image(DiskFormat.QCOW2), pool, PoolLayout.of(pool), source, reader=BytesReader(content), control=Control()
    )
    assert result.stored_sha256 == digest
    with pytest.raises(InvalidRequest) as refused:
        images.import_image(
            image(DiskFormat.QCOW2, image_id="img-other"),
            pool,
            PoolLayout.of(pool),
            replace(source, stored_sha256="0" * 64),
            reader=BytesReader(content),
            control=Control(),
        )
    assert refused.value.code == "image-checksum-mismatch"


def hostile_files(tmp_path: Path) -> dict[str, tuple[bytes, DiskFormat]]:
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY)
    backed, data, vmdk = tmp_path / "backed.qcow2", tmp_path / "data.qcow2", tmp_path / "flat.vmdk"
    run_qemu_img("create", "-f", "qcow2", "-b", str(canary), "-F", "raw", str(backed))
    run_qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.bin,data_file_raw=on", str(data), "1M")
    content = data.read_bytes().replace(
        f"{tmp_path}/data.bin".encode(), str(canary).encode().ljust(len(f"{tmp_path}/data.bin"), b"\0")
    )
    vmdk.write_text(f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 2 FLAT "{canary}" 0\n')
    nested = make.qcow2_header(backing=f'json:{{"driver":"file","filename":"{canary}"}}'.encode())
    return {
        "backing file": (backed.read_bytes(), DiskFormat.QCOW2),
        "backing file declared as raw": (backed.read_bytes(), DiskFormat.RAW),
        "external data file": (content, DiskFormat.QCOW2),
        "flat vmdk": (vmdk.read_bytes(), DiskFormat.RAW),
        "flat vmdk declared as qcow2": (vmdk.read_bytes(), DiskFormat.QCOW2),
        "json backing name": (nested, DiskFormat.QCOW2),
        "nbd backing name": (make.qcow2_header(backing=b"nbd:127.0.0.1:10809"), DiskFormat.QCOW2),
    }


def test_no_hostile_image_brings_a_host_file_into_the_pool(pool: PoolSpec, tmp_path: Path) -> None:
    for name, (content, declared) in hostile_files(tmp_path).items():
        with pytest.raises(InvalidRequest):
            bring(image(declared), pool, content)
        assert files(pool) == [], name
        assert leftovers(pool) == [], name


def test_raw_content_that_mentions_files_stays_raw_content(pool: PoolSpec, layout: PoolLayout, tmp_path: Path) -> None:
    # The guest's own bytes, not at a place where a magic counts.
    content = bytes(512) + make.qcow2_header(backing=b"/etc/passwd") + bytes(512 * 1024)
    bring(image(), pool, content)
    run_qemu_img("convert", "-f", "qcow2", "-O", "raw", images.path_of("img-01hbase", layout), str(tmp_path / "back.raw"))
    assert (tmp_path / "back.raw").read_bytes()[: len(content)] == content


@pytest.mark.parametrize(
    ("spec", "content", "code"),
    [
        (image(source_sha256="0" * 64), b"x" * 512, "image-checksum-mismatch"),
        (image(max_bytes=MIB), bytes(MIB + 1), "image-too-large"),
        (image(DiskFormat.QCOW2, max_bytes=MIB), make.qcow2_header(), "image-too-large"),
        (image(), b"", "image-empty"),
        (image(DiskFormat.QCOW2), b"\0" * 4096, "image-format-mismatch"),
        (image(image_id="img-../../x"), b"x", "field-malformed"),
    ],
)
def test_refused_imports_leave_nothing(pool: PoolSpec, spec: ImageSpec, content: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bring(spec, pool, content)
    assert refused.value.code == code
    assert files(pool) == leftovers(pool) == []


def damaged_images(directory: Path) -> Mapping[str, bytes]:
    """Images whose headers pass: one lies about its tables, one has lost its data's table, one the data that was compressed."""
    raw, whole = directory / "d.raw", directory / "d.qcow2"
    raw.write_bytes(b"abcdefgh" * (MIB // 2))
    convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*convert, str(raw), str(whole)], check=True, timeout=60)
    plain = bytearray(whole.read_bytes())
    (l1_at,) = struct.unpack_from(">Q", plain, 40)
    (l2_at,) = struct.unpack_from(">Q", plain, l1_at)
    l2_at &= 0x00FF_FFFF_FFFF_FE00
    plain[l2_at : l2_at + 4096] = b"\xff" * 4096
    subprocess.run([*convert, "-c", str(raw), str(whole)], check=True, timeout=60)
    compressed = bytearray(whole.read_bytes())
    compressed[5 * 65536 : 5 * 65536 + 200] = b"\xff" * 200
    return {
        # Its L1 table points to where nothing can be.
        "tables": make.qcow2_header(file_bytes=3 * 65536) + b"\xff" * 65536,
        "clusters": bytes(plain),
        "compressed": bytes(compressed),
    }


@pytest.mark.parametrize("kind", ["tables", "clusters", "compressed"])
def test_an_image_that_is_damaged_behind_its_header_is_told_so_and_leaves_nothing(
    pool: PoolSpec, tmp_path: Path, kind: str
) -> None:
    content = damaged_images(tmp_path)[kind]
    with pytest.raises(InvalidRequest) as refused:
        bring(image(DiskFormat.QCOW2), pool, content)
    assert refused.value.code == "image-damaged"
    assert "`qemu-img check FILE`" in refused.value.message
    assert "`trimtab image import NAME FILE --sha256 SUM`" in refused.value.message
    assert files(pool) == leftovers(pool) == []


@dataclass
class BrokenReader:
    """Yields some blocks, then does what was planned."""

    control: Control | None = None

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        yield bytes(MIB)
        if self.control is None:
            raise Unavailable("peer-down", "the peer went away")
        self.control.cancelled.set()
        yield bytes(MIB)


def test_broken_and_cancelled_transfers_leave_nothing(pool: PoolSpec) -> None:
    control = Control()
    for reader, error in ((BrokenReader(), Unavailable), (BrokenReader(control), Conflict)):
        with pytest.raises(error):
            images.import_image(image(), pool, PoolLayout.of(pool), upload(b""), reader=reader, control=control)
        assert files(pool) == leftovers(pool) == []


class CancelledWhenConverting(Control):
    """Cancelled in the very moment in which the conversion begins: a quick machine would be done before any other thread looked."""

    def report(self, progress: JobProgress) -> None:
        super().report(progress)
        if progress.phase == "convert":
            self.cancelled.set()


def test_conversion_stops_when_cancelled(pool: PoolSpec) -> None:
    with pytest.raises(Conflict) as refused:
        bring(image(), pool, os.urandom(64 * MIB), control=CancelledWhenConverting())
    assert refused.value.code == "job-cancelled"
    assert files(pool) == leftovers(pool) == []


# --- a pool that others' disks grow in ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_pool(tiny_disk: Path) -> PoolSpec:
    spec = make.pool(tiny_disk.resolve())
    PoolLayout.of(spec).create_subdirectories()
    return spec


def free_bytes(pool: PoolSpec) -> int:
    space = os.statvfs(pool.path)
    return space.f_bavail * space.f_frsize


@dataclass
class EndlessReader:
    """A server that goes on for ever; it remembers how little was left free meanwhile."""

    path: str
    least_free_bytes: int = 1 << 60

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        while True:
            yield b"x" * MIB
            self.least_free_bytes = min(self.least_free_bytes, free_bytes(pool))


@pytest.mark.parametrize("source", [UrlSource(url="https://images.example/x"), HostFileSource(file_name="x"), upload(b"lied")])
def test_a_source_without_end_leaves_room_for_the_disks_of_the_pool(tiny_pool: PoolSpec, source: ImageSource) -> None:
    free_before, reader = free_bytes(tiny_pool), EndlessReader(tiny_pool.path)
    with pytest.raises(NoCapacity) as refused:
        images.import_image(
            image(max_bytes=64 << 30), tiny_pool, PoolLayout.of(tiny_pool), source, reader=reader, control=Control()
        )
    assert refused.value.code == "pool-full"
    assert free_before // 4 <= reader.least_free_bytes <= free_before // 4 + 8 * MIB
    assert files(tiny_pool) == leftovers(tiny_pool) == []
    assert free_bytes(tiny_pool) == free_before


@dataclass
class AnnouncingReader:
    """A server whose answer tells its size first."""

    size_bytes: int
    blocks_read: int = 0

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        on_size(self.size_bytes)
        for _ in range(self.size_bytes // MIB):
            self.blocks_read += 1
            yield b"x" * MIB


@pytest.mark.parametrize(
    ("size_mib", "max_mib", "kind", "code"),
    [(80, 256, NoCapacity, "pool-full"), (80, 60, InvalidRequest, "image-too-large"), (4, 256, None, "")],
)
def test_what_a_server_announces_is_refused_before_a_byte_is_read(
    tiny_pool: PoolSpec, size_mib: int, max_mib: int, kind: type[TrimtabError] | None, code: str
) -> None:
    reader, control, source = AnnouncingReader(size_mib * MIB), Control(), UrlSource(url="https://images.example/x")
    spec = image(max_bytes=max_mib * MIB)
    if kind is None:
        images.import_image(spec, tiny_pool, PoolLayout.of(tiny_pool), source, reader=reader, control=control)
        assert {report.total_bytes for report in control.reports if report.phase == "transfer"} == {size_mib * MIB}
        return
    with pytest.raises(kind) as refused:
        images.import_image(spec, tiny_pool, PoolLayout.of(tiny_pool), source, reader=reader, control=control)
    assert (refused.value.code, reader.blocks_read) == (code, 0)
    assert files(tiny_pool) == leftovers(tiny_pool) == []


class RoomWatch(Control):
    """Remembers how little was left free whenever the import reported."""

    def __init__(self, pool: PoolSpec) -> None:
        super().__init__()
        self.pool, self.least_free_bytes = pool, 1 << 60

    def report(self, progress: JobProgress) -> None:
        super().report(progress)
        self.least_free_bytes = min(self.least_free_bytes, free_bytes(self.pool))


def test_a_conversion_leaves_room_for_the_disks_of_the_pool(tiny_pool: PoolSpec) -> None:
    free_before, control = free_bytes(tiny_pool), RoomWatch(tiny_pool)
    with pytest.raises(NoCapacity) as refused:
        bring(image(), tiny_pool, os.urandom(MIB) * 44, control=control)
    assert refused.value.code == "pool-full"
    assert {report.phase for report in control.reports} >= {"transfer", "convert"}, (
        "the source had room, what it becomes had none"
    )
    assert control.least_free_bytes >= free_before // 4
    assert files(tiny_pool) == leftovers(tiny_pool) == []


class FilledWhenConverting(Control):
    """The pool's disks take the room in the very moment in which the conversion begins."""

    def __init__(self, pool: PoolSpec) -> None:
        super().__init__()
        self.disk = Path(pool.path) / "volumes" / "vol-other.raw"

    def report(self, progress: JobProgress) -> None:
        super().report(progress)
        if progress.phase == "convert":
            self.disk.write_bytes(bytes(60 * MIB))


def test_a_conversion_gives_way_where_others_take_the_room(tiny_pool: PoolSpec) -> None:
    with pytest.raises(NoCapacity, match="others have taken what was left") as refused:
        bring(image(), tiny_pool, os.urandom(16 * MIB), control=FilledWhenConverting(tiny_pool))
    assert refused.value.code == "pool-full"
    assert "`trimtab image import NAME FILE|URL --pool POOL`" in refused.value.message
    assert files(tiny_pool) == ["volumes/vol-other.raw"]
    assert leftovers(tiny_pool) == []


def test_an_image_of_a_volume_leaves_room_for_the_disks_of_the_pool(tiny_pool: PoolSpec) -> None:
    layout = PoolLayout.of(tiny_pool)
    volume = VolumeSpec(volume_id="vol-1", pool_id="pool-fast", format=DiskFormat.QCOW2, size_bytes=64 * MIB)
    volumes.ensure(volume, layout)
    path = layout.volume("vol-1", DiskFormat.QCOW2)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 50M", path], check=True, capture_output=True, timeout=60)
    free_before, control = free_bytes(tiny_pool), RoomWatch(tiny_pool)
    with pytest.raises(NoCapacity) as refused:
        images.import_image(
            image(), tiny_pool, layout, VolumeSource(volume_id="vol-1", layer_id=""), reader=BytesReader(b""), control=control
        )
    assert refused.value.code == "pool-full"
    assert control.least_free_bytes >= free_before // 4
    assert files(tiny_pool) == ["volumes/vol-1.qcow2"]
    assert leftovers(tiny_pool) == []


def test_import_again_answers_what_was_proved(pool: PoolSpec) -> None:
    content = raw_content()
    first = bring(image(), pool, content)
    assert bring(image(), pool, b"anything") == first
    with pytest.raises(Conflict) as refused:
        bring(image(source_sha256="0" * 64), pool, content)
    assert refused.value.code == "image-differs"


def test_what_a_killed_import_left_is_removed_by_the_next(pool: PoolSpec) -> None:
    stale = Path(pool.path) / "images" / ".img-01hbase.dead"
    stale.mkdir()
    (stale / "source").write_bytes(b"half")
    bring(image(), pool, raw_content())
    assert leftovers(pool) == []


def test_an_image_with_clones_is_not_removed(pool: PoolSpec, layout: PoolLayout) -> None:
    bring(image(), pool, raw_content())
    volume = VolumeSpec(
        volume_id="vol-1", pool_id="pool-fast", format=DiskFormat.QCOW2, size_bytes=8 * MIB, base_image_id="img-01hbase"
    )
    volumes.ensure(volume, layout)
    with pytest.raises(Conflict) as refused:
        images.delete("img-01hbase", layout)
    assert refused.value.code == "image-in-use"
    volumes.delete("vol-1", layout)
    images.delete("img-01hbase", layout)
    images.delete("img-01hbase", layout)
    with pytest.raises(NotFound):
        images.path_of("img-01hbase", layout)
    assert files(pool) == []


def test_the_sandbox_has_no_network_and_no_rights(pool: PoolSpec, layout: PoolLayout) -> None:
    # Asked of the wrapper itself: whatever program runs there sees no link that is up, and is nobody.
    wrapper = qemu_img._wrapper(qemu_img.Limits(), as_nobody=True)
    show = (
        "import os, json, resource as r; links = open('/proc/net/dev').read().count(':');"
        "print(json.dumps([os.geteuid(), links, r.getrlimit(r.RLIMIT_AS)[0], r.getrlimit(r.RLIMIT_CORE)[0]]))"
    )
    shown = subprocess.run([*wrapper, "/usr/bin/python3", "-c", show], capture_output=True, check=True, timeout=30).stdout
    user, links, address_space, core = json.loads(shown)
    assert address_space == qemu_img.ADDRESS_SPACE_BYTES
    assert core == 0
    if os.geteuid() == 0:
        assert (user, links) == (qemu_img.NOBODY, 1)
