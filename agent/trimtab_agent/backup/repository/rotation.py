"""Changing the keys of a repository, and letting go of data keys that nothing needs any more. Killed anywhere it is run again.

    rotate: next generation, locked with the new key, with one data key more (both copies) ── read back ── older generations removed
    retire: under the prune lock, no session lives ── no blob is sealed with the version ── next generation without it

From the first copy on only the new key opens the repository: whoever orders a rotation must have kept the new key before. Old records
stay as they are and readable, since the keyring keeps their data keys; new ones are sealed with the new data key, which no copy of an
older keyring holds.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass

from trimtab_agent.backup.repository import chunk_index, packs
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.keys import (
    RepositoryKey,
    complete_keyring,
    delete_older_keyrings,
    load_keyring,
    store_keyring,
)
from trimtab_agent.backup.repository.manifests import PREFIX as BACKUPS_PREFIX
from trimtab_agent.backup.repository.manifests import REVOKED
from trimtab_agent.backup.repository.repository import CONDEMNED_PREFIX, DAMAGED_PREFIX, Repository
from trimtab_agent.backup.repository.sealing import OBJECT_MAGIC
from trimtab_agent.backup.repository.sessions import PruneLock, live_leases
from trimtab_protos.errors import NotFound, PermissionDenied

_HEAD = struct.Struct("<8sI")
"""Magic and version: how packs and sealed objects begin alike."""
_SEALED_PREFIXES = (packs.PREFIX, chunk_index.PREFIX, BACKUPS_PREFIX, CONDEMNED_PREFIX, DAMAGED_PREFIX)


@dataclass(frozen=True, slots=True)
class Rotated:
    generation: int
    data_key_version: int


def rotate(blobs: BlobStore, repository_id: str, *, old: RepositoryKey, new: RepositoryKey) -> Rotated:
    """Lock the repository with the new key and add a data key. Idempotent: one that broke off is finished.

    PermissionDenied where neither key opens it, Conflict `keyring-changed-meanwhile` where another one rotates.
    """
    try:
        keyring = load_keyring(blobs, repository_id, new)
    except PermissionDenied:
        present = load_keyring(blobs, repository_id, old)
        store_keyring(blobs, repository_id, new, present.with_new_data_key())
        keyring = load_keyring(blobs, repository_id, new)
    complete_keyring(blobs, repository_id, new, keyring)
    delete_older_keyrings(blobs, keyring)
    return Rotated(keyring.generation, keyring.newest_version)


def retire_data_keys(repository: Repository, lock: PruneLock) -> Collection[int]:
    """Drop the data keys that no blob is sealed with; return their versions. Needs the prune lock.

    A session announces itself and then reads the keyring, so one that begins after the look at the leases seals with the newest key;
    what earlier ones wrote is there by then. While any session lives nothing is dropped.
    """
    _complete_upkeep(repository)
    older = set(repository.keyring.data_keys) - {repository.keyring.newest_version}
    if not older or live_leases(repository.blobs):
        return ()
    unneeded = older - _versions_in_use(repository.blobs, older)
    if not unneeded:
        return ()
    lock.check()
    store_keyring(repository.blobs, repository.config.repository_id, repository.key, repository.keyring.without(unneeded))
    repository.refresh()
    delete_older_keyrings(repository.blobs, repository.keyring)
    return sorted(unneeded)


def _complete_upkeep(repository: Repository) -> None:
    """Finish what a rotation that broke off left: the second copy, and keyrings that an older key still opens."""
    complete_keyring(repository.blobs, repository.config.repository_id, repository.key, repository.keyring)
    delete_older_keyrings(repository.blobs, repository.keyring)


def _versions_in_use(blobs: BlobStore, wanted: Collection[int]) -> set[int]:
    """Return those of the versions that some blob is sealed with; all of them where a blob's head cannot be understood."""
    found: set[int] = set()
    for prefix in _SEALED_PREFIXES:
        for entry in blobs.list(prefix):
            if found >= set(wanted):
                return found
            try:
                head = blobs.get_range(entry.name, 0, _HEAD.size)
            except NotFound:
                continue  # removed since the listing
            if REVOKED.startswith(head):
                continue
            if len(head) < _HEAD.size or head[:8] not in {packs.MAGIC, OBJECT_MAGIC}:
                return set(wanted)
            found.add(_HEAD.unpack_from(head)[1])
    return found & set(wanted)
