"""Is what was stored still what was written? Level L1: every record is read, opened and checked against its id.

(L0 is the writing itself: an id is computed from the bytes that are stored. L2, a restore compared with the backup, is
`DiskReader.copy_to` and `compare`; L3, the boot, is the agent's.) Damage is written down, so that the next backup repairs it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.chunk_index import Location
from trimtab_agent.backup.repository.fetching import runs_of
from trimtab_agent.backup.repository.manifests import Manifest
from trimtab_agent.backup.repository.reader import BackupReader, open_backup
from trimtab_agent.backup.repository.repository import Listing, Repository
from trimtab_agent.backup.repository.sealing import HOLE
from trimtab_protos.errors import NotFound, TrimtabError


@dataclass(frozen=True, slots=True)
class BackupHealth:
    backup_id: str
    vm_id: str
    damaged_disks: Sequence[str]
    """Names of the disks that cannot be restored whole; "manifest" and names of attachments likewise."""

    @property
    def is_whole(self) -> bool:
        return not self.damaged_disks


@dataclass(frozen=True, slots=True)
class VerifyReport:
    read_bytes: int
    """Bytes of records that were read and checked."""
    damaged_records: int
    """Records of which the copy that was read is damaged; another copy may be whole."""
    unreadable_manifests: Sequence[str]
    backups: Sequence[BackupHealth]
    """Of what was read."""
    others: Sequence[BackupHealth] = ()
    """Of the repository's other backups, those that need what is known to be damaged: they were judged and not read."""
    are_others_judged: bool = False
    """Whether `others` was looked for; then those that it does not name are whole as far as known."""

    @property
    def damaged_backups(self) -> Sequence[BackupHealth]:
        return [health for health in self.backups if not health.is_whole]


def verify_backup(repository: Repository, vm_id: str, backup_id: str, *, judges_others: bool = False) -> VerifyReport:
    """Read everything that one backup needs.

    Chunks are shared, so whatever damage is known by then, of this reading or an earlier one, is looked for in every other backup too.
    `judges_others` does so even where none is known: for a caller who holds some for damaged. It reads their pages and no chunk.
    """
    with open_backup(repository, vm_id, backup_id) as reader:
        damaged: dict[str, set[bytes]] = {}
        read_bytes = 0
        for disk in reader.manifest.disks:
            found: set[bytes] = set()
            try:
                read_bytes += reader.disk(disk.name).scan(lambda id, _error, found=found: found.add(id))  # type: ignore[misc]
            except TrimtabError as error:  # a page: which chunks it names is lost
                if not errors.is_damage(error):
                    raise
                found.add(HOLE)
            if found:
                damaged[disk.name] = found
        bad_files = [file.name for file in reader.manifest.attachments if not _is_file_whole(reader, file.name)]
        count = sum(len(found) for found in damaged.values())
        health = BackupHealth(backup_id, vm_id, [*damaged, *bad_files])
        with contextlib.suppress(TrimtabError):  # a full repository can be judged all the same
            repository.store_damage()
        is_judged = judges_others or not health.is_whole or bool(repository.known_damage())
        # Still under the reader's lease: prune takes no page away meanwhile.
        judged = _judge_all(repository)[1] if is_judged else ()
    others = [one for one in judged if not one.is_whole and (one.vm_id, one.backup_id) != (vm_id, backup_id)]
    return VerifyReport(read_bytes, count + len(bad_files), (), [health], others, is_judged)


def verify_all(repository: Repository) -> VerifyReport:
    """Read every record of every pack, then tell which backups miss one."""
    repository.refresh()
    read_bytes = damaged = 0
    for pack in repository.index.packs():
        places = [Location(pack, entry) for entry in repository.index.entries(pack)]
        for run in runs_of(places):
            checked, bad = _check_run(repository, run)
            read_bytes += checked
            damaged += bad
    repository.store_damage()
    listing, judged = _judge_all(repository)
    return VerifyReport(read_bytes, damaged, list(listing.unreadable), judged)


def assess(repository: Repository, manifests: Sequence[Manifest]) -> Sequence[BackupHealth]:
    """Tell from what is known, without reading chunks, which of the backups need a record that no whole copy is left of."""
    pages: dict[bytes, bool] = {}
    return [_health(repository, manifest, pages) for manifest in manifests]


def _judge_all(repository: Repository) -> tuple[Listing, Sequence[BackupHealth]]:
    listing = repository.list_backups()
    # The index after the listing: a backup that was listed meanwhile lies in packs that it does not have yet.
    repository.refresh()
    return listing, assess(repository, listing.manifests)


def _health(repository: Repository, manifest: Manifest, pages: dict[bytes, bool]) -> BackupHealth:
    damaged = []
    for disk in manifest.disks:
        for id in disk.pages.values():
            if id not in pages:
                pages[id] = _is_page_whole(repository, id)
        if not all(pages[id] for id in disk.pages.values()):
            damaged.append(disk.name)
    damaged += [file.name for file in manifest.attachments if not all(_is_whole(repository, id) for id in file.chunks)]
    return BackupHealth(manifest.backup_id, manifest.subject.vm_id, damaged)


def _is_page_whole(repository: Repository, id: bytes) -> bool:
    try:
        chunks = repository.read_page(id)
    except TrimtabError as error:
        if not errors.is_damage(error):
            raise
        return False
    return all(chunk == HOLE or _is_whole(repository, chunk) for chunk in chunks)


def _is_whole(repository: Repository, id: bytes) -> bool:
    return repository.index.is_whole(id)


def _is_file_whole(reader: BackupReader, name: str) -> bool:
    try:
        reader.attachment(name)
    except TrimtabError as error:
        if not errors.is_damage(error):
            raise
        return False
    return True


def _check_run(repository: Repository, run: Sequence[Location]) -> tuple[int, int]:
    pack, begin = run[0].pack, run[0].entry.offset
    end = run[-1].entry.offset + run[-1].entry.length
    try:
        piece = memoryview(repository.blobs.get_range(pack, begin, end - begin))
    except NotFound:
        return 0, len(run)  # prune took it, or it is lost: `assess` finds who needs it
    damaged = 0
    for place in run:
        at = place.entry.offset - begin
        try:
            repository.packs.open(pack, place.entry, piece[at : at + place.entry.length])
        except TrimtabError as error:
            if not errors.is_damage(error):
                raise
            repository.note_failure(place, error)
            damaged += 1
    return end - begin, damaged
