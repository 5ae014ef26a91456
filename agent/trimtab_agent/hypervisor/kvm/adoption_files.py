"""Gives the files of an adopted domain the names that volumes have, and takes away the names they had.

A second name for the same file (a hard link) lets the guest go on writing while everything else finds the volume where volumes are.
The file's own name goes once the domain is defined with the volume's: only where both names are one file still.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from trimtab_agent.hypervisor.kvm import domain_facts, image_header, os_errors, state_files
from trimtab_agent.hypervisor.kvm.domain_xml import state_layout
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout, volume_name
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError
from trimtab_protos.messages import DiskFormat, DiskSpec, DomainSpec, Firmware

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NVRAM_MAX_BYTES = 16 << 20


def look_at(path: str, format: str) -> tuple[int, str]:
    """Return the disk's size in bytes and why the file cannot be a volume ('': it can). The format is as declared, never probed."""
    try:
        with _opened(path) as file:
            facts = os.fstat(file)
            if facts.st_nlink > 1:
                # An adopted vm's file has its own name and its volume's until the vm stops.
                return 0, f"its file has another name too, so it may be another vm's; `find -samefile {path}` shows it"
            if format == DiskFormat.RAW.value:
                return facts.st_size, "" if facts.st_size % 512 == 0 else "its size is no multiple of 512 bytes"
            if format != DiskFormat.QCOW2.value:
                return 0, f"its format is {format or 'not given'}; a volume is raw or qcow2"
            with os.fdopen(os.dup(file), "rb") as reader:
                header = image_header.read_qcow2(reader, facts.st_size, is_ours=False)
            return header.virtual_size_bytes, ""
    except TrimtabError as error:
        return 0, error.message
    except OSError as error:
        return 0, f"its file cannot be read: {error.strerror}"


def link(path: str, disk: DiskSpec, layout: PoolLayout) -> None:
    """Give the file the volume's name beside its own. Conflict: the name is another file's, or the file is not in this file system."""
    name = volume_name(disk.volume_id, disk.format)
    if not Path(path).is_relative_to(layout.path):
        raise InvalidRequest("disk-outside-pool", f"{path} does not lie in pool {layout.pool_id} at {layout.path}", field="disks")
    try:
        with _parent(path) as source, layout.open(VOLUMES) as volumes:
            own = os.stat(os.path.basename(path), dir_fd=source, follow_symlinks=False)
            if not stat.S_ISREG(own.st_mode):
                raise InvalidRequest("not-a-file", f"{path} is not a regular file", field="disks")
            try:
                os.link(os.path.basename(path), name, src_dir_fd=source, dst_dir_fd=volumes, follow_symlinks=False)
            except FileExistsError:
                there = os.stat(name, dir_fd=volumes, follow_symlinks=False)
                if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
                    raise Conflict("volume-differs", f"pool {layout.pool_id} has another file called {name}") from None
    except OSError as error:
        raise os_errors.from_os(error, doing=f"give {path} the name of volume {disk.volume_id}") from error


def former_names(xml: str, domain: DomainSpec) -> tuple[str, ...]:
    """Return the names that the volumes' files had before they were adopted."""
    marked = domain_facts.read(xml).adopted_disks or {}
    ours = {_volume_path(disk, domain) for disk in _files(domain)}
    return tuple(path for target, path in _paths(xml).items() if target in marked and path not in ours)


def drop_names(names: tuple[str, ...], domain: DomainSpec) -> None:
    """Remove each of these names that is another name of one of the domain's volumes; any other file stays."""
    volumes = set()
    for disk in _files(domain):
        with contextlib.suppress(OSError):
            there = os.stat(_volume_path(disk, domain), follow_symlinks=False)
            volumes.add((there.st_dev, there.st_ino))
    for path in names:
        with contextlib.suppress(OSError), _parent(path) as directory:
            there = os.stat(os.path.basename(path), dir_fd=directory, follow_symlinks=False)
            if (there.st_dev, there.st_ino) in volumes:
                os.unlink(os.path.basename(path), dir_fd=directory)


def drop_links(domain: DomainSpec, used_paths: frozenset[str]) -> None:
    """Remove the volumes' names that no definition uses, where the file has another name."""
    for disk in domain.disks:
        path = _volume_path(disk, domain)
        if path in used_paths:
            continue
        layout = _layouts(domain)[disk.pool_id]
        name = volume_name(disk.volume_id, disk.format)
        with contextlib.suppress(FileNotFoundError), layout.open(VOLUMES) as directory:
            if os.stat(name, dir_fd=directory, follow_symlinks=False).st_nlink > 1:
                os.unlink(name, dir_fd=directory)


def bring_nvram(xml: str, domain: DomainSpec) -> None:
    """Put the domain's UEFI variables where its own definition will look for them."""
    path = domain_facts.read(xml).nvram_path
    if domain.firmware is not Firmware.UEFI or not path:
        return
    layout = state_layout(domain)
    if path == layout.nvram(domain.vm_id):
        return
    try:
        with _opened(path) as file, os.fdopen(os.dup(file), "rb") as reader:
            content = reader.read(_NVRAM_MAX_BYTES)
    except FileNotFoundError:
        return  # it never ran: it gets fresh ones
    except OSError as error:
        raise os_errors.from_os(error, doing=f"read the UEFI variables at {path}") from error
    pool = next(pool for pool in domain.pools if pool.pool_id == layout.pool_id)
    state_files.restore_nvram(domain.vm_id, pool, content)


def _paths(xml: str) -> dict[str, str]:
    found = {}
    for disk in parse(xml).findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is not None and source is not None:
            found[target.get("dev", "")] = source.get("file", "")
    return found


def _layouts(domain: DomainSpec) -> Mapping[str, PoolLayout]:
    return PoolLayout.of_files(domain.pools)


def _files(domain: DomainSpec) -> tuple[DiskSpec, ...]:
    """Return the disks that are files."""
    layouts = _layouts(domain)
    return tuple(disk for disk in domain.disks if disk.pool_id in layouts)


def _volume_path(disk: DiskSpec, domain: DomainSpec) -> str:
    return _layouts(domain)[disk.pool_id].volume(disk.volume_id, disk.format, disk.layer_id)


@contextlib.contextmanager
def _parent(path: str) -> Iterator[int]:
    """Lend the directory that holds `path`, opened without following a link anywhere on the way."""
    parts = Path(path).parts
    if not path.startswith("/") or ".." in parts or len(parts) < 2:
        raise InvalidRequest("path-refused", f"{path[:200]!r} must be absolute and without `..`", field="path")
    with contextlib.ExitStack() as stack:
        descriptor = os.open("/", _DIRECTORY_FLAGS)
        stack.callback(os.close, descriptor)
        for part in parts[1:-1]:
            descriptor = os.open(part, _DIRECTORY_FLAGS, dir_fd=descriptor)
            stack.callback(os.close, descriptor)
        yield descriptor


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    with _parent(path) as directory:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(os.path.basename(path), flags, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequest("not-a-file", f"{path} is not a regular file", field="path")
        yield descriptor
    finally:
        os.close(descriptor)
