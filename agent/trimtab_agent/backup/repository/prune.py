"""Removing what no backup needs, in two phases, while others write and read. Under one lock; killed anywhere it is simply run again.

    condemn: mark from the manifests ── copy what is needed out of mostly empty packs ── write the condemnation
    sweep:   wait until every session that has not seen it ended ── mark again ── index without them ── remove the packs

Between both, new sessions treat the condemned packs as absent, and readers still read them. A pack goes only if each record in it is
unneeded or has a whole copy in a pack that stays. Sessions and why no clock decides: `sessions`.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trimtab_agent.backup.repository import chunk_index, errors
from trimtab_agent.backup.repository.chunk_index import IndexedPack, PackUse, encode_index
from trimtab_agent.backup.repository.manifests import Manifest
from trimtab_agent.backup.repository.packs import PREFIX as PACKS_PREFIX
from trimtab_agent.backup.repository.repository import CONDEMNED_PREFIX, Repository
from trimtab_agent.backup.repository.rotation import retire_data_keys
from trimtab_agent.backup.repository.sealing import HOLE, Kind
from trimtab_agent.backup.repository.sessions import (
    Lease,
    PruneLock,
    SessionKind,
    end_silent,
    is_silent,
    live_leases,
    new_session,
)
from trimtab_agent.backup.repository.writer import PACK_BYTES, RecordSink
from trimtab_protos.errors import NotFound, TrimtabError

GRACE_S = 600.0
"""Between condemnation and removal at least: an NFS client may show a folder as it was a minute ago."""
DEBRIS_AFTER_S = 24 * 3600.0
REPACK_BELOW = 0.5
"""Share of needed bytes under which a pack is copied rather than kept."""
SMALL_PACK_BYTES = PACK_BYTES // 8
SMALL_PACKS_MAX = 64
"""Small packs of increments are merged once there are so many: each costs a request when marking and restoring."""


@dataclass(frozen=True, slots=True)
class PruneReport:
    removed_packs: int
    removed_bytes: int
    condemned_packs: int
    condemned_bytes: int
    repacked_bytes: int
    """Bytes of records that were copied out of condemned packs."""
    kept_bytes: int
    """Bytes of packs that stay."""
    waits_for: Sequence[str]
    """Who still works with what is condemned; their packs go with a later prune."""
    unreadable_packs: Sequence[str]
    retired_data_keys: Sequence[int]
    """Versions that nothing was sealed with any more; the keyring has them no longer."""


def prune(repository: Repository, *, grace_s: float = GRACE_S, is_dry_run: bool = False) -> PruneReport:
    """Sweep what was condemned before, then condemn what nothing needs now.

    Conflict `prune-is-running`; `repository-index-damaged` and `repository-manifest-damaged`, where what is needed is unknown.
    """
    if is_dry_run:
        return _Pruner(repository, None, grace_s).plan()
    repository.require_writable()
    lock = PruneLock(repository.blobs, repository.clock, repository.holder)
    lock.take()
    try:
        return _Pruner(repository, lock, grace_s).run()
    finally:
        lock.release()


class _Pruner:
    def __init__(self, repository: Repository, lock: PruneLock | None, grace_s: float) -> None:
        self._repository = repository
        self._lock = lock
        self._grace_s = grace_s
        self._unreadable_packs: list[str] = []
        self._retired: Collection[int] = ()

    def plan(self) -> PruneReport:
        """Tell what a prune would condemn, without writing."""
        self._look(self._leases(may_end=False))
        gone, mostly_empty, kept = self._judge()
        return self._report(removed=[], condemned=[*gone, *mostly_empty], repacked=0, kept=kept, waits_for=[])

    def run(self) -> PruneReport:
        leases = self._leases(may_end=True)
        self._look(leases)
        removed, waits_for = self._sweep(leases)
        gone, mostly_empty, kept = self._judge()
        repacked = 0
        if gone or mostly_empty:
            condemned = [*gone, *mostly_empty]
            repacked, stay = self._repack(condemned, mostly_empty)
            condemned = [use for use in condemned if use.name not in stay]
            self._write_condemnation([use.name for use in condemned])
        else:
            condemned = []
        self._repository.blobs.remove_debris(DEBRIS_AFTER_S)
        self._drop_obsolete_damage()
        assert self._lock is not None
        self._retired = retire_data_keys(self._repository, self._lock)
        return self._report(removed=removed, condemned=condemned, repacked=repacked, kept=kept, waits_for=waits_for)

    # Looking

    def _leases(self, *, may_end: bool) -> Sequence[Lease]:
        """Return the sessions that live. Packs are listed before, the index is read after: docs/backup-format.md, "Orphans"."""
        self._pack_names = list(self._repository.blobs.list(PACKS_PREFIX))
        now_ms = self._repository.clock.now_ms()
        living = []
        for lease in live_leases(self._repository.blobs):
            if not is_silent(lease, now_ms):
                living.append(lease)
            elif may_end:
                end_silent(self._repository.blobs, lease)
        return living

    def _look(self, leases: Sequence[Lease]) -> None:
        repository = self._repository
        repository.index.forget_sessions()
        repository.refresh()
        if repository.unreadable_indexes:
            raise errors.index_damaged(list(repository.unreadable_indexes))
        self._take_in_orphans({lease.session_id for lease in leases})
        self._mark()

    def _take_in_orphans(self, living: Collection[str]) -> None:
        """List packs that no index lists and whose session is dead, so that they are judged like the others.

        Listed for others too, not only learnt: else the one whole copy that stays of a chunk could be one that nobody finds.
        """
        index, orphans = self._repository.index, []
        indexed = set(index.packs())
        for blob in self._pack_names:
            session_id = blob.name.removeprefix(PACKS_PREFIX).rpartition("-")[0]
            if blob.name in indexed or session_id in living:
                continue
            try:
                orphans.append(IndexedPack(blob.name, blob.size_bytes, self._repository.packs.read_footer(blob)))
            except NotFound:
                continue
            except TrimtabError as error:
                if error.retryable:
                    raise
                self._unreadable_packs.append(blob.name)
        name = ""
        if orphans and self._lock is not None:
            name = chunk_index.PREFIX + self._repository.new_name()
            self._repository.put_object(Kind.INDEX, name, encode_index(orphans))
        for pack in orphans:
            index.add_pack(name, pack)

    def _mark(self) -> None:
        listing = self._repository.list_backups()
        if listing.unreadable:
            raise errors.manifests_damaged(list(listing.unreadable))
        index = self._repository.index
        index.clear_marks()
        for manifest in listing.manifests:
            self._mark_backup(manifest)

    def _mark_backup(self, manifest: Manifest) -> None:
        index = self._repository.index
        for disk in manifest.disks:
            for page_id in disk.pages.values():
                if index.is_marked(page_id):
                    continue  # a page that another backup shares
                try:
                    chunks = self._repository.read_page(page_id)
                except TrimtabError as error:
                    if not errors.is_damage(error):
                        raise
                    # Which chunks it names is unknown, so none may go.
                    raise errors.manifests_damaged([manifest.name]) from error
                index.mark([page_id, *(id for id in chunks if id != HOLE)])
        index.mark([id for file in manifest.attachments for id in file.chunks])

    def _judge(self) -> tuple[list[PackUse], list[PackUse], list[PackUse]]:
        """Return the packs that nothing needs, those worth copying, and those that stay."""
        pending = {pack for packs in self._repository.condemnations().values() for pack in packs}
        gone: list[PackUse] = []
        mostly_empty: list[PackUse] = []
        kept: list[PackUse] = []
        uses = [use for use in self._repository.index.marked_use() if use.name not in pending]
        small = [use for use in uses if use.live_bytes > 0 and use.size_bytes < SMALL_PACK_BYTES]
        merged = {use.name for use in small} if len(small) > SMALL_PACKS_MAX else set()
        for use in uses:
            if use.live_bytes == 0:
                gone.append(use)
            elif use.live_bytes < REPACK_BELOW * use.total_bytes or use.name in merged:
                mostly_empty.append(use)
            else:
                kept.append(use)
        return gone, mostly_empty, kept

    # Condemning

    def _repack(self, condemned: Sequence[PackUse], mostly_empty: Sequence[PackUse]) -> tuple[int, set[str]]:
        """Copy what is needed out of packs; return the bytes and the packs that must stay since a copy failed."""
        repository = self._repository
        pending = [pack for packs in repository.condemnations().values() for pack in packs]
        repository.index.set_condemned([*pending, *(use.name for use in condemned)])
        if not mostly_empty:
            return 0, set()
        session = new_session(repository.blobs, repository.clock, SessionKind.PRUNER, holder=repository.holder)
        session.announce()
        sink, stay = RecordSink(repository, session), set()
        try:
            for use in mostly_empty:
                session.renew()
                self._check_lock()
                for entry in repository.index.entries(use.name):
                    if not repository.index.is_marked(entry.id):
                        continue
                    try:
                        sink.put(entry.kind, repository.read(entry.kind, entry.id))
                    except TrimtabError as error:
                        if not errors.is_damage(error):
                            raise
                        stay.add(use.name)
            sink.flush()
        finally:
            sink.close()
        session.end()
        repository.store_damage()
        return sink.stored_bytes, stay

    def _write_condemnation(self, packs: Sequence[str]) -> None:
        self._check_lock()
        if packs:
            self._repository.put_object(
                Kind.CONDEMNED, CONDEMNED_PREFIX + self._repository.new_name(), json.dumps(list(packs)).encode()
            )

    # Sweeping

    def _sweep(self, leases: Sequence[Lease]) -> tuple[list[PackUse], list[str]]:
        """Remove the packs of every condemnation that all sessions know of; the marks are newer than the leases."""
        repository = self._repository
        ready: dict[str, Sequence[str]] = {}
        waits_for: set[str] = set()
        for name, packs in repository.condemnations().items():
            unaware = [lease for lease in leases if lease.kind is not SessionKind.PRUNER and name not in lease.seen]
            if unaware:
                waits_for.update(f"{lease.kind.value} on {lease.holder or 'an unnamed host'}" for lease in unaware)
            elif repository.clock.now_ms() - _condemned_ms(name) >= self._grace_s * 1000:
                ready[name] = packs
        wanted = {pack for packs in ready.values() for pack in packs}
        dead = [use for use in repository.index.marked_use() if use.name in wanted and use.live_bytes == 0]
        self._remove({use.name for use in dead})
        for name in ready:
            self._check_lock()
            repository.blobs.delete(name)
        pending = [pack for packs in repository.condemnations().values() for pack in packs]
        repository.index.set_condemned(pending)
        return dead, sorted(waits_for)

    def _remove(self, dead: set[str]) -> None:
        if not dead:
            return
        repository = self._repository
        stale = [name for name in sorted(repository.index.index_files()) if dead & set(repository.index.packs_of(name))]
        for name in stale:
            # The successor first: between both, packs are listed twice, which harms nothing.
            self._check_lock()
            survivors = [pack for pack in repository.index.packs_of(name) if pack not in dead]
            if survivors:
                successor = chunk_index.PREFIX + repository.new_name()
                content = b"".join(encode_index([self._indexed(pack)]) for pack in survivors)
                repository.put_object(Kind.INDEX, successor, content)
            repository.blobs.delete(name)
        for pack in sorted(dead):
            self._check_lock()
            repository.blobs.delete(pack)
        repository.refresh()

    def _indexed(self, pack: str) -> IndexedPack:
        return IndexedPack(pack, self._repository.index.pack_size(pack), self._repository.index.entries(pack))

    def _drop_obsolete_damage(self) -> None:
        packs = {entry.name for entry in self._repository.blobs.list(PACKS_PREFIX)}
        for name, pairs in self._repository.known_damage().items():
            if not any(pack in packs for _id, pack in pairs):
                self._repository.blobs.delete(name)

    def _check_lock(self) -> None:
        assert self._lock is not None
        self._lock.check()

    def _report(
        self,
        *,
        removed: Sequence[PackUse],
        condemned: Sequence[PackUse],
        repacked: int,
        kept: Sequence[PackUse],
        waits_for: Sequence[str],
    ) -> PruneReport:
        return PruneReport(
            removed_packs=len(removed),
            removed_bytes=sum(use.size_bytes for use in removed),
            condemned_packs=len(condemned),
            condemned_bytes=sum(use.size_bytes for use in condemned),
            repacked_bytes=repacked,
            kept_bytes=sum(use.size_bytes for use in kept),
            waits_for=waits_for,
            unreadable_packs=self._unreadable_packs,
            retired_data_keys=sorted(self._retired),
        )


def _condemned_ms(name: str) -> int:
    return int(name.removeprefix(CONDEMNED_PREFIX).split("-")[0], 16)
