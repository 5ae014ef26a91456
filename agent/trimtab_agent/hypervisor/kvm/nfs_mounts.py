"""NFS exports as directories of this host: mounted with options of ours, never with text that somebody typed.

What is mounted is read from the kernel's own table, which asks no server and so never hangs. An export that is not mounted is no empty
pool: the directory below is closed, and nothing is made in it.
"""

import contextlib
import ipaddress
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import PoolSpec
from trimtab_protos.pool_messages import NfsSource

ROOT = Path("/srv/trimtab-mounts")
MOUNT_TIMEOUT_S = 30.0
_MOUNT_TABLE = Path("/proc/self/mountinfo")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_EXPORT = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+")
_VERSIONS = ("3", "4.0", "4.1", "4.2")
_ESCAPED = re.compile(r"\\([0-7]{3})")
Run = Callable[[Sequence[str]], "tuple[int, str]"]


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the kernel's table."""

    source: str
    kind: str


def source_name(nfs: NfsSource) -> str:
    """Return what is mounted, as the kernel shows it. InvalidRequest where server or export is none."""
    if _EXPORT.fullmatch(nfs.export) is None or len(nfs.export) > 500:
        raise InvalidRequest(
            "nfs-export", f"export {nfs.export[:100]!r} must be an absolute path such as /vms", field="nfs.export"
        )
    try:
        address = ipaddress.ip_address(nfs.server)
    except ValueError:
        if _HOST_NAME.fullmatch(nfs.server) is None or len(nfs.server) > 253:
            message = f"server {nfs.server[:100]!r} must be a name or an address such as nas.example or 10.0.0.5"
            raise InvalidRequest("nfs-server", message, field="nfs.server") from None
        return f"{nfs.server}:{nfs.export}"
    return f"[{address}]:{nfs.export}" if address.version == 6 else f"{address}:{nfs.export}"


def options(nfs: NfsSource) -> str:
    """Return the options of the mount. InvalidRequest names a bound that is broken."""
    if nfs.version not in _VERSIONS:
        raise InvalidRequest("nfs-version", f"version must be one of {', '.join(_VERSIONS)}", field="nfs.version")
    for field, value, high in (("timeout_s", nfs.timeout_s, 600), ("retries", nfs.retries, 100)):
        if not 1 <= value <= high:
            raise InvalidRequest(
                f"nfs-{field.replace('_', '-')}", f"{field} must be 1 to {high}", field=f"nfs.{field}", bound=high
            )
    words = [
        "rw",
        "nodev",
        "nosuid",
        "noexec",
        "noatime",
        f"vers={nfs.version}",
        "proto=tcp",
        "soft" if nfs.is_soft else "hard",
        # In tenths of a second. Said always: the kernel's defaults differ between versions of the protocol.
        f"timeo={nfs.timeout_s * 10}",
        f"retrans={nfs.retries}",
    ]
    return ",".join(words)


def mount_command(pool: PoolSpec, root: Path = ROOT) -> list[str]:
    nfs = require_source(pool, root)
    return ["mount", "-t", "nfs", "-o", options(nfs), "--", source_name(nfs), pool.path]


def unmount_command(path: str, *, is_lazy: bool) -> list[str]:
    """`is_lazy`: for a server that does not answer; what has it open keeps it until it ends."""
    return ["umount", *(["--lazy", "--force"] if is_lazy else []), "--", path]


def require_source(pool: PoolSpec, root: Path = ROOT) -> NfsSource:
    """Return from where the pool is mounted. InvalidRequest where it says nothing, or a path that is not the agent's to mount on."""
    if pool.nfs is None:
        raise InvalidRequest("nfs-missing", f"pool {pool.pool_id} is of kind nfs and names no export", field="nfs")
    if pool.path != str(root / pool.pool_id):
        raise InvalidRequest("pool-path-refused", f"an NFS pool is mounted at {root / pool.pool_id}", field="path")
    return pool.nfs


def mounted_at(path: str, table: str) -> Mounted | None:
    """Return what is mounted at the path, by the text of the kernel's table; the last mount hides those before it."""
    found = None
    for line in table.splitlines():
        fields = line.split(" ")
        if "-" not in fields or _unescaped(fields[4]) != path:
            continue
        kind, source = fields[fields.index("-") + 1 :][:2]
        found = Mounted(_unescaped(source), kind)
    return found


class NfsMounts:
    """The exports that are mounted on this host. Thread-safe; the arguments are what tests put in the kernel's place."""

    def __init__(self, root: Path = ROOT, *, table: Path = _MOUNT_TABLE, run: Run | None = None) -> None:
        self._root = root
        self._table = table
        self._run = run or _run

    def is_mounted(self, pool: PoolSpec) -> bool:
        """Tell whether the pool's export is mounted. Conflict: something else is."""
        nfs, seen = require_source(pool, self._root), mounted_at(pool.path, self._table.read_text())
        if seen is None:
            return False
        if not seen.kind.startswith("nfs") or seen.source != source_name(nfs):
            raise Conflict(
                "mount-differs",
                f"{seen.source} ({seen.kind}) is mounted at {pool.path}, not {source_name(nfs)}",
                source=seen.source,
            )
        return True

    def ensure(self, pool: PoolSpec) -> None:
        """Mount the export unless it is. Unavailable: the server does not answer; Conflict: it refuses, or this host cannot mount NFS."""
        command = mount_command(pool, self._root)
        if self.is_mounted(pool):
            return
        # Closed to everybody while nothing is mounted, QEMU's user above all.
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(pool.path, 0o000)
        code, complaint = self._run(command)
        if code:
            raise failure(pool, complaint)

    def remove(self, pool_id: str) -> None:
        """Unmount what was mounted for the pool, also where its server does not answer; nothing where nothing is."""
        path = str(self._root / pool_id)
        if mounted_at(path, self._table.read_text()) is None:
            return
        code, _complaint = self._run(unmount_command(path, is_lazy=False))
        if code:
            code, complaint = self._run(unmount_command(path, is_lazy=True))
            if code:
                raise Conflict("unmount-failed", f"could not unmount {path}: {complaint.strip()[:300]}")
        with contextlib.suppress(OSError):
            os.rmdir(path)


def failure(pool: PoolSpec, complaint: str) -> TrimtabError:
    """Return what `mount` said, as one of the ten kinds. The texts are of nfs-utils 2.6."""
    what, said = source_name(pool.nfs) if pool.nfs else pool.path, complaint.strip()[:300]
    lowered = said.lower()
    if "access denied" in lowered or "operation not permitted" in lowered:
        return Conflict("nfs-refused", f"{what}: the server does not export it to this host; see its /etc/exports ({said})")
    if (
        "unknown filesystem type" in lowered
        or "no such device" in lowered
        or "bad option" in lowered
        or "need a /sbin/mount" in lowered
    ):
        return Conflict(
            "nfs-not-here", f"this host cannot mount NFS; install nfs-common, and load the kernel's nfs module ({said})"
        )
    if "no such file or directory" in lowered:
        return Conflict("nfs-export-missing", f"{what}: the server has no such export ({said})")
    return Unavailable("nfs-unreachable", f"{what} could not be mounted: {said or 'the server does not answer'}")


def _run(command: Sequence[str]) -> tuple[int, str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    try:
        ended = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            env=environment,
            timeout=MOUNT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return 32, "timed out"
    return ended.returncode, ended.stderr


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found.group(1), 8)), text)
