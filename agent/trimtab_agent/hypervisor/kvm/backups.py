"""Pull backups of running domains: libvirt fixes an instant and serves it by NBD; `backup.running` copies it.

    begin: end what an earlier agent left ── hook, freeze ── backupBegin (job and checkpoint in one transaction) ── thaw, hook
    read:  while the room for what the guest overwrites is watched (`scratch`)
    end:   abortJob, the normal end of a pull job (`pull_jobs`)

A stopped one is read by `cold_backups`, without starting anything.

Checkpoints are libvirt's on qcow2 and QEMU's alone on everything else (`memory_bitmaps`).

A freeze is always followed by a thaw (`freezes`), the hook of a guest's owner by its other half (`backup_hooks`). libvirt waits 30 s for
a lock when a second job is begun, so it is asked first. A checkpoint whose bitmap is missing or marked in use (QEMU was killed) is refused
by libvirt at once, which names the disk: that one is read in full, the others are not.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.restoring import network_volume, restore_disk, restore_over
from trimtab_agent.backup.source import NVRAM, DiskWish, Hold, Instant, InstantSource, ServedDisk, ToldApart
from trimtab_agent.hypervisor.kvm import block_pools, checkpoints, memory_bitmaps, os_errors, state_files, volumes
from trimtab_agent.hypervisor.kvm.backup_hooks import HOOK_S, GuestHooks, Hooked
from trimtab_agent.hypervisor.kvm.backup_xml import (
    PulledDisk,
    all_targets,
    bitmap_name,
    checkpoint_xml,
    nvram_file,
)
from trimtab_agent.hypervisor.kvm.cold_backups import drop_marks, stopped_instant
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.disk_sources import DiskSource, sources_of
from trimtab_agent.hypervisor.kvm.domains import require
from trimtab_agent.hypervisor.kvm.freezes import GuestFreezes
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.lent_secrets import in_memory
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout
from trimtab_agent.hypervisor.kvm.pull_jobs import PullJobs, is_paused_by_error
from trimtab_agent.hypervisor.kvm.scratch import rooms_of, watched
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import PoolKind, PoolSpec, VolumeSpec

log = structlog.get_logger(__name__)

SOCKET_DIR = Path("/var/lib/libvirt/qemu")
"""QEMU's own directory: it binds the socket itself, as its own user."""
_TOGETHER_S = 3.0
"""How long the hook of one of several vms at one instant may take: the others' guests stand still meanwhile."""
_NOBODY = Hooked(is_held=False, not_asked="nobody was to ask the guest for anything")
_NOT_FOLLOWED = "QEMU has begun anew since, and what changed on a disk that is not qcow2 is known to it alone"


@dataclass(frozen=True, slots=True)
class _Begun:
    consistency: Consistency
    notes: Mapping[str, str]
    denied: Mapping[str, str]
    """Disk → why it is read in full."""
    followed: Mapping[str, memory_bitmaps.Followed]
    """Alias → a disk that QEMU alone follows."""
    not_asked: str


