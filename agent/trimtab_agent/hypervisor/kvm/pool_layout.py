"""Where things are inside a directory pool. Paths come from ids only; no component may be a symbolic link.

    <path>/volumes/<volume_id>.<raw|qcow2>        its bottom layer, and <volume_id>.<layer_id>.qcow2 each that lies over it
    <path>/images/<image_id>.<qcow2|raw|iso>      with <image_id>.json beside it: what the import proved
    <path>/vms/<vm_id>/{seed.iso,nvram.fd}        and <snapshot_id>.mem, the memory of a snapshot
    <path>/import/                                where operators put files to import
    <path>/.trimtab-<marker>                      proof that a pool is shared

Directories are opened one by one with O_NOFOLLOW and work goes on relative to their descriptors, so that a link swapped in
between check and use leads nowhere. Names that begin with a dot are unfinished and may be removed when nobody holds their lock.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trimtab_agent.hypervisor.kvm import os_errors
from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_marker
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskFormat, PoolKind, PoolSpec

VOLUMES, IMAGES, VMS, IMPORT = "volumes", "images", "vms", "import"
SUBDIRECTORIES = {VOLUMES: 0o711, IMAGES: 0o711, VMS: 0o711, IMPORT: 0o755}
"""QEMU runs as its own user and must pass through; only operators list."""
FILE_KINDS = (PoolKind.DIR, PoolKind.NFS)
"""Kinds whose volumes are files; the others are `block_pools`'."""
VOLUME_FORMATS = (DiskFormat.QCOW2, DiskFormat.RAW)
IMAGE_FORMATS = (DiskFormat.QCOW2, DiskFormat.RAW, DiskFormat.ISO)
SEED_FILE, NVRAM_FILE = "seed.iso", "nvram.fd"

_FORBIDDEN_TREES = ("/proc", "/sys", "/dev", "/etc", "/boot", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/run")
_FORBIDDEN_LIBVIRT = ("/var/lib/libvirt/qemu", "/var/lib/libvirt/dnsmasq", "/var/lib/libvirt/swtpm", "/var/lib/trimtab")
_FORBIDDEN_THEMSELVES = ("/", "/home", "/root", "/tmp", "/var", "/srv", "/mnt", "/media", "/opt", "/lost+found")  # noqa: S108
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The paths of one pool; strings for XML, and opened directories for everything else."""

    pool_id: str
    path: Path

    @classmethod
    def of(cls, pool: PoolSpec) -> "PoolLayout":
        """Return the layout of `pool`. InvalidRequest where its id or path is none that the agent may use."""
        check_id(pool.pool_id, "pool_id")
        if pool.kind not in FILE_KINDS:
            raise InvalidRequest("pool-kind-unknown", f"this host knows no pools of kind {pool.kind}", field="kind")
        return cls(pool_id=pool.pool_id, path=_check_path(pool.path))

    @classmethod
    def of_files(cls, pools: Iterable[PoolSpec]) -> "dict[str, PoolLayout]":
        """Return the layouts of those of the pools whose volumes are files, by id."""
        return {pool.pool_id: cls.of(pool) for pool in pools if pool.kind in FILE_KINDS}

    def volume(self, volume_id: str, format: DiskFormat, layer_id: str = "") -> str:
        return str(self.path / VOLUMES / volume_name(volume_id, format, layer_id))

    def image(self, image_id: str, format: DiskFormat) -> str:
        return str(self.path / IMAGES / image_name(image_id, format))

    def seed(self, vm_id: str) -> str:
        return str(self.path / VMS / check_id(vm_id, "vm_id") / SEED_FILE)

    def memory(self, vm_id: str, snapshot_id: str) -> str:
        return str(self.path / VMS / check_id(vm_id, "vm_id") / memory_name(snapshot_id))

    def nvram(self, vm_id: str) -> str:
        return str(self.path / VMS / check_id(vm_id, "vm_id") / NVRAM_FILE)

    @contextlib.contextmanager
    def open(self, subdirectory: str = "") -> Iterator[int]:
        """Lend a descriptor of the pool's directory or one of its subdirectories."""
        with contextlib.ExitStack() as stack:
            descriptor = os.open("/", _DIRECTORY_FLAGS)
            stack.callback(os.close, descriptor)
            # One by one: O_NOFOLLOW watches over the last component only.
            for part in (*self.path.parts[1:], *([subdirectory] if subdirectory else [])):
                try:
                    descriptor = os.open(part, _DIRECTORY_FLAGS, dir_fd=descriptor)
                except OSError as error:
                    raise self._pool_error(error) from error
                stack.callback(os.close, descriptor)
            yield descriptor

    def _pool_error(self, error: OSError) -> InvalidRequest | Exception:
        missing = os_errors.from_os(error, doing=f"open pool {self.pool_id} at {self.path}")
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) or missing.code == "symlink-refused":
            return InvalidRequest(
                "pool-path-unusable",
                f"pool path {self.path} must be a directory without symbolic links on this host",
                field="path",
            )
        return missing

    def create_subdirectories(self) -> None:
        """Make what is missing below the pool's path."""
        with self.open() as directory:
            for name, mode in SUBDIRECTORIES.items():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=directory)
                    os.chmod(name, mode, dir_fd=directory)

    @contextlib.contextmanager
    def open_vm(self, vm_id: str, *, create: bool) -> Iterator[int | None]:
        """Lend a descriptor of the vm's directory for state files; None where there is none and `create` is off."""
        name = check_id(vm_id, "vm_id")
        with self.open(VMS) as parent:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o711, dir_fd=parent)
            try:
                descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
            except FileNotFoundError:
                yield None
                return
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def remove_vm(self, vm_id: str) -> None:
        """Remove the vm's state files."""
        name = check_id(vm_id, "vm_id")
        with self.open_vm(vm_id, create=False) as directory:
            if directory is None:
                return
            for entry in os.listdir(directory):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry, dir_fd=directory)
        with self.open(VMS) as parent:
            try:
                os.rmdir(name, dir_fd=parent)
            except FileNotFoundError:
                pass
            except OSError as error:
                # A QEMU that still has the seed open, perhaps on another host, keeps it as .nfs* or .fuse_hidden* until it ends.
                if error.errno != errno.ENOTEMPTY:
                    raise


