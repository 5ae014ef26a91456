"""Blobs in a folder, also on NFS: written aside, synced, and linked to their name, which fails where the name is taken."""

import errno
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobEntry
from trimtab_protos.errors import TrimtabError

_ASIDE = ".aside"
_OPEN_MAX = 32
_WRITEV_MAX = 512  # below IOV_MAX, 1024 on Linux


class FolderBlobs:
    """A folder that exists; the folders below it are made as needed."""

    def __init__(self, root: Path, *, sync: Callable[[int], None] = os.fsync) -> None:
        """`sync` makes a file or a folder durable, by its descriptor: a test counts on nothing else to survive a loss of power."""
        self._root = root
        self._sync = sync
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._known: set[Path] = set()

    @property
    def where(self) -> str:
        return str(self._root)

    def put_new(self, name: str, parts: Sequence[bytes]) -> None:
        try:
            aside = self._write_aside(parts)
            try:
                self._link(aside, self._path(name))
            finally:
                aside.unlink(missing_ok=True)
            self._sync_folder(self._path(name).parent)
        except FileExistsError as error:
            raise errors.blob_exists(name) from error
        except OSError as error:
            raise _translated(error, name) from error

    def put(self, name: str, content: bytes) -> None:
        try:
            aside = self._write_aside([content])
            path = self._path(name)
            self._make(path.parent)
            aside.rename(path)
            self._sync_folder(path.parent)
        except OSError as error:
            raise _translated(error, name) from error

    def get(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise _translated(error, name) from error

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        # Under the lock, so that no other thread closes the descriptor meanwhile: the page cache answers most reads.
        try:
            with self._lock:
                descriptor = self._descriptor(name)
                duplicate = os.dup(descriptor)
            try:
                return _pread(duplicate, length, offset)
            finally:
                os.close(duplicate)
        except OSError as error:
            raise _translated(error, name) from error

    def list(self, prefix: str) -> Sequence[BlobEntry]:
        found: list[BlobEntry] = []
        pending = [prefix.rstrip("/")]
        try:
            while pending:
                folder = pending.pop()
                try:
                    entries = list(os.scandir(self._root / folder))
                except FileNotFoundError:
                    continue
                for entry in entries:
                    name = f"{folder}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                        continue
                    try:
                        found.append(BlobEntry(name, entry.stat(follow_symlinks=False).st_size))
                    except FileNotFoundError:
                        continue  # deleted since the folder was read
        except OSError as error:
            raise _translated(error, prefix) from error
        return sorted(found, key=lambda blob: blob.name)

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            with self._lock:
                descriptor = self._open.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)
            path.unlink(missing_ok=True)
            if path.parent.exists():
                self._sync_folder(path.parent)
        except OSError as error:
            raise _translated(error, name) from error

    def remove_debris(self, older_than_s: float) -> int:
        removed = 0
        try:
            for entry in os.scandir(self._root / _ASIDE):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > older_than_s:
                    os.unlink(entry.path)
                    removed += 1
        except FileNotFoundError:
            return removed
        except OSError as error:
            raise _translated(error, _ASIDE) from error
        return removed

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if not all(part and not part.startswith(".") for part in parts):
            raise ValueError(f"not a name of a blob: {name!r}")
        return self._root.joinpath(*parts)

    def _write_aside(self, parts: Sequence[bytes]) -> Path:
        folder = self._root / _ASIDE
        self._make(folder)
        path = folder / secrets.token_hex(16)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, parts)
            self._sync(descriptor)
            # The host's memory belongs to its guests: nobody reads a pack soon after it was written.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return path

    def _link(self, aside: Path, path: Path) -> None:
        self._make(path.parent)
        try:
            os.link(aside, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost: the second finds the name that the first has made.
            if aside.stat().st_nlink != 2 or not path.samefile(aside):
                raise

    def _make(self, folder: Path) -> None:
        """Make a folder below the root durably: one whose parent's name may be lost would take with it what is put there."""
        if folder in self._known or folder == self._root:
            return
        self._make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._sync_folder(folder.parent)
        self._known.add(folder)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._sync(descriptor)
        finally:
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._open[name] = descriptor
        if len(self._open) > _OPEN_MAX:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _write_all(descriptor: int, parts: Sequence[bytes]) -> None:
    for start in range(0, len(parts), _WRITEV_MAX):
        batch = [memoryview(part) for part in parts[start : start + _WRITEV_MAX]]
        while batch:
            written = os.writev(descriptor, batch)
            while batch and written >= len(batch[0]):
                written -= len(batch[0])
                batch.pop(0)
            if batch and written:
                batch[0] = batch[0][written:]


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    first = os.pread(descriptor, length, offset)
    if len(first) == length or not first:
        return first
    pieces, have = [first], len(first)
    while have < length:
        piece = os.pread(descriptor, length - have, offset + have)
        if not piece:
            break
        pieces.append(piece)
        have += len(piece)
    return b"".join(pieces)


def _translated(error: OSError, name: str) -> TrimtabError:
    detail = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return errors.blob_missing(name)
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return errors.repository_full(name, detail)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return errors.repository_refused(name, detail)
        case _:
            return errors.repository_unreachable(name, detail)
