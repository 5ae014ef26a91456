"""Space kept for the leases when the disk of the embedded database fills up.

Hosts stop their guests when their leases end, and a lease is kept alive by a row in SQL: a full disk must not become a full stop.
So mutations are refused while less than `keep_free_bytes` is free, and a file of ballast lies beside the database: the first
write that meets a full disk deletes it and is tried again. Beats, heartbeats and operations under way then go on in that space,
most of them by overwriting; what would grow the database is refused until somebody has made room and the ballast is back.

PostgreSQL: its disk may be another machine's, so the ballast is a table (`store/ballast_table.py`).
"""

import os
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

BALLAST_BYTES = 32 << 20
KEEP_FREE_BYTES = 128 << 20


class DiskReserve:
    """Safe to use from several processes: the file is there or not."""

    def __init__(self, url: str, *, ballast_bytes: int = BALLAST_BYTES) -> None:
        parsed = sa.make_url(url)
        is_embedded = parsed.get_backend_name() == "sqlite" and parsed.database not in {None, "", ":memory:"}
        self._path = Path(f"{parsed.database}.reserve") if is_embedded else None
        self._ballast_bytes = ballast_bytes

    def fill(self, *, keep_free_bytes: int = KEEP_FREE_BYTES) -> None:
        """Lay the ballast down where it is missing and there is room for it and for what mutations need."""
        if self._path is None or self._path.exists() or self._free_bytes() < self._ballast_bytes + keep_free_bytes:
            return
        draft = self._path.with_suffix(".reserve-draft")
        try:
            with draft.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._ballast_bytes)
            draft.rename(self._path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            log.warning("no space kept for leases", error=str(error))

    def give_up(self) -> bool:
        """Free the ballast; False where there was none."""
        if self._path is None:
            return False
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        log.error("the disk of the database is full; what was kept for leases is used now", path=str(self._path))
        return True

    def check_room(self, *, keep_free_bytes: int = KEEP_FREE_BYTES) -> None:
        """Raise Unavailable(`database-full`) where a mutation would take what leases need. Costs one system call."""
        if self._path is None:
            return
        free_bytes = self._free_bytes()
        if free_bytes < keep_free_bytes:
            raise full(f"{free_bytes >> 20} MiB are free in {self._path.parent}, {keep_free_bytes >> 20} MiB are needed")

    def refuse_if_spent(self, session: Session) -> None:
        """Nothing to ask the database: `check_room` sees the disk."""

    def _free_bytes(self) -> int:
        assert self._path is not None
        with suppress(FileNotFoundError):
            seen = os.statvfs(self._path.parent)
            return seen.f_bavail * seen.f_frsize
        return 0


def full(how: str = "") -> Unavailable:
    """Return the error of whoever would write to a full disk."""
    told = f" ({how})" if how else ""
    return Unavailable(
        "database-full",
        f"the disk of the controller's database is full{told}: nothing is changed until there is room; running guests are not touched",
        next="trimtab-controller check",
    )
