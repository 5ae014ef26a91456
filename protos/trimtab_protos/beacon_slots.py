"""The slot of a host on shared storage: where it shows that it lives, and where the controller forbids it to. Standard library only.

    <pool>/.trimtab-beacon/<host id>      two blocks of 4 KiB, each read and written whole, past every cache (O_DIRECT, O_DSYNC)
      block 0   written by the host: a `Beat`, which counts
      block 1   written for the controller by the agent of another host: an `Intent`; all zeros: none

A block is a line of JSON behind its CRC-32 (8 hex digits and a space), padded with zeros. A block 1 that cannot be read as one is
taken for an intent: a torn write must stop the host, never let it go on. The file exists before an intent is written, so that no
cache of "there is no such file" (NFS keeps one for a minute) hides it. A filesystem without direct access holds no slots: what is read
through a cache may be what the slot said before the intent.

An intent is never cleared. It forbids every lease up to its number, and a host that returns gets a higher one with its session: there
is no clearing that could come late and undo the intent of a newer leader. Two writers may still cross on shared storage, so whoever
counts on an intent reads it again at the end of the wait: `term` and `number` are of one attempt, and what is found then stood there
all the time.
"""

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

BLOCK_BYTES = 4096
DIRECTORY = ".trimtab-beacon"
BEAT, INTENT = 0, 1
"""Numbers of the blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a host says of itself."""

    host_id: str
    boot_id: str
    lease_number: int
    """Of the lease that it renews."""
    counter: int
    """Grows with every round of one boot of the beacon."""
    ttl_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """The controller's word that a host must not go on."""

    term: int
    """Of the leader; a lower one is refused."""
    number: int
    """Of this attempt within the term."""
    lease_number: int

    def forbids(self, lease_number: int) -> bool:
        return lease_number <= self.lease_number

    @property
    def age(self) -> tuple[int, int]:
        return self.term, self.number


T = TypeVar("T", Beat, Intent)


def path_of(pool: Path, host_id: str) -> Path:
    return pool / DIRECTORY / host_id


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open the slot past the caches, made where it is missing. OSError where the filesystem has no direct access. May hang."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_DSYNC | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        if os.fstat(descriptor).st_size < 2 * BLOCK_BYTES:
            os.ftruncate(descriptor, 2 * BLOCK_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)


def write_block(descriptor: int, number: int, said: Beat | Intent) -> None:
    """Replace a block; it is durable when this returns."""
    line = json.dumps(asdict(said), separators=(",", ":")).encode()
    with mmap.mmap(-1, BLOCK_BYTES) as page:  # aligned, as direct access wants it
        page.write(b"%08x " % zlib.crc32(line) + line)
        if os.pwrite(descriptor, page, number * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError("the block was not written whole")


def read_block(descriptor: int, number: int) -> bytes:
    """Return a block without its padding; b'' for an empty one, and for one that was not read whole what cannot be parsed."""
    with mmap.mmap(-1, BLOCK_BYTES) as page:
        count = os.preadv(descriptor, [page], number * BLOCK_BYTES)
        return page[:].rstrip(b"\0") if count == BLOCK_BYTES else b"torn"


def beat_of(block: bytes) -> Beat | None:
    """Return the beat that a block holds; None for an empty one. ValueError: it is torn, or of a format that we do not know."""
    said = _parsed(block)
    return None if said is None else _built(Beat, said)


def intent_of(block: bytes) -> Intent | None:
    """Return the intent that a block holds; None for an empty one. ValueError: it is torn, and so forbids every lease."""
    said = _parsed(block)
    return None if said is None else _built(Intent, said)


def place_intent(path: Path, intent: Intent) -> bytes:
    """Write the intent unless a newer one stands there; return the block as read back afterwards. May hang with the storage."""
    with opened(path) as slot:
        try:
            standing = intent_of(read_block(slot, INTENT))
        except ValueError:
            standing = None
        if standing is None or standing.age <= intent.age:
            write_block(slot, INTENT, intent)
        return read_block(slot, INTENT)


def _parsed(block: bytes) -> dict[str, Any] | None:
    text = block.rstrip(b"\0")
    if not text:
        return None
    checksum, _, line = text.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(line):
        raise ValueError("the block is torn")
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("the block says nothing")
    return said


def _built(kind: type[T], said: dict[str, Any]) -> T:
    """Return what a block says; fields that we do not know are left out, one that is missing or of another type is refused."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = said.get(field.name)
        if type(value) is not field.type:
            raise ValueError(f"the block has no {field.name}")
        values[field.name] = value
    return kind(**values)