class Backups:
    """The `BackupSource` of this host. Thread-safe; one backup of a vm at a time is the caller's to see to."""

    def __init__(
        self,
        connection: Connection,
        *,
        refuse_if_used: Callable[[Sequence[str], str], None] = lambda _paths, _what: None,
        instants: InstantSource,
        keys: VolumeKeys | None = None,
        pauses: GuestPauses | None = None,
        freezes: GuestFreezes | None = None,
        hooks: GuestHooks | None = None,
        socket_dir: Path = SOCKET_DIR,
    ) -> None:
        """`refuse_if_used` raises Conflict where a domain of this host has one of the files as a disk; `keys` has the secrets of pools."""
        self.instants = instants
        self._keys = keys or VolumeKeys()
        self._connection = connection
        self._refuse_if_used = refuse_if_used
        self._pauses = pauses or GuestPauses(socket_dir)
        self._freezes = freezes or GuestFreezes(socket_dir)
        self._hooks = hooks or GuestHooks(socket_dir)
        self._socket_dir = socket_dir
        self.jobs = PullJobs(socket_dir)

    @contextlib.contextmanager
    def serve(
        self,
        vm_id: str,
        wishes: Sequence[DiskWish],
        *,
        checkpoint: str,
        wants_freeze: bool,
        hold: Hold | None = None,
        scratch: PoolSpec | None = None,
    ) -> Iterator[Instant]:
        """See `BackupSource.serve`."""
        with self.jobs.held(self._connection, vm_id):
            yield from self._serve(vm_id, wishes, checkpoint, wants_freeze=wants_freeze, hold=hold, scratch=scratch)

    def _serve(
        self,
        vm_id: str,
        wishes: Sequence[DiskWish],
        checkpoint: str,
        *,
        wants_freeze: bool,
        hold: Hold | None,
        scratch: PoolSpec | None,
    ) -> Iterator[Instant]:
        socket = self.jobs.socket(vm_id)
        with self._connection.use("look at the domain") as connection:
            domain = require(connection, vm_id)
            is_running = bool(domain.isActive())
            if is_running:
                self._pauses.settle(domain, vm_id)
                self._freezes.settle(domain, vm_id)
                self._hooks.settle(domain, vm_id)
                self.jobs.end_leftover(domain, vm_id)
                # Of this very backup, whose agent died after it had begun: its bits go to the checkpoint before.
                checkpoints.delete(domain, lambda name: name == checkpoint)
            definition = domain.XMLDesc(0)
            stored = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            stood_still = is_running and is_paused_by_error(domain)
            present = {found.getName() for found in domain.listAllCheckpoints()}
            sources = sources_of(definition)
            _refuse_missing(wishes, sources)
            unknown: Mapping[str, str] = {}
            if is_running:
                kept = [wish for wish in wishes if sources[wish.name].keeps_bitmaps]
                unknown = checkpoints.unknown_here(domain, kept, present, all_targets(definition))
        if not is_running:
            with stopped_instant(wishes, sources, socket, self._keys, checkpoint=checkpoint) as instant:
                held = hold() if hold is not None else {}  # no start of it goes beside its backup
                yield replace(instant, attachments=_attachments(stored), notes={**instant.notes, **held})
            return
        pulled, denied = _to_pull(wishes, sources, unknown, scratch)
        rooms = rooms_of(disk.scratch for disk in pulled)
        begun = self._begin(vm_id, pulled, all_targets(definition), socket, checkpoint, wants_freeze=wants_freeze, hold=hold)
        denied |= begun.denied
        created_ms = time.time_ns() // 1_000_000 - int(begun.notes.get("held_ms", "0"))
        bases = {wish.name: wish.base_checkpoint for wish in wishes}
        readers: list[NbdClient] = []
        watch = watched(
            rooms,
            stood_still=stood_still,
            stands_still=partial(self._stands_still, vm_id),
            settle=partial(self._end_for_room, vm_id, readers),
        )
        with watch, contextlib.ExitStack() as stack:
            served = [
                _open(stack, readers, socket, disk, denied.get(disk.name, ""))
                if not disk.followed_as
                else stack.enter_context(self._told_apart(vm_id, readers, socket, disk, begun, bases[disk.name]))
                for disk in pulled
            ]
            yield Instant(created_ms, begun.consistency, served, _attachments(stored), begun.notes, not_asked=begun.not_asked)

    def keep_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """See `BackupSource.keep_checkpoint`."""
        with self._connection.use("drop older checkpoints", changes=True) as connection:
            domain = require(connection, vm_id)
            checkpoints.delete(domain, lambda name: name != checkpoint)
            if not domain.isActive():
                drop_marks(_disks_of(domain), lambda name: name.startswith(checkpoints.PREFIX) and name != checkpoint)
                return
            memory_bitmaps.keep_only(domain, _followed_in_memory(domain), checkpoint)

    def drop_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """See `BackupSource.drop_checkpoint`."""
        with self._connection.use("drop a checkpoint", changes=True) as connection:
            domain = require(connection, vm_id)
            checkpoints.delete(domain, lambda name: name == checkpoint)
            if not domain.isActive():
                drop_marks(_disks_of(domain), lambda name: name == checkpoint)
                return
            memory_bitmaps.drop(domain, _followed_in_memory(domain), checkpoint)

    @contextlib.contextmanager
    def _told_apart(
        self, vm_id: str, readers: list[NbdClient], socket: Path, disk: PulledDisk, begun: "_Begun", base: str
    ) -> Iterator[ServedDisk]:
        """Lend a disk that QEMU alone follows; what changed is told by an export of its own."""
        export, found = f"{memory_bitmaps.PREFIX}{disk.name}", begun.followed.get(disk.followed_as)
        with contextlib.ExitStack() as stack:
            content = _reader(stack, readers, socket, disk.name, [ALLOCATION])
            if not base or found is None or base not in found.bitmaps:
                yield ServedDisk(disk.name, content, denied=_NOT_FOLLOWED if base else "")
                return
            with self._connection.use("tell what changed", changes=True) as connection:
                context = memory_bitmaps.serve(require(connection, vm_id), found, base, export)
            stack.callback(self._unfollow, vm_id, found, export)
            changes = _reader(stack, readers, socket, export, [context])
            yield ServedDisk(disk.name, ToldApart(content, changes, context), context)

    def _unfollow(self, vm_id: str, disk: memory_bitmaps.Followed, export: str) -> None:
        # A guest that stopped meanwhile has taken both along.
        with contextlib.suppress(TrimtabError), self._connection.use("end an export", changes=True) as connection:
            domain = require(connection, vm_id)
            if domain.isActive():
                memory_bitmaps.end(domain, disk, export)

    def restore_volume(
        self, volume: VolumeSpec, pool: PoolSpec, disk: DiskReader, *, on_progress: Callable[[int, int], None]
    ) -> int:
        """See `BackupSource.restore_volume`. Nothing half restored stays behind, but in a LUN, which is written over."""
        if block_pools.is_block(pool):
            return self._restore_block(volume, pool, disk, on_progress=on_progress)
        layout = PoolLayout.of(pool)
        self._refuse_if_used(volumes.names_of(volume.volume_id, layout), f"volume {volume.volume_id}")
        volumes.delete(volume.volume_id, layout)  # of an attempt that broke off
        volumes.ensure(volume, layout)
        try:
            return restore_disk(
                disk,
                Path(layout.volume(volume.volume_id, volume.format)),
                format=volume.format.value,
                on_progress=on_progress,
            )
        except BaseException as error:
            with contextlib.suppress(TrimtabError):
                volumes.delete(volume.volume_id, layout)
            if isinstance(error, OSError):
                raise os_errors.from_os(error, doing=f"restore volume {volume.volume_id}") from error
            raise

    def _restore_block(
        self, volume: VolumeSpec, pool: PoolSpec, disk: DiskReader, *, on_progress: Callable[[int, int], None]
    ) -> int:
        if pool.kind not in (PoolKind.RBD, PoolKind.ISCSI):
            message = f"volumes of pool {pool.name or pool.pool_id} are not written from a backup; restore it to a pool of files"
            raise Conflict("pool-without-files", message, pool_id=pool.pool_id)
        secret, is_new = self._keys.of_pool(pool), pool.kind is PoolKind.RBD
        self._refuse_if_open(volume.volume_id)
        if is_new:
            block_pools.delete_volume(volume, pool, secret)  # of an attempt that broke off
        block_pools.ensure_volume(volume, pool, secret)
        socket = self._socket_dir / f"trimtab-{check_id(volume.volume_id, 'volume_id')}-restore.sock"
        with in_memory(secret) as descriptor:
            lent = [] if descriptor is None else [descriptor]
            objects = [block_pools.secret_object(f"/proc/self/fd/{one}", is_ceph_key=is_new) for one in lent]
            options = block_pools.image_options(volume, pool)
            try:
                return restore_over(
                    disk,
                    lambda is_writable: network_volume(
                        options, socket=socket, objects=objects, pass_fds=lent, is_writable=is_writable
                    ),
                    is_empty=is_new,
                    on_progress=on_progress,
                )
            except BaseException:
                if is_new:
                    with contextlib.suppress(TrimtabError):
                        block_pools.delete_volume(volume, pool, secret)
                raise

    def _refuse_if_open(self, volume_id: str) -> None:
        """Raise Conflict where a guest of this host has the volume open: nothing else would keep it from being written under it."""
        with self._connection.use(f"see who has volume {volume_id} open") as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                if f"'ua-{volume_id}'" in domain.XMLDesc(0):
                    message = f"volume {volume_id} is open in domain {domain.name()}, which runs on this host"
                    raise Conflict("volume-in-use", message, domain=domain.name())

    def restore_nvram(self, vm_id: str, pool: PoolSpec, content: bytes) -> None:
        """See `BackupSource.restore_nvram`."""
        state_files.restore_nvram(vm_id, pool, content)

    def _begin(
        self,
        vm_id: str,
        pulled: Sequence[PulledDisk],
        targets: Sequence[str],
        socket: Path,
        checkpoint: str,
        *,
        wants_freeze: bool,
        hold: Hold | None,
    ) -> "_Begun":
        """Begin the job; where a bitmap is broken, one of a full copy of its disk."""
        others = [target for target in targets if target not in {disk.name for disk in pulled}]
        marked = _marks(checkpoint, pulled, targets)
        with self._connection.use("begin the backup", changes=True) as connection:
            domain = require(connection, vm_id)
            notes: dict[str, str] = {}
            with contextlib.ExitStack() as held:
                hooked, is_frozen = _NOBODY, False
                if wants_freeze:
                    timeout_s = HOOK_S if hold is None else _TOGETHER_S
                    hooked = held.enter_context(self._hooks.held(domain, vm_id, notes, timeout_s=timeout_s))
                    is_frozen = held.enter_context(self._freezes.frozen(domain, vm_id, notes))
                if hold is not None and not is_frozen:
                    held.enter_context(self._pauses.paused(domain, vm_id))
                followed = _follow(domain, pulled, checkpoint)
                denied = checkpoints.begin_job(domain, pulled, others, socket, marked)
                notes |= hold() if hold is not None else {}
        if "hook" in notes:
            notes["downgrade"] = "; ".join(notes[name] for name in ("hook", "downgrade") if name in notes)
        return _Begun(_consistency(hooked, is_frozen=is_frozen), notes, denied, followed, hooked.not_asked)

    def _stands_still(self, vm_id: str) -> bool:
        with self._connection.use("see whether the guest goes on") as connection:
            return is_paused_by_error(require(connection, vm_id))

    def _end_for_room(self, vm_id: str, readers: Sequence[NbdClient]) -> bool:
        # First of all: a job whose reader stands still is ended once that has gone, and until then QEMU and its guest stand still too.
        for reader in readers:
            reader.cut()
        with self._connection.use("end the backup", changes=True) as connection:
            return self.jobs.end_for_room(require(connection, vm_id), vm_id, self._pauses)


