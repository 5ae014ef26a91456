"""Which chunk lies where, in an SQLite file beside the agent: derived from the repository, and made anew when it is lost.

On disk, since a repository of 4 TiB has sixteen million chunks and an agent may take 200 MiB. The same file serves as
scratch space for the marking of prune.
"""

import sqlite3
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.packs import ENTRY, Entry, entries_of
from trimtab_agent.backup.repository.sealing import Kind

PREFIX = "index/"
_PACK = struct.Struct("<HQI")
"""length of the name, size of the pack, number of records."""
ENTRIES_PER_FILE = 1 << 17

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pack (no INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS chunk (
    id BLOB NOT NULL, pack INTEGER NOT NULL, kind INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    raw INTEGER NOT NULL, is_damaged INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (id, pack)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS index_file (name TEXT NOT NULL, pack INTEGER NOT NULL, PRIMARY KEY (name, pack)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS live (id BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS condemned (pack INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True, slots=True)
class IndexedPack:
    name: str
    size_bytes: int
    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Location:
    pack: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class PackUse:
    """How much of a pack some backup still needs from it; bytes of records."""

    name: str
    size_bytes: int
    total_bytes: int
    live_bytes: int
    has_damage: bool


def encode_index(packs: Iterable[IndexedPack]) -> bytes:
    pieces = []
    for pack in packs:
        name = pack.name.encode()
        pieces += [_PACK.pack(len(name), pack.size_bytes, len(pack.entries)), name]
        pieces += [entry.packed() for entry in pack.entries]
    return b"".join(pieces)


def decode_index(content: bytes, what: str) -> Iterator[IndexedPack]:
    at = 0
    while at < len(content):
        try:
            name_length, size, count = _PACK.unpack_from(content, at)
        except struct.error as error:
            raise errors.damaged(what, "it is cut short") from error
        at += _PACK.size
        name = content[at : at + name_length].decode()
        at += name_length
        table = content[at : at + count * ENTRY.size]
        if len(table) != count * ENTRY.size:
            raise errors.damaged(what, "it is cut short")
        at += len(table)
        yield IndexedPack(name, size, entries_of(table, what))


class ChunkIndex:
    """One process's view. Thread-safe; every method is short but `marked_use`."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.RLock()
        # "" is a private file that SQLite removes by itself; spilled to disk when its cache of pages is full.
        self._sql = sqlite3.connect(str(path) if path else "", check_same_thread=False, isolation_level=None)
        # Lost with the power it is read anew from the repository: no sync.
        self._sql.executescript("PRAGMA journal_mode=MEMORY; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;" + _SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    # What lies where

    def find(self, id: bytes) -> Location | None:
        """Return the best place to read a record from: not known as damaged, not condemned; else any."""
        with self._lock:
            row = self._sql.execute(
                "SELECT p.name, c.kind, c.offset, c.length, c.raw FROM chunk c JOIN pack p ON p.no = c.pack WHERE c.id = ? "
                "ORDER BY c.is_damaged, c.pack IN (SELECT pack FROM condemned), c.pack DESC LIMIT 1",
                (id,),
            ).fetchone()
        return _location(id, row) if row else None

    def places(self, id: bytes) -> Sequence[Location]:
        """Return every place that has the record, best first."""
        with self._lock:
            rows = self._sql.execute(
                "SELECT p.name, c.kind, c.offset, c.length, c.raw FROM chunk c JOIN pack p ON p.no = c.pack WHERE c.id = ? "
                "ORDER BY c.is_damaged, c.pack IN (SELECT pack FROM condemned), c.pack DESC",
                (id,),
            ).fetchall()
        return [_location(id, row) for row in rows]

    def is_kept(self, id: bytes) -> bool:
        """Tell whether a new backup may rely on a stored record: it is whole as far as known, and nobody removes it."""
        with self._lock:
            found = self._sql.execute(
                "SELECT 1 FROM chunk WHERE id = ? AND NOT is_damaged AND pack NOT IN (SELECT pack FROM condemned) LIMIT 1", (id,)
            ).fetchone()
        return found is not None

    def is_whole(self, id: bytes) -> bool:
        """Tell whether some copy of a record is whole as far as known."""
        with self._lock:
            found = self._sql.execute("SELECT 1 FROM chunk WHERE id = ? AND NOT is_damaged LIMIT 1", (id,)).fetchone()
        return found is not None

    def entries(self, pack: str) -> Sequence[Entry]:
        with self._lock:
            rows = self._sql.execute(
                "SELECT c.id, c.kind, c.offset, c.length, c.raw FROM chunk c JOIN pack p ON p.no = c.pack WHERE p.name = ? "
                "ORDER BY c.offset",
                (pack,),
            ).fetchall()
        return [Entry(id, Kind(kind), offset, length, raw) for id, kind, offset, length, raw in rows]

    def packs(self) -> Sequence[str]:
        with self._lock:
            return [name for (name,) in self._sql.execute("SELECT name FROM pack ORDER BY name")]

    def pack_size(self, pack: str) -> int:
        with self._lock:
            return int(self._sql.execute("SELECT size FROM pack WHERE name = ?", (pack,)).fetchone()[0])

    def counts(self) -> tuple[int, int]:
        """Return how many records are known and their bytes."""
        with self._lock:
            count, total = self._sql.execute("SELECT count(*), coalesce(sum(length), 0) FROM chunk").fetchone()
        return int(count), int(total)

    # What the repository lists

    def add_pack(self, index_file: str, pack: IndexedPack) -> None:
        """Take a pack in, as listed by an index file; "" for one of an own session that is in none yet."""
        with self._lock:
            self._sql.execute("BEGIN")
            try:
                self._sql.execute("INSERT OR IGNORE INTO pack (name, size) VALUES (?, ?)", (pack.name, pack.size_bytes))
                (number,) = self._sql.execute("SELECT no FROM pack WHERE name = ?", (pack.name,)).fetchone()
                self._sql.executemany(
                    "INSERT OR IGNORE INTO chunk (id, pack, kind, offset, length, raw) VALUES (?, ?, ?, ?, ?, ?)",
                    [(e.id, number, int(e.kind), e.offset, e.length, e.raw_bytes) for e in pack.entries],
                )
                self._sql.execute("INSERT OR IGNORE INTO index_file (name, pack) VALUES (?, ?)", (index_file, number))
            except BaseException:
                self._sql.execute("ROLLBACK")
                raise
            self._sql.execute("COMMIT")

    def index_files(self) -> set[str]:
        with self._lock:
            return {name for (name,) in self._sql.execute("SELECT DISTINCT name FROM index_file WHERE name != ''")}

    def packs_of(self, index_file: str) -> Sequence[str]:
        with self._lock:
            rows = self._sql.execute(
                "SELECT p.name FROM index_file i JOIN pack p ON p.no = i.pack WHERE i.name = ? ORDER BY p.name", (index_file,)
            )
            return [name for (name,) in rows]

    def forget_index_files(self, names: Collection[str]) -> None:
        """Drop index files and the packs that no other lists."""
        with self._lock:
            self._sql.executemany("DELETE FROM index_file WHERE name = ?", [(name,) for name in names])
            self._drop_unlisted()

    def forget_sessions(self) -> None:
        """Drop what this process's own sessions added before their index was written."""
        self.forget_index_files([""])

    def _drop_unlisted(self) -> None:
        unlisted = [no for (no,) in self._sql.execute("SELECT no FROM pack WHERE no NOT IN (SELECT pack FROM index_file)")]
        if not unlisted:
            return
        marks = ",".join(str(int(no)) for no in unlisted)
        self._sql.execute(f"DELETE FROM chunk WHERE pack IN ({marks})")  # noqa: S608 - numbers
        self._sql.execute(f"DELETE FROM pack WHERE no IN ({marks})")  # noqa: S608 - numbers

    def set_condemned(self, packs: Collection[str]) -> None:
        with self._lock:
            self._sql.execute("DELETE FROM condemned")
            self._sql.executemany(
                "INSERT OR IGNORE INTO condemned SELECT no FROM pack WHERE name = ?", [(pack,) for pack in packs]
            )

    def set_damaged(self, damaged: Collection[tuple[bytes, str]], *, lost_packs: Collection[str]) -> None:
        """Replace what is known as damaged: pairs of a record's id and its pack, and all of the packs that storage does not have.

        Those stay known for as long as an index file lists them: forgotten, nobody would look for what they had to store it anew.
        """
        with self._lock:
            self._sql.execute("UPDATE chunk SET is_damaged = 0 WHERE is_damaged")
            self.add_damaged(damaged)
            self._sql.executemany(
                "UPDATE chunk SET is_damaged = 1 WHERE pack = (SELECT no FROM pack WHERE name = ?)",
                [(pack,) for pack in lost_packs],
            )

    def add_damaged(self, damaged: Collection[tuple[bytes, str]]) -> None:
        with self._lock:
            self._sql.executemany(
                "UPDATE chunk SET is_damaged = 1 WHERE id = ? AND pack = (SELECT no FROM pack WHERE name = ?)", list(damaged)
            )

    # Marking

    def clear_marks(self) -> None:
        with self._lock:
            self._sql.execute("DELETE FROM live")

    def mark(self, ids: Collection[bytes]) -> None:
        with self._lock:
            self._sql.execute("BEGIN")
            self._sql.executemany("INSERT OR IGNORE INTO live VALUES (?)", [(id,) for id in ids])
            self._sql.execute("COMMIT")

    def is_marked(self, id: bytes) -> bool:
        with self._lock:
            return self._sql.execute("SELECT 1 FROM live WHERE id = ?", (id,)).fetchone() is not None

    def marked_use(self) -> Sequence[PackUse]:
        """Return for each pack what the marked ids need from it: what no better place outside of it has."""
        with self._lock:
            rows = self._sql.execute(
                "SELECT p.name, p.size, sum(c.length), max(c.is_damaged), sum(CASE WHEN l.id IS NOT NULL AND NOT EXISTS ("
                " SELECT 1 FROM chunk d WHERE d.id = c.id AND d.pack != c.pack AND NOT d.is_damaged"
                " AND d.pack NOT IN (SELECT pack FROM condemned)"
                # Of two whole copies outside condemned packs, the one in the newest pack counts.
                " AND (d.pack > c.pack OR c.is_damaged OR c.pack IN (SELECT pack FROM condemned))"
                ") THEN c.length ELSE 0 END) "
                "FROM chunk c JOIN pack p ON p.no = c.pack LEFT JOIN live l ON l.id = c.id GROUP BY p.no ORDER BY p.name"
            ).fetchall()
        return [PackUse(name, size, total, live, bool(damaged)) for name, size, total, damaged, live in rows]


def _location(id: bytes, row: tuple[str, int, int, int, int]) -> Location:
    name, kind, offset, length, raw = row
    return Location(name, Entry(id, Kind(kind), offset, length, raw))
