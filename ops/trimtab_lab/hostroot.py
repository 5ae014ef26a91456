"""Builds the private root of a lab host: seen from inside, a machine of its own. Standard library only.

The new root is a small tmpfs onto which the machine's directories are bound one by one, since a host needs places that
the machine may not have (/etc/trimtab, /srv/trimtab-shared) and nothing may be created on the machine for them. Rejected:
overlayfs over `/` (the upper directory would lie inside the lower one, which the kernel refuses).

What is the machine's: /usr, /home, /tmp and other data directories. What is the host's own: /etc (a copy, made once), /run,
/dev/shm, /dev/pts, /var/log, the `binds` of its spec, machine-id, boot id and SMBIOS UUID.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MS_REC, MS_BIND, MS_PRIVATE, MS_REMOUNT, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x4000, 0x1000, 0x40000, 0x20, 2, 4, 8
MNT_DETACH = 2
OLD_ROOT = ".machine"

OWN_TOP_DIRECTORIES = {"proc", "sys", "dev", "run", "etc", "var", "srv", "lost+found"}
OWN_VAR_DIRECTORIES = {"lib", "log", "cache", "run", "lock", "tmp"}
DISK_FILESYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "overlay", "virtiofs", "9p", "nfs", "nfs4"}
"""Mounts below a bound directory that are bound as well, where a clone or a cache may lie. Never FUSE: a copy of another
lab's shared directory would keep its file server alive after that lab is gone."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class RootPlan:
    root: Path
    """Empty directory on the machine over which the new root is mounted, inside the host's mount namespace only."""
    binds: Mapping[str, str]
    """Path inside the host → directory or file on the machine."""
    cgroup_controllers: tuple[str, ...]
    """v1 controllers to mount, or `("unified",)`."""
    boot_id: str
    smbios_uuid: str


def mount(source: str | None, target: Path | str, *, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    failed = _libc.mount(
        source.encode() if source else None,
        str(target).encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target} ({kind or flags}): {os.strerror(number)}")


def unshare(flags: int) -> None:
    if _libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare {flags:#x}: {os.strerror(number)}")


def enter_network_namespace(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, 0x40000000):
            number = ctypes.get_errno()
            raise OSError(number, f"setns {path}: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def enter_root(plan: RootPlan) -> None:
    """Builds the root and moves this process (and its mount namespace) into it; the machine's root is let go."""
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", plan.root, kind="tmpfs", flags=MS_NODEV, options="mode=755,size=16m")
    nested = [path for path in _nested_disk_mounts() if not path.is_relative_to(plan.root)]
    _bind_machine_directories(plan.root)
    for path in nested:
        target = plan.root / path.relative_to("/")
        if target.is_dir() and not _is_own(path):
            bind(path, target)
    (plan.root / "run").mkdir()
    mount("tmpfs", plan.root / "run", kind="tmpfs", flags=MS_NOSUID | MS_NODEV, options="mode=755")
    (plan.root / "run/lock").mkdir(mode=0o1777)
    for inside, source in sorted(plan.binds.items()):
        bind(Path(source), plan.root / inside.lstrip("/"))
    _mount_kernel_filesystems(plan.root, plan.cgroup_controllers)
    _give_identity(plan)
    _pivot(plan.root)


def bind(source: Path, target: Path) -> None:
    """Binds a directory or a file without what is mounted below it, making the place for it."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.touch()
    mount(str(source), target, flags=MS_BIND)


def _bind_machine_directories(root: Path) -> None:
    for entry in _entries(Path("/"), leaving_out=OWN_TOP_DIRECTORIES):
        _mirror(entry, root)
    for entry in _entries(Path("/var"), leaving_out=OWN_VAR_DIRECTORIES):
        _mirror(entry, root)
    for parent in (Path("/var/lib"), Path("/var/cache")):
        (root / parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
        for entry in _entries(parent, leaving_out={"libvirt", "trimtab"}):
            _mirror(entry, root)
    (root / "var/log").mkdir()
    (root / "var/run").symlink_to("/run")
    (root / "var/lock").symlink_to("/run/lock")
    (root / "srv").mkdir()


def _entries(directory: Path, *, leaving_out: set[str]) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from (entry for entry in entries if entry.name not in leaving_out)


def _mirror(entry: os.DirEntry[str], root: Path) -> None:
    target = root / entry.path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.is_symlink():
        target.symlink_to(os.readlink(entry.path))
    elif entry.is_dir():
        bind(Path(entry.path), target)


def _is_own(path: Path) -> bool:
    parts = path.parts[1:]
    if not parts or parts[0] in OWN_TOP_DIRECTORIES - {"var"}:
        return True
    return parts[0] == "var" and (len(parts) < 3 or parts[2] in {"libvirt", "trimtab"})


def _nested_disk_mounts() -> list[Path]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        path = fields.split()[4].encode().decode("unicode_escape")
        if path != "/" and kind.split()[0] in DISK_FILESYSTEMS:
            found.append(Path(path))
    return sorted(found)


def _mount_kernel_filesystems(root: Path, controllers: tuple[str, ...]) -> None:
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir()
    mount("proc", root / "proc", kind="proc", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", root / "sys", kind="sysfs", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC)
    cgroups = root / "sys/fs/cgroup"
    if controllers == ("unified",):
        mount("cgroup2", cgroups, kind="cgroup2", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC)
    else:
        mount("tmpfs", cgroups, kind="tmpfs", options="mode=755,size=1m")
        for controller in controllers:
            (cgroups / controller).mkdir()
            mount("cgroup", cgroups / controller, kind="cgroup", options=controller)
    mount("/dev", root / "dev", flags=MS_BIND)
    mount("devpts", root / "dev/pts", kind="devpts", options="newinstance,gid=5,mode=620,ptmxmode=666")
    mount("tmpfs", root / "dev/shm", kind="tmpfs", options="mode=1777")


def _give_identity(plan: RootPlan) -> None:
    """The kernel is shared, so what an agent asks it about the machine's identity is answered by files of our own."""
    identity = plan.root / "run/trimtab-lab-identity"
    identity.mkdir(mode=0o755)
    for name, text, place in (
        ("boot_id", plan.boot_id, "proc/sys/kernel/random/boot_id"),
        ("product_uuid", plan.smbios_uuid, "sys/class/dmi/id/product_uuid"),
    ):
        (identity / name).write_text(text + "\n")
        target = plan.root / place
        if target.exists():
            mount(str(identity / name), target.resolve(), flags=MS_BIND)


def _pivot(root: Path) -> None:
    (root / OLD_ROOT).mkdir()
    os.chdir(root)
    subprocess.run(["pivot_root", ".", OLD_ROOT], check=True, timeout=10)
    os.chroot(".")
    os.chdir("/")
    if _libc.umount2(f"/{OLD_ROOT}".encode(), MNT_DETACH):
        raise OSError(ctypes.get_errno(), "cannot let the machine's root go")
    with contextlib.suppress(OSError):
        os.rmdir(f"/{OLD_ROOT}")
