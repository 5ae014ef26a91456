"""Packs: records back to back in one blob, a footer that lists them, and a reader that opens them.

    pack = "TTPACK\\x01\\n" ‖ key version ‖ salt ‖ record … ‖ footer record ‖ offset of the footer ‖ "TTPEND\\x01\\n"

A pack is never changed. Its footer makes the index rebuildable; should the footer be damaged, the records still tell their own
length and can be walked.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobEntry, BlobStore
from trimtab_agent.backup.repository.keys import Keyring
from trimtab_agent.backup.repository.sealing import PACK_CONTEXT, Cipher, Identifier, Kind, Record
from trimtab_protos.errors import TrimtabError

PREFIX = "packs/"
MAGIC = b"TTPACK\x01\n"
END_MAGIC = b"TTPEND\x01\n"
_HEAD = struct.Struct("<8sI16s")
HEAD_BYTES = _HEAD.size
_TRAILER = struct.Struct("<Q8s")
ENTRY = struct.Struct("<32sBQII")
"""id, kind, offset in the pack, length of the record, raw size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one record lies in its pack; offset and length in bytes of the whole record."""

    id: bytes
    kind: Kind
    offset: int
    length: int
    raw_bytes: int

    def packed(self) -> bytes:
        return ENTRY.pack(self.id, self.kind, self.offset, self.length, self.raw_bytes)


def entries_of(table: bytes, what: str) -> list[Entry]:
    if len(table) % ENTRY.size:
        raise errors.damaged(what, "its table of records has an odd length")
    return [Entry(id, Kind(kind), offset, length, raw) for id, kind, offset, length, raw in ENTRY.iter_unpack(table)]


class PackBuilder:
    """One pack that grows in memory until it is stored. Not thread-safe."""

    def __init__(self, name: str, cipher: Cipher, identifier: Identifier) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self._cipher = cipher
        self._identifier = identifier
        self._parts: list[bytes] = [_HEAD.pack(MAGIC, cipher.version, cipher.salt)]
        self._length = HEAD_BYTES

    @property
    def length(self) -> int:
        return self._length

    def add(self, record: Record) -> Entry:
        entry = Entry(record.id, record.kind, self._length, record.length, record.raw_bytes)
        self.entries.append(entry)
        self._append(record)
        return entry

    def store(self, blobs: BlobStore) -> int:
        """Write the pack with its footer and return its size."""
        table = b"".join(entry.packed() for entry in self.entries)
        footer_offset = self._length
        self._append(self._cipher.seal(Kind.FOOTER, self._identifier.of(Kind.FOOTER, table), table))
        self._parts.append(_TRAILER.pack(footer_offset, END_MAGIC))
        blobs.put_new(self.name, self._parts)
        return self._length + _TRAILER.size

    def _append(self, record: Record) -> None:
        self._parts += [record.header, record.body]
        self._length += record.length


class PackReader:
    """Opens records of packs. Thread-safe; the ciphers of packs are kept, one salt serves all packs of a session."""

    def __init__(self, blobs: BlobStore, keyring: Keyring, identifier: Identifier) -> None:
        self._blobs = blobs
        self._keyring = keyring
        self._identifier = identifier
        self._ciphers: dict[str, Cipher] = {}

    def cipher(self, pack: str) -> Cipher:
        """Return what opens the records of this pack. NotFound where it is gone, Conflict where its head is damaged."""
        known = self._ciphers.get(pack)
        if known is not None:
            return known
        head = self._blobs.get_range(pack, 0, HEAD_BYTES)
        if len(head) < HEAD_BYTES or head[:8] != MAGIC:
            raise errors.damaged(pack, "it does not begin as a pack does")
        _, version, salt = _HEAD.unpack(head)
        cipher = Cipher(self._keyring, self._identifier, version=version, salt=salt, context=PACK_CONTEXT)
        if len(self._ciphers) > 4096:
            self._ciphers.clear()
        self._ciphers[pack] = cipher
        return cipher

    def read(self, pack: str, entry: Entry) -> bytes:
        """Return the content of one record, checked against its id."""
        record = self._blobs.get_range(pack, entry.offset, entry.length)
        return self.open(pack, entry, record)

    def open(self, pack: str, entry: Entry, record: bytes | memoryview) -> bytes:
        """Return the content of a record that was read with others in one request."""
        return self.cipher(pack).open(entry.kind, record, wanted=entry.id, where=pack)

    def read_footer(self, pack: BlobEntry) -> Sequence[Entry]:
        """Return the pack's own list of its records. Conflict where it is damaged or was cut."""
        trailer_at = pack.size_bytes - _TRAILER.size
        if trailer_at < HEAD_BYTES:
            raise errors.damaged(pack.name, "it is cut short")
        offset, magic = _TRAILER.unpack(self._blobs.get_range(pack.name, trailer_at, _TRAILER.size))
        if magic != END_MAGIC or not HEAD_BYTES <= offset < trailer_at:
            raise errors.damaged(pack.name, "it does not end as a pack does")
        record = self._blobs.get_range(pack.name, offset, trailer_at - offset)
        try:
            table = self.cipher(pack.name).open(Kind.FOOTER, record, wanted=None, where=pack.name)
        except TrimtabError as error:
            raise errors.damaged(pack.name, "its footer is damaged") from error
        return entries_of(table, pack.name)
