"""The slot of a host on shared storage: where it shows that it lives, and where the controller forbids it to. Standard library only.

    <pool>/.trimtab-beacon/<host id>      two blocks of 4 KiB, each read and written whole, past every cache (O_DIRECT, O_DSYNC)
      block 0   written by the host: {"host", "boot", "counter", "ttl_ms"}, it counts
      block 1   written by the controller's side: {"intent": n, "term": t}; all zeros: none

A block is a line of JSON behind its CRC-32 (8 hex digits and a space), padded with zeros. A block 1 that cannot be read as one is
taken for an intent: a torn write must stop the host, never let it go on. The file exists before an intent is written, so that no
cache of "there is no such file" (NFS keeps one for a minute) hides it.
"""

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4096
DIRECTORY = ".trimtab-beacon"


def path_of(pool: Path, host_id: str) -> Path:
    return pool / DIRECTORY / host_id


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open the slot past the caches; where the filesystem has no direct access, synchronously. May hang with the storage."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        descriptor = os.open(path, flags, 0o600)
    try:
        if os.fstat(descriptor).st_size < 2 * BLOCK_BYTES:
            os.ftruncate(descriptor, 2 * BLOCK_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)


def write_block(descriptor: int, number: int, said: dict[str, Any] | None) -> None:
    """Replace a block; None clears it."""
    text = b""
    if said is not None:
        line = json.dumps(said, separators=(",", ":")).encode()
        text = b"%08x " % zlib.crc32(line) + line
    with mmap.mmap(-1, BLOCK_BYTES) as page:  # aligned, as direct access wants it
        page.write(text)
        if os.pwrite(descriptor, page, number * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError("the block was not written whole")


def read_block(descriptor: int, number: int) -> dict[str, Any] | None:
    """Return what a block says; None for an empty one. ValueError: it is torn."""
    with mmap.mmap(-1, BLOCK_BYTES) as page:
        if os.preadv(descriptor, [page], number * BLOCK_BYTES) != BLOCK_BYTES:
            raise ValueError("the block was not read whole")
        text = page[:].rstrip(b"\0")
    if not text:
        return None
    checksum, _, line = text.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(line):
        raise ValueError("the block is torn")
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("the block says nothing")
    return said
