"""What the header check lets through and what it refuses, image by image."""

import io
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.agent.kvm.factories import CLUSTER_BYTES, MIB, qcow2_header
from trimtab_agent.hypervisor.kvm.image_header import ImageFacts, check_image, qcow2_virtual_size, read_qcow2
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskFormat

ISO = bytes(32769) + b"CD001" + bytes(4096)
RAW = bytes(MIB)


def check(content: bytes, declared: DiskFormat, *, max_bytes: int = 0) -> ImageFacts:
    return check_image(io.BytesIO(content), declared, max_bytes=max_bytes)


def extension(kind: int, content: bytes = b"") -> bytes:
    return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)


@pytest.mark.parametrize(
    ("content", "declared", "virtual_size_bytes"),
    [
        (RAW, DiskFormat.RAW, MIB),
        (b"\xeb\x63\x90" + bytes(997), DiskFormat.RAW, 1024),
        (ISO, DiskFormat.ISO, len(ISO) + 512 - len(ISO) % 512),
        (ISO, DiskFormat.RAW, len(ISO) + 512 - len(ISO) % 512),
        (qcow2_header(), DiskFormat.QCOW2, 64 * MIB),
        (qcow2_header(version=2), DiskFormat.QCOW2, 64 * MIB),
        (qcow2_header(incompatible=8, header_length=112), DiskFormat.QCOW2, 64 * MIB),
        (qcow2_header(incompatible=16), DiskFormat.QCOW2, 64 * MIB),
        (qcow2_header(extensions=extension(0x6803F857, b"x" * 48)), DiskFormat.QCOW2, 64 * MIB),
    ],
)
def test_plain_images_pass(content: bytes, declared: DiskFormat, virtual_size_bytes: int) -> None:
    assert check(content, declared) == ImageFacts(format=declared, virtual_size_bytes=virtual_size_bytes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"backing": b"/etc/passwd"}, "image-has-backing-file"),
        ({"backing": b"json:{}"}, "image-has-backing-file"),
        ({"version": 2, "backing": b"x"}, "image-has-backing-file"),
        ({"backing_offset": 512}, "image-malformed"),
        ({"backing": b"x" * 2000}, "image-malformed"),
        ({"backing": b"x", "backing_offset": 10 * CLUSTER_BYTES}, "image-malformed"),
        ({"incompatible": 4}, "image-has-data-file"),
        ({"autoclear": 2}, "image-has-data-file"),
        ({"extensions": extension(0x44415441, b"/etc/shadow")}, "image-has-data-file"),
        ({"extensions": extension(1, b"") + extension(0x44415441, b"f")}, "image-has-data-file"),
        ({"incompatible": 32}, "image-feature-unknown"),
        ({"incompatible": 1 << 63}, "image-feature-unknown"),
        ({"incompatible": 8, "header_length": 112, "extensions": b""}, None),
        ({"incompatible": 1}, "image-not-clean"),
        ({"incompatible": 2}, "image-not-clean"),
        ({"crypt_method": 1}, "image-encrypted"),
        ({"crypt_method": 2}, "image-encrypted"),
        ({"extensions": extension(0x0537BE77, bytes(16))}, "image-encrypted"),
        ({"snapshots": 1}, "image-has-snapshots"),
        ({"version": 1}, "image-version"),
        ({"version": 4}, "image-version"),
        ({"cluster_bits": 8}, "image-malformed"),
        ({"cluster_bits": 40}, "image-malformed"),
        ({"header_length": 80}, "image-malformed"),
        ({"header_length": 1 << 31}, "image-malformed"),
        ({"l1_entries": 1 << 31}, "image-malformed"),
        ({"refcount_clusters": 1 << 20}, "image-malformed"),
        ({"virtual_size_bytes": 1 << 62}, "image-malformed"),
        ({"virtual_size_bytes": 0}, "image-empty"),
        ({"l1_offset": 5}, "image-malformed"),
        ({"l1_offset": 0}, "image-malformed"),
        ({"l1_offset": 1 << 40}, "image-truncated"),
        ({"refcount_offset": 1 << 40}, "image-truncated"),
        ({"extensions": struct.pack(">II", 1, 0xFFFFFFF0)}, "image-malformed"),
    ],
)
def test_hostile_qcow2_is_refused(changes: dict[str, Any], code: str | None) -> None:
    header_bytes = changes.get("header_length", 104)
    content = qcow2_header(**changes) if header_bytes < CLUSTER_BYTES else qcow2_header(**{**changes, "extensions": b""})
    if code is None:
        assert check(content, DiskFormat.QCOW2).virtual_size_bytes == 64 * MIB
        return
    with pytest.raises(InvalidRequest) as refused:
        check(content, DiskFormat.QCOW2)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "content",
    [
        qcow2_header(),
        b"QED\0" + RAW,
        b"KDMV" + RAW,
        b"COWD" + RAW,
        b"# Disk DescriptorFile\nversion=1\n" + RAW,
        b"\n\n# Disk DescriptorFile\n" + RAW,
        b"conectix" + RAW,
        RAW + b"conectix" + bytes(504),
        RAW + b"koly" + bytes(508),
        b"vhdxfile" + RAW,
        b"LUKS\xba\xbe" + RAW,
        b"WithoutFreeSpace" + RAW,
        b"WithouFreSpacExt" + RAW,
        b"Bochs Virtual HD Image" + RAW,
        bytes(64) + b"\x7f\x10\xda\xbe" + RAW,
        b"OOOH" + RAW,
        b"json:{}" + RAW,
        qcow2_header()[:32768] + ISO[32768:],
    ],
)
@pytest.mark.parametrize("declared", [DiskFormat.RAW, DiskFormat.ISO])
def test_what_looks_like_another_format_is_refused(content: bytes, declared: DiskFormat) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(content, declared)
    assert refused.value.code == "image-format-mismatch"