def _consistency(hooked: Hooked, *, is_frozen: bool) -> Consistency:
    if not is_frozen:
        return Consistency.CRASH
    return Consistency.APPLICATION if hooked.is_held else Consistency.FILESYSTEM


def _marks(checkpoint: str, pulled: Sequence[PulledDisk], targets: Sequence[str]) -> str | None:
    """Return the checkpoint that libvirt is to make, None where it can make none of these disks."""
    names = [disk.name for disk in pulled if not disk.followed_as]
    return checkpoint_xml(checkpoint, names, others=[target for target in targets if target not in names]) if names else None


def _follow(domain: Any, pulled: Sequence[PulledDisk], checkpoint: str) -> Mapping[str, memory_bitmaps.Followed]:
    """Have QEMU follow by itself the disks that libvirt makes no checkpoint of; return them as they were before.

    While a job runs QEMU shows the job's own filter in their place.
    """
    aliases = [disk.followed_as for disk in pulled if disk.followed_as]
    found = memory_bitmaps.followed(domain) if aliases else {}
    disks = {alias: found[alias] for alias in aliases if alias in found}
    for disk in disks.values():
        memory_bitmaps.add(domain, disk, checkpoint)
    return disks


def _followed_in_memory(domain: Any) -> list[str]:
    """Return the aliases of the disks that no checkpoint of libvirt's covers."""
    return [source.alias for source in sources_of(domain.XMLDesc(0)).values() if not source.keeps_bitmaps and source.alias]


