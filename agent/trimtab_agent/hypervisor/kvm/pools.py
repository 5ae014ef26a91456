"""Directory pools of this host: known to libvirt under `trimtab-<pool_id>`, so that an agent that lost its journal finds them.

libvirt needs the pool object as the target of a migration that copies disks ("no storage pool with matching target path"), and keeps
it on disk for us. Everything on files happens here and in `volumes.py` and `images.py`, never through libvirt, which probes formats.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import libvirt

from trimtab_agent.hypervisor.kvm import block_pools, errors, os_errors, volumes
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.identifiers import DOMAIN_PREFIX, check_id
from trimtab_agent.hypervisor.kvm.nfs_mounts import MOUNT_TIMEOUT_S, NfsMounts
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout, marker_name, sync_directory
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import PoolKind, PoolObservation, PoolSpec

T = TypeVar("T")

OBSERVE_TIMEOUT_S = 2.0
BLOCK_TIMEOUT_S = 8.0
"""Programs of LVM's and Ceph's are started to look at such a pool."""
_MARKER_BYTES = 4096


class Pools:
    """Ensures, observes and forgets pools. Thread-safe."""

    def __init__(self, connection: Connection, keys: VolumeKeys, mounts: NfsMounts | None = None) -> None:
        self._connection = connection
        self._keys = keys
        self._mounts = mounts or NfsMounts()
        self._guarded = GuardedCalls()

    def ensure(self, pool: PoolSpec) -> PoolObservation:
        if block_pools.is_block(pool):
            block_pools.check(pool)
            self._keys.of_pool(pool)  # it is given where it is missing
            return self.observe(pool)
        layout = PoolLayout.of(pool)
        if pool.kind is PoolKind.NFS:
            self._on_storage(layout, lambda: self._mounts.ensure(pool), timeout_s=MOUNT_TIMEOUT_S + 5)
        self._refuse_second_path(pool, layout)
        self._on_storage(layout, layout.create_subdirectories, timeout_s=10.0)
        with self._connection.use(f"define pool {pool.pool_id}", changes=True) as connection:
            _ensure_libvirt_pool(connection, layout)
        return self.observe(pool)

    def observe(self, pool: PoolSpec, *, known: PoolObservation | None = None) -> PoolObservation:
        now_ms = time.time_ns() // 1_000_000
        is_known = known is not None and known.is_responsive
        if block_pools.is_block(pool):
            if known is not None:
                return known  # programs would be started for it
            return self._observe_block(pool, now_ms)
        layout = PoolLayout.of(pool)
        try:
            self._watch_mount(pool, layout)
            return self._guarded.run(
                pool.pool_id, lambda: _observe(layout, now_ms, known if is_known else None), timeout_s=OBSERVE_TIMEOUT_S
            )
        except Hung:
            problem, is_hung = f"{layout.path} does not answer", True
        except (TrimtabError, OSError) as error:
            problem, is_hung = str(error), getattr(error, "code", "") == "pool-hung"
        return PoolObservation(pool_id=pool.pool_id, is_responsive=False, is_hung=is_hung, problem=problem, observed_at_ms=now_ms)

    def _observe_block(self, pool: PoolSpec, now_ms: int) -> PoolObservation:
        try:
            secret = self._keys.of_pool_if_here(pool)
            return self._guarded.run(pool.pool_id, lambda: block_pools.observe(pool, secret), timeout_s=BLOCK_TIMEOUT_S)
        except Hung:
            problem = f"pool {pool.name or pool.pool_id} does not answer"
        return PoolObservation(pool_id=pool.pool_id, is_responsive=False, is_hung=True, problem=problem, observed_at_ms=now_ms)

    def require_there(self, pools: Iterable[PoolSpec]) -> None:
        """As `require_responsive` of those whose volumes are files: what is in the network can hang nothing here."""
        for pool in pools:
            if not block_pools.is_block(pool):
                self.require_responsive(pool)

    def require_responsive(self, pool: PoolSpec) -> PoolLayout:
        """Return the layout of a pool that answers now. Unavailable: it hangs, and who worked on it would hang with it."""
        layout = PoolLayout.of(pool)
        if pool.kind is PoolKind.NFS and not self._mounts.is_mounted(pool):
            raise Unavailable("pool-not-mounted", f"pool {pool.pool_id} is not mounted at {pool.path}")
        self._on_storage(layout, lambda: _touch(layout), timeout_s=OBSERVE_TIMEOUT_S)
        return layout

    def _watch_mount(self, pool: PoolSpec, layout: PoolLayout) -> None:
        """Mount an export anew that is not: the host has booted, or somebody unmounted it."""
        if pool.kind is PoolKind.NFS and not self._mounts.is_mounted(pool):
            self._on_storage(layout, lambda: self._mounts.ensure(pool), timeout_s=MOUNT_TIMEOUT_S + 5)

    def _refuse_second_path(self, pool: PoolSpec, layout: PoolLayout) -> None:
        """Raise Conflict where another pool of this host is the same directory under another name, by a bind mount or a second export."""
        own = self._on_storage(layout, lambda: _identity(layout), timeout_s=OBSERVE_TIMEOUT_S)
        for other in self.known():
            if other.pool_id == pool.pool_id:
                continue
            there = PoolLayout(pool_id=other.pool_id, path=Path(other.path))
            try:
                is_same = self._guarded.run(other.pool_id, lambda: _identity(there), timeout_s=OBSERVE_TIMEOUT_S) == own  # noqa: B023
            except (Hung, TrimtabError, OSError):
                continue  # one that does not answer is not the one that just did
            if is_same:
                raise Conflict(
                    "pool-path-taken",
                    f"{layout.path} is the same directory as {there.path} of pool {other.pool_id} on this host",
                    pool_id=other.pool_id,
                )

    def known(self) -> tuple[PoolSpec, ...]:
        """Return the pools that were ensured on this host, in order of id; whether they are shared is not known here."""
        with self._connection.use("list pools") as connection:
            found = [_spec_of(pool) for pool in connection.listAllStoragePools() if pool.name().startswith(DOMAIN_PREFIX)]
        return tuple(sorted(found, key=lambda spec: spec.pool_id))

    def check_marker(self, pool: PoolSpec, marker: str, *, write_content: str, remove: bool) -> str:
        layout, name, content = PoolLayout.of(pool), marker_name(marker), write_content.encode()
        if len(content) > _MARKER_BYTES:
            raise InvalidRequest("marker-too-long", f"a marker holds at most {_MARKER_BYTES} bytes", field="write_content")
        return self._on_storage(layout, lambda: _marker(layout, name, content, remove=remove), timeout_s=10.0)

    def remove(self, pool_id: str) -> None:
        """Forget the pool; what was mounted for it is unmounted, also where its server does not answer."""
        name = DOMAIN_PREFIX + check_id(pool_id, "pool_id")
        with self._connection.use(f"forget pool {pool_id}", changes=True) as connection:
            try:
                pool = connection.storagePoolLookupByName(name)
                if pool.isActive():
                    pool.destroy()
                pool.undefine()
            except libvirt.libvirtError as error:
                if not errors.is_gone(error):
                    raise
        self._mounts.remove(pool_id)

    def _on_storage(self, layout: PoolLayout, work: Callable[[], T], *, timeout_s: float) -> T:
        try:
            return self._guarded.run(layout.pool_id, work, timeout_s=timeout_s)
        except Hung as error:
            raise Unavailable("pool-hung", f"pool {layout.pool_id} at {layout.path} does not answer") from error
        except OSError as error:
            raise os_errors.from_os(error, doing=f"use pool {layout.pool_id}") from error


def _observe(layout: PoolLayout, now_ms: int, known: PoolObservation | None) -> PoolObservation:
    with layout.open() as directory:
        space = os.fstatvfs(directory)
    promised_bytes, written_bytes = (known.promised_bytes, known.written_bytes) if known is not None else volumes.growth(layout)
    return PoolObservation(
        pool_id=layout.pool_id,
        capacity_bytes=space.f_blocks * space.f_frsize,
        available_bytes=space.f_bavail * space.f_frsize,
        promised_bytes=promised_bytes,
        written_bytes=written_bytes,
        is_responsive=True,
        observed_at_ms=now_ms,
    )


def _identity(layout: PoolLayout) -> tuple[int, int]:
    with layout.open() as directory:
        found = os.fstat(directory)
    return found.st_dev, found.st_ino


def _touch(layout: PoolLayout) -> None:
    with layout.open() as directory:
        os.fstatvfs(directory)


def _marker(layout: PoolLayout, name: str, content: bytes, *, remove: bool) -> str:
    with layout.open() as directory:
        if remove:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            return ""
        if content:
            flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, 0o644, dir_fd=directory), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            sync_directory(directory)
            return content.decode()
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return ""
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_MARKER_BYTES).decode(errors="replace")


def _ensure_libvirt_pool(connection: Any, layout: PoolLayout) -> None:
    name, target = DOMAIN_PREFIX + layout.pool_id, str(layout.path / VOLUMES)
    try:
        pool = connection.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if not errors.is_gone(error):
            raise
        pool = connection.storagePoolDefineXML(_pool_xml(name, target))
    if parse(pool.XMLDesc()).findtext("target/path") != target:
        raise Conflict("pool-path-differs", f"pool {layout.pool_id} is at another path on this host; remove it first")
    if not pool.isActive():
        pool.create()


def _pool_xml(name: str, target: str) -> str:
    pool = ElementTree.Element("pool", type="dir")
    ElementTree.SubElement(pool, "name").text = name
    ElementTree.SubElement(ElementTree.SubElement(pool, "target"), "path").text = target
    return ElementTree.tostring(pool, encoding="unicode")


def _spec_of(pool: Any) -> PoolSpec:
    target = parse(pool.XMLDesc()).findtext("target/path") or ""
    return PoolSpec(pool_id=pool.name().removeprefix(DOMAIN_PREFIX), path=target.removesuffix(f"/{VOLUMES}"))
