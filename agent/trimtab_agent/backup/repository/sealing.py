"""Records: how every chunk, page, index and manifest is written and read back, and never trusted unread.

    record = header (id, kind, flags, raw size, stored size, nonce) ‖ AES-256-GCM(zstd(content)) bound to the header

The id is BLAKE3 of the content under a key of the repository, so that equal content is found again and yet tells a stranger
nothing. The cipher's key is derived from a data key, a random salt and the place of use: no (key, nonce) pair is used twice as
long as fewer than 2^32 records share a salt. Reading recomputes the id, so that no wrong byte is ever returned.
"""

import secrets
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.keys import Keyring

ID_BYTES = 32
SALT_BYTES = 16
TAG_BYTES = 16
HOLE = bytes(ID_BYTES)
"""Stands for a chunk of zeros, which is never stored."""
RAW_MAX_BYTES = 256 << 20
ZSTD_LEVEL = 1
_HEADER = struct.Struct("<32sBBHII12s")
HEADER_BYTES = _HEADER.size
_ZSTD = 1
PACK_CONTEXT = "pack"
OBJECT_MAGIC = b"TTSEAL\x01\n"
_OBJECT = struct.Struct("<8sI16s")

Content = bytes | bytearray | memoryview

_per_thread = threading.local()


class Kind(IntEnum):
    CHUNK = 0
    PAGE = 1
    FOOTER = 2
    INDEX = 3
    MANIFEST = 4
    CONDEMNED = 5
    DAMAGE = 6


@dataclass(frozen=True, slots=True)
class Record:
    """One sealed record, ready to be written; the parts are kept apart to spare a copy."""

    id: bytes
    kind: Kind
    raw_bytes: int
    header: bytes
    body: bytes

    @property
    def length(self) -> int:
        return len(self.header) + len(self.body)


class Identifier:
    """Computes ids. Each kind has its own key, so that a page is never taken for a chunk."""

    def __init__(self, keyring: Keyring) -> None:
        self._keys: Mapping[Kind, bytes] = {kind: blake3(b"kind %d" % kind, key=keyring.id_key).digest() for kind in Kind}

    def of(self, kind: Kind, content: Content) -> bytes:
        return blake3(content, key=self._keys[kind]).digest()


class Cipher:
    """Seals and opens the records under one (data key, salt, context). Thread-safe."""

    def __init__(self, keyring: Keyring, identifier: Identifier, *, version: int, salt: bytes, context: str) -> None:
        self.version = version
        self.salt = salt
        self._identifier = identifier
        self._aead = AESGCM(blake3(salt + context.encode(), key=keyring.data_key(version)).digest())

    def seal(self, kind: Kind, id: bytes, content: Content) -> Record:
        """Return the record of a content whose id the caller has computed."""
        packed: Content = _compressor().compress(content)
        flags = _ZSTD
        if len(packed) >= len(content) - len(content) // 32:  # under 3 % saved is not worth the time to read it
            packed, flags = content, 0
        nonce = secrets.token_bytes(12)
        header = _HEADER.pack(id, kind, flags, 0, len(content), len(packed) + TAG_BYTES, nonce)
        return Record(id, kind, len(content), header, self._aead.encrypt(nonce, packed, header))

    def open(self, kind: Kind, record: bytes | memoryview, *, wanted: bytes | None, where: str) -> bytes:
        """Return the content. Conflict `chunk-damaged` where the record is not what was written, or not the wanted one."""
        view = memoryview(record)
        if len(view) < HEADER_BYTES:
            raise errors.chunk_damaged(wanted or HOLE, where, "it is cut short")
        id, found_kind, flags, _, raw_bytes, stored_bytes, nonce = _HEADER.unpack_from(view)
        if (wanted is not None and id != wanted) or found_kind != kind or raw_bytes > RAW_MAX_BYTES:
            raise errors.chunk_damaged(wanted or id, where, "another record stands in its place")
        if len(view) != HEADER_BYTES + stored_bytes:
            raise errors.chunk_damaged(id, where, "it is cut short")
        try:
            packed = self._aead.decrypt(nonce, view[HEADER_BYTES:], view[:HEADER_BYTES])
            content = _decompressor().decompress(packed, max_output_size=raw_bytes) if flags & _ZSTD else packed
        except (InvalidTag, zstandard.ZstdError) as error:
            raise errors.chunk_damaged(id, where, "its bytes have changed since they were written") from error
        if len(content) != raw_bytes or self._identifier.of(kind, content) != id:
            raise errors.chunk_damaged(id, where, "its content is not what its id says")
        return content


def stored_length(header: bytes | memoryview) -> int:
    """Return the length of the whole record that begins with this header."""
    return HEADER_BYTES + int(_HEADER.unpack_from(header)[5])


def seal_object(keyring: Keyring, identifier: Identifier, kind: Kind, name: str, content: bytes) -> bytes:
    """Return the blob `name` with this content. Moved to another name it cannot be opened."""
    version, salt = keyring.newest_version, secrets.token_bytes(SALT_BYTES)
    record = Cipher(keyring, identifier, version=version, salt=salt, context=name).seal(
        kind, identifier.of(kind, content), content
    )
    return _OBJECT.pack(OBJECT_MAGIC, version, salt) + record.header + record.body


def open_object(keyring: Keyring, identifier: Identifier, kind: Kind, name: str, blob: bytes) -> bytes:
    """Return the content of the blob `name`. Conflict `repository-damaged` or `chunk-damaged`."""
    if len(blob) < _OBJECT.size:
        raise errors.damaged(name, "it is cut short")
    magic, version, salt = _OBJECT.unpack_from(blob)
    if magic != OBJECT_MAGIC:
        raise errors.damaged(name, "it does not begin as it should")
    cipher = Cipher(keyring, identifier, version=version, salt=salt, context=name)
    return cipher.open(kind, memoryview(blob)[_OBJECT.size :], wanted=None, where=name)


def _compressor() -> zstandard.ZstdCompressor:
    # A context costs more than compressing a chunk with it, and may not be shared between threads.
    if not hasattr(_per_thread, "compressor"):
        _per_thread.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    compressor: zstandard.ZstdCompressor = _per_thread.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_per_thread, "decompressor"):
        _per_thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _per_thread.decompressor
    return decompressor