def _disks_of(domain: Any) -> Collection[DiskSource]:
    return sources_of(domain.XMLDesc(0)).values()


def _attachments(stored: str) -> Mapping[str, bytes]:
    """Return the definition and, of a vm that boots by UEFI, its variables: QEMU writes them through to their file."""
    found = {"domain.xml": stored.encode()}
    file = nvram_file(stored)
    if file:
        try:
            found[NVRAM] = Path(file).read_bytes()
        except FileNotFoundError:
            log.warning("no UEFI variables to back up", file=file)
    return found


def _refuse_missing(wishes: Sequence[DiskWish], sources: Mapping[str, DiskSource]) -> None:
    for wish in wishes:
        if wish.name not in sources:
            raise NotFound("disk-not-found", f"the domain has no disk {wish.name}", disk=wish.name)


def _to_pull(
    wishes: Sequence[DiskWish], sources: Mapping[str, DiskSource], unknown: Mapping[str, str], scratch: PoolSpec | None
) -> tuple[list[PulledDisk], dict[str, str]]:
    pulled, denied = [], {}
    for wish in wishes:
        source = sources[wish.name]
        kept = _scratch_of(wish.name, source, scratch)
        if not source.keeps_bitmaps:
            pulled.append(PulledDisk(wish.name, kept, followed_as=source.alias))
            continue
        base = wish.base_checkpoint
        if base and wish.name in unknown:
            denied[wish.name] = unknown[wish.name]
            base = ""
        pulled.append(PulledDisk(wish.name, kept, base))
    return pulled, denied


