"""`trimtab backup export`: puts the file of a disk together, piece by piece, and goes on where an earlier run broke off.

The pieces go to `FILE.<backup>-<disk>.part`; FILE appears whole or not at all.
"""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab_controller.cli.errors import CommandFailed

PIECE_BYTES = 1 << 20
TRIES = 5


def receive(
    ask: Callable[[int], Any],
    reopen: Callable[[], None],
    partial: Path,
    *,
    on_progress: Callable[[int, int], None],
) -> str:
    """Fill `partial` from where it ends; return the SHA-256 of all of it.

    `ask(offset)` returns a piece; where it fails, `reopen` makes a host ready again, and it is asked once more.
    """
    with partial.open("ab"):
        pass
    with partial.open("r+b") as file:
        # A piece that was cut short is asked for again.
        offset = partial.stat().st_size // PIECE_BYTES * PIECE_BYTES
        size_bytes, failures = offset + 1, 0
        while offset < size_bytes:
            try:
                piece = ask(offset)
            except CommandFailed:
                failures += 1
                if failures >= TRIES:
                    raise
                reopen()
                continue
            failures, size_bytes = 0, int(piece["size_bytes"])
            content = base64.b64decode(piece["content_base64"])
            if hashlib.sha256(content).hexdigest() != piece["sha256"]:
                raise CommandFailed(
                    f"the piece at {offset} arrived as something else than it was sent; run the export again, it goes on from there",
                    code="piece-damaged",
                )
            if not content and not piece["zeros"]:
                break
            file.seek(offset)
            file.write(content)
            offset += len(content) or int(piece["zeros"])
            file.truncate(offset)
            on_progress(offset, size_bytes)
    with partial.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
