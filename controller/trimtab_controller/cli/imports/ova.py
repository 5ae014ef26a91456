"""Reads an OVA: a tar archive of one OVF descriptor, its disks, and a manifest. Nothing is unpacked by its name: members are read where
they lie in the archive, and only those that the descriptor names.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, cast

from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.imports import ovf, vmdk
from trimtab_controller.cli.imports.plan import ImportedDisk, ImportPlan
from trimtab_controller.cli.imports.xml_safe import XML_MAX_BYTES

_MEMBERS_MAX = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +()-]{0,199}")
_DIGEST = re.compile(r"(SHA1|SHA256|SHA512)\s?\((?P<name>[^)]{1,200})\)\s?=\s?(?P<digest>[0-9a-fA-F]{40,128})")
_CHUNK = 1 << 20


def read(path: Path) -> ImportPlan:
    """Return what the archive describes. CommandFailed names the member that is refused, and why."""
    with _open(path) as archive:
        members = _members(archive)
        descriptors = [name for name in members if name.lower().endswith(".ovf")]
        if len(descriptors) != 1:
            raise _refused(f"it has {len(descriptors)} OVF descriptors instead of one")
        content = _small(archive, members[descriptors[0]])
        manifest = _manifest(archive, members)
        _check_digest(manifest, descriptors[0], io.BytesIO(content))
        machine = ovf.read(content)
        for disk in machine.disks:
            _require_disk(archive, members, disk)
    return ImportPlan(
        name=machine.name,
        vcpus=machine.vcpus,
        memory_mib=machine.memory_mib,
        firmware=machine.firmware,
        guest_os=machine.guest_os,
        disks=tuple(_disk(path, disk, manifest) for disk in machine.disks),
        cards=machine.cards,
        unexpressed=machine.unexpressed,
    )


def _open(path: Path) -> tarfile.TarFile:
    try:
        # "r:" and not "r": a compressed archive would be unpacked as a whole before anything of it is known.
        return tarfile.open(path, "r:")
    except OSError as error:
        raise usage(f"FILE: cannot read {path}: {error.strerror}", code="file-unreadable") from error
    except tarfile.TarError as error:
        raise _refused(f"it is no uncompressed tar archive: {error}") from error


def _members(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    try:
        for member in archive:
            if len(found) >= _MEMBERS_MAX:
                raise _refused(f"it has more than {_MEMBERS_MAX} members")
            if not member.isreg() or member.issparse():
                raise _refused(f"member {member.name[:80]!r} is no plain file")
            if not _NAME.fullmatch(member.name):
                raise _refused(f"member {member.name[:80]!r} has a name that leads out of the archive, or is none")
            if member.name in found:
                raise _refused(f"member {member.name} is there twice")
            found[member.name] = member
    except tarfile.TarError as error:
        raise _refused(f"it is damaged: {error}") from error
    return found


def _small(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > XML_MAX_BYTES:
        raise _refused(f"member {member.name} has more than {XML_MAX_BYTES >> 10} KiB")
    return _stream(archive, member).read(XML_MAX_BYTES + 1)


def _stream(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    stream: IO[bytes] | None = archive.extractfile(member)
    assert stream is not None, "a plain file has content"
    return cast(BinaryIO, stream)


def _manifest(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, tuple[str, str]]:
    """Return algorithm and digest by member, of an archive that says them."""
    name = next((name for name in members if name.lower().endswith(".mf")), "")
    if not name:
        return {}
    text = _small(archive, members[name]).decode("utf-8", "replace")
    return {found["name"]: (found[1].lower(), found["digest"].lower()) for found in _DIGEST.finditer(text)}


def _check_digest(manifest: dict[str, tuple[str, str]], name: str, stream: BinaryIO) -> None:
    """Refuse a member that is not what the manifest says; one that it does not name is not checked."""
    if name not in manifest:
        return
    algorithm, digest = manifest[name]
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    while block := stream.read(_CHUNK):
        hasher.update(block)
    if hasher.hexdigest() != digest:
        raise _refused(f"member {name} is not what the manifest says; the archive was changed or damaged")


def _require_disk(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], disk: ovf.OvfDisk) -> None:
    if disk.file_name not in members:
        raise _refused(f"the descriptor names disk {disk.file_name[:80]!r}, which is no member of the archive")
    size_bytes = vmdk.size_of(_stream(archive, members[disk.file_name]), disk.file_name)
    if disk.capacity_bytes and size_bytes != disk.capacity_bytes:
        raise _refused(f"disk {disk.file_name} has {size_bytes} bytes, and the descriptor says {disk.capacity_bytes}")


def _disk(path: Path, disk: ovf.OvfDisk, manifest: dict[str, tuple[str, str]]) -> ImportedDisk:
    with _open(path) as archive:
        size_bytes = vmdk.size_of(_stream(archive, _members(archive)[disk.file_name]), disk.file_name)

    def unpack(directory: Path, on_progress: Callable[[int, int], None]) -> tuple[Path, str]:
        target = directory / "disk.qcow2"
        with _open(path) as archive, target.open("wb") as made:
            member = _members(archive)[disk.file_name]
            _check_digest(manifest, disk.file_name, _stream(archive, member))
            vmdk.convert(_stream(archive, member), made, disk.file_name, on_progress)
        return target, "qcow2"

    return ImportedDisk(label=disk.file_name, size_bytes=size_bytes, unpack=unpack)


def _refused(why: str) -> CommandFailed:
    return usage(f"FILE: {why}", code="import-refused")