def _scratch_of(name: str, source: DiskSource, scratch: PoolSpec | None) -> str:
    """Return the file that takes what the guest overwrites meanwhile: beside a disk that is a file, else in the pool that was named."""
    if source.is_file:
        path = Path(source.path)
        return str(path.parent / f".{path.stem}.scratch")
    if scratch is None:
        raise Conflict(
            "scratch-pool-missing",
            f"{name} is no file, and no pool of files was named for what its guest overwrites during the backup",
            disk=name,
        )
    volume_id = check_id(source.alias.removeprefix("ua-"), "volume_id")
    return str(PoolLayout.of(scratch).path / VOLUMES / f".{volume_id}.scratch")


def _reader(
    stack: contextlib.ExitStack, readers: list[NbdClient], socket: Path, export: str, contexts: Sequence[str]
) -> NbdClient:
    readers.append(stack.enter_context(NbdClient.connect(socket, export, contexts=contexts)))
    return readers[-1]


def _open(stack: contextlib.ExitStack, readers: list[NbdClient], socket: Path, disk: PulledDisk, denied: str) -> ServedDisk:
    bitmap = f"qemu:dirty-bitmap:{bitmap_name(disk.name)}" if disk.base_checkpoint and not denied else ""
    contexts = [ALLOCATION, *([bitmap] if bitmap else [])]
    return ServedDisk(disk.name, _reader(stack, readers, socket, disk.name, contexts), bitmap, denied)
