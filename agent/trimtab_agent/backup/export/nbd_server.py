"""A read-only NBD server of disks of backups over a unix socket, for QEMU, nbdcopy and our own client.

Fixed newstyle handshake, structured replies, `base:allocation`. Requests of a connection are answered by a few threads, in any order;
zeros are answered as holes, without a byte. A chunk that cannot be had whole is answered with EIO. Byte order is big endian.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trimtab_agent.backup.export.content import DiskContent

log = logging.getLogger(__name__)  # structlog would take as long to load as all else that this process needs

ALLOCATION = "base:allocation"
WORKERS = 3
REQUEST_MAX_BYTES = 32 << 20
IN_FLIGHT = 16
"""Requests of one connection; more are left in its socket, so that nobody can make this process hold any number of answers."""
EXTENTS_MAX = 4096

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_STRUCTURED = struct.Struct(">IHHQI")
_STRUCTURED_MAGIC = 0x668E33EF
_SIMPLE = struct.Struct(">IIQ")
_SIMPLE_MAGIC = 0x67446698
_OPT_NAME, _OPT_ABORT, _OPT_LIST, _OPT_INFO, _OPT_GO, _OPT_STRUCTURED, _OPT_LIST_CONTEXT, _OPT_SET_CONTEXT = (
    1,
    2,
    3,
    6,
    7,
    8,
    9,
    10,
)
_REP_ACK, _REP_SERVER, _REP_INFO, _REP_CONTEXT = 1, 2, 3, 4
_REP_UNSUPPORTED, _REP_INVALID, _REP_UNKNOWN = (1 << 31) + 1, (1 << 31) + 3, (1 << 31) + 6
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _CACHE, _ZEROES, _STATUS = 0, 1, 2, 3, 4, 5, 6, 7
_FLAG_DONT_FRAGMENT, _FLAG_ONE_EXTENT = 1 << 2, 1 << 3
_DONE, _NONE, _DATA, _HOLE, _BLOCK_STATUS, _ERROR = 1, 0, 1, 2, 5, (1 << 15) + 1
# Flags, read only, flush, don't fragment, many connections, cache.
_EXPORT_FLAGS = 1 | 1 << 1 | 1 << 2 | 1 << 7 | 1 << 8 | 1 << 10
_OPTION_MAX_BYTES = 1 << 16


class NbdServer:
    """Serves until `close`; connections are threads of their own."""

    def __init__(
        self,
        path: Path,
        disks: Mapping[str, DiskContent],
        *,
        owner: tuple[int, int] | None = None,
        offers_allocation: bool = True,
    ) -> None:
        """Bind the socket at once, for its owner (user, group) only; a file that an earlier server left there is replaced.

        `offers_allocation`: whether a client may ask where zeros are.
        """
        self._path = path
        self._disks = disks
        self._offers_allocation = offers_allocation
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound beside its name and renamed: whoever sees it can connect.
        fresh = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        self._listener.bind(str(fresh))
        fresh.chmod(0o600)
        if owner is not None:
            os.chown(fresh, *owner)
        self._listener.listen(64)
        fresh.rename(path)
        self._inode = path.stat().st_ino
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._is_closed = False

    def serve(self) -> None:
        """Accept until `close`."""
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_closed:
                    accepted.close()
                    return
                self._connections.add(accepted)
            threading.Thread(target=self._talk, args=(accepted,), name="nbd", daemon=True).start()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        """Accept nobody and drop who is connected."""
        with self._lock:
            self._is_closed = True
            open_now = list(self._connections)
        for one in (self._listener, *open_now):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # not a successor's
                self._path.unlink()

    def _talk(self, accepted: socket.socket) -> None:
        try:
            _Connection(accepted, self._disks, offers_allocation=self._offers_allocation).run()
        except (OSError, _Gone):
            pass  # whoever was connected went away, or speaks something else
        finally:
            accepted.close()
            with self._lock:
                self._connections.discard(accepted)


class _Gone(Exception):
    """The peer ended the conversation, or cannot be understood."""


class _Connection:
    def __init__(self, accepted: socket.socket, disks: Mapping[str, DiskContent], *, offers_allocation: bool) -> None:
        self._socket = accepted
        self._disks = disks
        self._offers_allocation = offers_allocation
        self._sending = threading.Lock()
        self._room = threading.BoundedSemaphore(IN_FLIGHT)
        self._is_structured = False
        self._tells_allocation = False

    def run(self) -> None:
        disk = self._negotiate()
        if disk is None:
            return
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="nbd") as workers:
            try:
                while True:
                    magic, flags, kind, handle, offset, length = _REQUEST.unpack(self._exactly(_REQUEST.size))
                    if magic != _REQUEST_MAGIC or kind == _DISCONNECT:
                        return
                    if kind == _WRITE:
                        self._skip(length)
                    self._room.acquire()
                    workers.submit(self._answer, disk, flags, kind, handle, offset, length)
            finally:
                with contextlib.suppress(OSError):  # wakes who sends
                    self._socket.shutdown(socket.SHUT_RDWR)
                workers.shutdown(wait=True, cancel_futures=True)

    # Handshake

    def _negotiate(self) -> DiskContent | None:
        self._socket.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        client_flags = int.from_bytes(self._exactly(4), "big")
        while True:
            magic, option, length = _OPTION.unpack(self._exactly(_OPTION.size))
            if magic != b"IHAVEOPT" or length > _OPTION_MAX_BYTES:
                raise _Gone
            body = self._exactly(length)
            match option:
                case 1:  # _OPT_NAME
                    disk = self._disks.get(body.decode(errors="replace"))
                    if disk is None:
                        return None
                    zeroes = b"" if client_flags & 2 else bytes(124)
                    self._socket.sendall(struct.pack(">QH", disk.size_bytes, _EXPORT_FLAGS) + zeroes)
                    return disk
                case 2:  # _OPT_ABORT
                    self._reply(option, _REP_ACK)
                    return None
                case 6 | 7:  # _OPT_INFO, _OPT_GO
                    disk = self._go(option, body)
                    if disk is not None and option == _OPT_GO:
                        return disk
                case _:
                    self._other(option, body)

    def _go(self, option: int, body: bytes) -> DiskContent | None:
        name_length = int.from_bytes(body[:4], "big")
        disk = self._disks.get(body[4 : 4 + name_length].decode(errors="replace"))
        if disk is None:
            self._reply(option, _REP_UNKNOWN)
            return None
        self._reply(option, _REP_INFO, struct.pack(">HQH", 0, disk.size_bytes, _EXPORT_FLAGS))
        self._reply(option, _REP_INFO, struct.pack(">HIII", 3, 1, disk.chunk_bytes, REQUEST_MAX_BYTES))
        self._reply(option, _REP_ACK)
        return disk

    def _other(self, option: int, body: bytes) -> None:
        match option:
            case 3:  # _OPT_LIST
                for name in self._disks:
                    self._reply(option, _REP_SERVER, struct.pack(">I", len(name.encode())) + name.encode())
                self._reply(option, _REP_ACK)
            case 8:  # _OPT_STRUCTURED
                self._is_structured = True
                self._reply(option, _REP_ACK)
            case 9 | 10:  # _OPT_LIST_CONTEXT, _OPT_SET_CONTEXT
                self._contexts(option, body)
            case _:
                self._reply(option, _REP_UNSUPPORTED)

    def _contexts(self, option: int, body: bytes) -> None:
        try:
            at = 4 + int.from_bytes(body[:4], "big")
            (count,) = struct.unpack_from(">I", body, at)
            at, queries = at + 4, []
            for _ in range(count):
                (length,) = struct.unpack_from(">I", body, at)
                queries.append(body[at + 4 : at + 4 + length].decode(errors="replace"))
                at += 4 + length
        except struct.error:
            self._reply(option, _REP_INVALID)
            return
        is_asked = self._offers_allocation and (
            any(query in {ALLOCATION, "base:"} for query in queries) or (option == _OPT_LIST_CONTEXT and not queries)
        )
        if option == _OPT_SET_CONTEXT:
            self._tells_allocation = is_asked
        if is_asked:
            self._reply(option, _REP_CONTEXT, struct.pack(">I", 1) + ALLOCATION.encode())
        self._reply(option, _REP_ACK)

    def _reply(self, option: int, kind: int, body: bytes = b"") -> None:
        self._socket.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(body)) + body)

    # Transmission

    def _answer(self, disk: DiskContent, flags: int, kind: int, handle: int, offset: int, length: int) -> None:
        try:
            if kind in {_WRITE, _TRIM, _ZEROES}:
                self._fail(handle, errno.EPERM)
            elif kind in {_READ, _STATUS, _CACHE} and (
                offset + length > disk.size_bytes or (length > REQUEST_MAX_BYTES and kind == _READ)
            ):
                self._fail(handle, errno.EINVAL)
            elif kind == _READ:
                self._read(disk, flags, handle, offset, length)
            elif kind == _STATUS and self._tells_allocation and length:
                self._status(disk, flags, handle, offset, length)
            elif kind in {_FLUSH, _CACHE}:
                self._succeed(handle)
            else:
                self._fail(handle, errno.EINVAL)
        except OSError:
            pass  # the peer went away
        except Exception:
            # A request's edge: whatever broke it, a chunk that is damaged above all, its own answer fails and the server goes on.
            log.exception("a request of an export failed")
            with contextlib.suppress(OSError):
                self._fail(handle, errno.EIO)
        finally:
            self._room.release()

    def _read(self, disk: DiskContent, flags: int, handle: int, offset: int, length: int) -> None:
        if not self._is_structured or flags & _FLAG_DONT_FRAGMENT:
            content = disk.read(offset, length)
            head = _SIMPLE.pack(_SIMPLE_MAGIC, 0, handle)
            if self._is_structured:
                head = _STRUCTURED.pack(_STRUCTURED_MAGIC, _DONE, _DATA, handle, 8 + length) + offset.to_bytes(8, "big")
            self._send(head, content)
            return
        for at, count, piece in disk.pieces(offset, length):
            done = _DONE if at + count == offset + length else 0
            if piece is None:
                head = _STRUCTURED.pack(_STRUCTURED_MAGIC, done, _HOLE, handle, 12)
                self._send(head + at.to_bytes(8, "big") + count.to_bytes(4, "big"))
            else:
                head = _STRUCTURED.pack(_STRUCTURED_MAGIC, done, _DATA, handle, 8 + count)
                self._send(head + at.to_bytes(8, "big"), piece)
        if not length:
            self._succeed(handle)

    def _status(self, disk: DiskContent, flags: int, handle: int, offset: int, length: int) -> None:
        limit = 1 if flags & _FLAG_ONE_EXTENT else EXTENTS_MAX
        found = list(disk.extents(offset, length, limit=limit))
        body = struct.pack(">I", 1) + b"".join(struct.pack(">II", count, 3 if is_hole else 0) for count, is_hole in found)
        self._send(_STRUCTURED.pack(_STRUCTURED_MAGIC, _DONE, _BLOCK_STATUS, handle, len(body)) + body)

    def _succeed(self, handle: int) -> None:
        if self._is_structured:
            self._send(_STRUCTURED.pack(_STRUCTURED_MAGIC, _DONE, _NONE, handle, 0))
        else:
            self._send(_SIMPLE.pack(_SIMPLE_MAGIC, 0, handle))

    def _fail(self, handle: int, code: int) -> None:
        if self._is_structured:
            self._send(_STRUCTURED.pack(_STRUCTURED_MAGIC, _DONE, _ERROR, handle, 6) + struct.pack(">IH", code, 0))
        else:
            self._send(_SIMPLE.pack(_SIMPLE_MAGIC, code, handle))

    def _send(self, head: bytes, content: bytes | memoryview = b"") -> None:
        with self._sending:
            if not content:
                self._socket.sendall(head)
                return
            sent = self._socket.sendmsg([head, content])
            if sent < len(head):
                self._socket.sendall(head[sent:])
                sent = len(head)
            if sent < len(head) + len(content):
                self._socket.sendall(memoryview(content)[sent - len(head) :])

    def _exactly(self, length: int) -> bytes:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise _Gone
            view = view[count:]
        return bytes(content)

    def _skip(self, length: int) -> None:
        while length:
            length -= len(self._exactly(min(length, 1 << 20)))
