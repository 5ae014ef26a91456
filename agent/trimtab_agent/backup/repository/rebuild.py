"""The index anew from the packs alone: after an index file was damaged or lost."""

from collections.abc import Mapping

from trimtab_agent.backup.repository import chunk_index
from trimtab_agent.backup.repository.chunk_index import ENTRIES_PER_FILE, IndexedPack, encode_index
from trimtab_agent.backup.repository.packs import PREFIX as PACKS_PREFIX
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.sealing import Kind
from trimtab_protos.errors import NotFound, TrimtabError


def rebuild_index(repository: Repository) -> Mapping[str, str]:
    """List every pack that no readable index file lists; return the packs that cannot be read, each with why. Idempotent.

    Packs of a session that still runs are taken in too: they are durable, and prune knows the session by its lease. Then the
    damaged index files are removed. In a repository that was opened read-only only this process's view is completed.
    """
    repository.refresh()
    known = set(repository.index.packs())
    pieces: list[bytes] = []
    entries = 0
    unreadable: dict[str, str] = {}

    def write() -> None:
        if pieces:
            repository.put_object(Kind.INDEX, chunk_index.PREFIX + repository.new_name(), b"".join(pieces))

    for blob in repository.blobs.list(PACKS_PREFIX):
        if blob.name in known:
            continue
        try:
            footer = repository.packs.read_footer(blob)
        except NotFound:
            continue
        except TrimtabError as error:
            if error.retryable:
                raise
            unreadable[blob.name] = error.message
            continue
        pack = IndexedPack(blob.name, blob.size_bytes, footer)
        if repository.is_read_only:
            repository.index.add_pack("", pack)
            continue
        pieces.append(encode_index([pack]))
        entries += len(footer)
        if entries >= ENTRIES_PER_FILE:
            write()
            pieces, entries = [], 0
    write()
    if not repository.is_read_only:
        for name in repository.unreadable_indexes:
            repository.blobs.delete(name)
        repository.refresh()
    return unreadable