@pytest.mark.parametrize(
    "content",
    [
        RAW,
        bytes(1 << 20),
        bytes(32769),
        ISO[:32773],  # cut within the word
        bytes(32768) + ISO[32769:],  # one byte early
        b"CD001" + bytes(1 << 20),
        qcow2_header(),
    ],
)
def test_an_iso_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(content, DiskFormat.ISO)
    assert refused.value.code == "image-format-mismatch"


@pytest.mark.parametrize("content", [RAW, ISO, b"KDMV" + RAW, b"QFI"])
def test_what_is_no_qcow2_is_not_taken_for_one(content: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(content, DiskFormat.QCOW2)
    assert refused.value.code == "image-format-mismatch"


def test_empty_and_truncated_images_are_refused() -> None:
    for content, code in (
        (b"", "image-empty"),
        (b"QFI\xfb" + bytes(20), "image-truncated"),
        (qcow2_header()[:90], "image-truncated"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check(content, DiskFormat.QCOW2)
        assert refused.value.code == code


def test_virtual_size_is_bounded() -> None:
    assert check(qcow2_header(), DiskFormat.QCOW2, max_bytes=64 * MIB).virtual_size_bytes == 64 * MIB
    with pytest.raises(InvalidRequest) as refused:
        check(qcow2_header(), DiskFormat.QCOW2, max_bytes=64 * MIB - 1)
    assert refused.value.code == "image-too-large"


def test_volumes_of_ours_may_be_in_use_and_have_a_base() -> None:
    content = qcow2_header(backing=b"/srv/pools/fast/images/img-1.qcow2", incompatible=1, snapshots=2)
    header = read_qcow2(io.BytesIO(content), len(content), is_ours=True)
    assert (header.backing_file, header.virtual_size_bytes) == ("/srv/pools/fast/images/img-1.qcow2", 64 * MIB)
    assert qcow2_virtual_size(content[:32]) == 64 * MIB


@given(st.binary(max_size=400), st.sampled_from(list(DiskFormat)))
def test_any_bytes_are_accepted_or_refused_and_nothing_else(noise: bytes, declared: DiskFormat) -> None:
    content = qcow2_header()
    for each in (noise, content[: 72 - len(noise) % 64] + noise + content[472:]):
        try:
            facts = check(each, declared)
        except InvalidRequest:
            continue
        assert facts.virtual_size_bytes > 0