def volume_name(volume_id: str, format: DiskFormat, layer_id: str = "") -> str:
    if format not in VOLUME_FORMATS:
        raise InvalidRequest("volume-format", f"a volume is raw or qcow2, not {format}", field="format")
    if not layer_id:
        return f"{check_id(volume_id, 'volume_id')}.{format.value}"
    if format is not DiskFormat.QCOW2:
        raise InvalidRequest("layer-format", "only a qcow2 volume has layers", field="layer_id")
    return f"{check_id(volume_id, 'volume_id')}.{check_id(layer_id, 'layer_id')}.{format.value}"


def memory_name(snapshot_id: str) -> str:
    return f"{check_id(snapshot_id, 'snapshot_id')}.mem"


def image_name(image_id: str, format: DiskFormat) -> str:
    return f"{check_id(image_id, 'image_id')}.{format.value}"


def marker_name(marker: str) -> str:
    return f".trimtab-{check_marker(marker)}"


def regular_file(directory: int, name: str) -> os.stat_result | None:
    """Return the file's facts, or None where there is none. InvalidRequest where something else has the name."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequest("not-a-file", f"{name} in the pool is not a regular file", name=name)
    return found


def sync_directory(directory: int) -> None:
    """Make names in `directory` survive a power cut. Some network filesystems cannot; they sync by themselves."""
    with contextlib.suppress(OSError):
        os.fsync(directory)


def _check_path(path: str) -> Path:
    text = os.path.normpath(path)
    wanted = InvalidRequest(
        "pool-path-refused",
        f"pool path {path[:200]!r} must be absolute, normal, and outside the system's directories",
        field="path",
    )
    if not path.startswith("/") or path.startswith("//") or "\0" in path or text != path.rstrip("/"):
        raise wanted
    checked = Path(text)
    if text in _FORBIDDEN_THEMSELVES:
        raise wanted
    for tree in (*_FORBIDDEN_TREES, *_FORBIDDEN_LIBVIRT):
        # Below a forbidden tree, or around it: a pool at /var/lib would hold libvirt's own files.
        if checked.is_relative_to(tree) or Path(tree).is_relative_to(checked):
            raise wanted
    return checked
