"""A small NBD client for a unix socket: what of an export is allocated or dirty, and reads and writes that do not wait for each other.

Speaks what QEMU's servers do: fixed newstyle handshake, structured replies, one or more metadata contexts. One connection, not
thread-safe. Byte order on the wire is big endian.
"""

import contextlib
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trimtab_protos.errors import Conflict, Internal, NotFound, TrimtabError, Unavailable

ALLOCATION = "base:allocation"
HOLE = 1
ZERO = 2
DIRTY = 1
TIMEOUT_S = 60.0
"""Of one answer: a disk whose storage hangs for longer fails the backup, not the guest."""
DEPTH = 8
REQUEST_BYTES = 1 << 20
"""1 MiB x 8 was the fastest against qemu 7.2: 336 MiB/s beside 306 with 4 MiB x 4."""
STATUS_BYTES = 1 << 30

_MAGIC = b"NBDMAGICIHAVEOPT"
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_STRUCTURED_MAGIC = 0x668E33EF
_SIMPLE_REST = struct.Struct(">IQ")
_STRUCTURED_REST = struct.Struct(">HHQI")
_OPT_GO, _OPT_STRUCTURED, _OPT_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_CONTEXT = 1, 3, 4
_REP_ERROR = 1 << 31
_READ, _WRITE, _DISCONNECT, _FLUSH, _ZERO, _STATUS = 0, 1, 2, 3, 6, 7
_DATA, _DATA_HOLE, _BLOCK_STATUS, _ERROR = 1, 2, 5, 1 << 15
_DONE = 1
_OPTION_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the export and its flags in one context."""

    offset: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(slots=True)
class _Read:
    """A read on its way: its bytes land in pieces, so that nothing is copied again."""

    offset: int
    length: int
    piece_bytes: int
    pieces: list[bytearray]

    def views(self, offset: int, length: int) -> Iterator[memoryview]:
        at = offset - self.offset
        if at < 0 or at + length > self.length:
            raise _protocol_error("it sent bytes outside of what was asked for")
        while length:
            number, within = divmod(at, self.piece_bytes)
            count = min(length, len(self.pieces[number]) - within)
            yield memoryview(self.pieces[number])[within : within + count]
            at += count
            length -= count


class NbdClient:
    """Use `connect`. A context manager."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._closing = threading.Lock()
        self._contexts: dict[int, str] = {}
        self._handle = 0
        self._done: set[int] = set()
        """Younger requests that were answered before the oldest."""
        self._writes: deque[int] = deque()
        self.size_bytes = 0
        self.request_max_bytes = 32 << 20

    @staticmethod
    def connect(path: Path, export: str, *, contexts: Sequence[str] = ()) -> "NbdClient":
        """Open an export. NotFound `export-not-found`, Conflict `context-missing` where the server has no such context."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(TIMEOUT_S)
        client = NbdClient(connection)
        try:
            connection.connect(str(path))
            client._negotiate(export, contexts)
        except OSError as error:
            connection.close()
            raise _lost(error) from error
        except BaseException:
            connection.close()
            raise
        return client

    def extents(self, context: str, *, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield the extents of a context in order, without gaps."""
        end = self.size_bytes if length is None else offset + length
        while offset < end:
            handle = self._send(_STATUS, offset, min(end - offset, STATUS_BYTES))
            found = self._receive_status(handle, context)
            if not found:
                raise _protocol_error("it answered a question about blocks with nothing")
            for count, flags in found:
                count = min(count, end - offset)  # noqa: PLW2901 - the last one may reach further than was asked
                if count:
                    yield Extent(offset, count, flags)
                offset += count

    def read_pieces(self, ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, bytearray]]:
        """Read ranges in order, several on their way at once, and yield offset and content in pieces of `piece_bytes`.

        A range begins at a multiple of `piece_bytes` and is at most `request_max_bytes` long; only the last piece of it may be short.
        """
        waiting: deque[tuple[int, _Read]] = deque()
        for offset, length in ranges:
            if len(waiting) >= DEPTH:
                yield from self._finish(waiting)
            pieces = [bytearray(min(piece_bytes, length - at)) for at in range(0, length, piece_bytes)]
            waiting.append((self._send(_READ, offset, length), _Read(offset, length, piece_bytes, pieces)))
        while waiting:
            yield from self._finish(waiting)

    def read(self, offset: int, length: int) -> bytes:
        """Return one range."""
        [(_, content)] = self.read_pieces([(offset, length)], length)
        return bytes(content)

    def write(self, offset: int, content: bytes | bytearray) -> None:
        """Write one range and wait for it; durable only after `flush`."""
        self.begin_write(offset, content)
        self._await_writes(0)

    def begin_write(self, offset: int, content: bytes | bytearray) -> None:
        """Send one range on its way. What it meets is raised by a later call or by `flush`, after which nothing is certain.

        Nothing may be read before `flush`.
        """
        for at in range(0, len(content), self.request_max_bytes):
            piece = memoryview(content)[at : at + self.request_max_bytes]
            self._await_writes(DEPTH - 1)
            self._writes.append(self._send(_WRITE, offset + at, len(piece), piece))

    def begin_zero(self, offset: int, length: int) -> None:
        """Have a range read as zeros, as `begin_write` would; the server finds the shortest way for its storage."""
        for at in range(0, length, self.request_max_bytes):
            self._await_writes(DEPTH - 1)
            self._writes.append(self._send(_ZERO, offset + at, min(length - at, self.request_max_bytes)))

    def flush(self) -> None:
        self._await_writes(0)
        self._receive(self._send(_FLUSH, 0, 0), None)

    def _await_writes(self, left: int) -> None:
        while len(self._writes) > left:
            self._receive(self._writes.popleft(), None)

    def cut(self) -> None:
        """Break the connection off, from any thread: whoever reads or waits finds it lost.

        A shutdown alone leaves QEMU (7.2, tried) waiting for a reader that stands still, in a loop that its guest waits for too. So the
        connection is closed, and its number goes to one that has ended: it may be on its way into a call of the reader's.
        """
        with self._closing, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
            ended, other_end = socket.socketpair()
            other_end.close()
            ended.setblocking(False)  # as one with a timeout is
            with ended:
                os.dup2(ended.fileno(), self._socket.fileno(), inheritable=False)

    def close(self) -> None:
        with contextlib.suppress(OSError, TrimtabError):
            self._send(_DISCONNECT, 0, 0)
        with self._closing:
            self._socket.close()

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Handshake

    def _negotiate(self, export: str, contexts: Sequence[str]) -> None:
        if self._exactly(16) != _MAGIC:
            raise _protocol_error("it does not greet as an NBD server does")
        flags = int.from_bytes(self._exactly(2), "big")
        if not flags & 1:
            raise _protocol_error("it speaks only the old handshake")
        self._socket.sendall(struct.pack(">I", flags & 3))
        if self._option(_OPT_STRUCTURED, b"") is None:
            raise _protocol_error("it has no structured replies")
        name = export.encode()
        if contexts:
            self._choose_contexts(name, contexts)
        replies = self._option(_OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, 3))
        if replies is None:
            raise NotFound("export-not-found", f"the server has no export {export}", export=export)
        for kind, content in replies:
            if kind == _REP_INFO:
                self._learn(content)

    def _choose_contexts(self, name: bytes, contexts: Sequence[str]) -> None:
        queries = b"".join(struct.pack(">I", len(context)) + context.encode() for context in contexts)
        asked = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts)) + queries
        replies = self._option(_OPT_CONTEXT, asked)
        if replies is None:
            raise NotFound("export-not-found", f"the server has no export {name.decode()}", export=name.decode())
        for kind, content in replies:
            if kind == _REP_CONTEXT:
                self._contexts[int.from_bytes(content[:4], "big")] = content[4:].decode()
        missing = [context for context in contexts if context not in self._contexts.values()]
        if missing:
            raise Conflict("context-missing", f"the export {name.decode()} does not tell {missing[0]}", context=missing[0])

    def _option(self, option: int, content: bytes) -> list[tuple[int, bytes]] | None:
        """Return the replies to an option; None where the server refuses it."""
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(content)) + content)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, answered, kind, length = _OPTION_REPLY.unpack(self._exactly(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or answered != option or length > _OPTION_MAX_BYTES:
                raise _protocol_error("its answer to an option cannot be understood")
            body = self._exactly(length)
            if kind & _REP_ERROR:
                return None
            if kind == _REP_ACK:
                return replies
            replies.append((kind, body))

    def _learn(self, content: bytes) -> None:
        match int.from_bytes(content[:2], "big"):
            case 0:
                self.size_bytes = int.from_bytes(content[2:10], "big")
            case 3:
                self.request_max_bytes = min(self.request_max_bytes, int.from_bytes(content[10:14], "big"))

    # Transmission

    def _send(self, kind: int, offset: int, length: int, content: memoryview | None = None) -> int:
        self._handle += 1
        try:
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._handle, offset, length))
            if content is not None:
                self._socket.sendall(content)
        except OSError as error:
            raise _lost(error) from error
        return self._handle

    def _finish(self, waiting: deque[tuple[int, _Read]]) -> Iterator[tuple[int, bytearray]]:
        """Wait for the oldest read; QEMU may answer a younger one first, whose bytes then land in its own pieces."""
        handle, read = waiting[0]
        self._receive(handle, dict(waiting))
        waiting.popleft()
        for number, piece in enumerate(read.pieces):
            yield read.offset + number * read.piece_bytes, piece

    def _receive(self, handle: int, reads: dict[int, _Read] | None) -> None:
        """Take in replies until `handle` is done."""
        if handle in self._done:
            self._done.discard(handle)
            return
        while True:
            answered, is_done, kind, length = self._reply_head()
            if kind == _DATA and reads is not None and answered in reads:
                self._take_data(reads[answered], length)
            elif kind == _DATA_HOLE:
                self._exactly(length)  # the pieces are zeros already
            elif kind & _ERROR:
                raise self._error(length)
            else:
                self._exactly(length)
            if is_done and answered == handle:
                return
            if is_done:
                self._done.add(answered)

    def _receive_status(self, handle: int, context: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while True:
            answered, is_done, kind, length = self._reply_head()
            if kind & _ERROR:
                raise self._error(length)
            body = self._exactly(length)
            if kind == _BLOCK_STATUS and self._contexts.get(int.from_bytes(body[:4], "big")) == context:
                found += list(struct.iter_unpack(">II", body[4:]))
            if is_done and answered == handle:
                return found

    def _reply_head(self) -> tuple[int, bool, int, int]:
        magic = int.from_bytes(self._exactly(4), "big")
        if magic == _SIMPLE_MAGIC:
            code, handle = _SIMPLE_REST.unpack(self._exactly(_SIMPLE_REST.size))
            if code:
                raise _failed(code, "")
            return handle, True, 0, 0
        if magic != _STRUCTURED_MAGIC:
            raise _protocol_error("its reply cannot be understood")
        flags, kind, handle, length = _STRUCTURED_REST.unpack(self._exactly(_STRUCTURED_REST.size))
        return handle, bool(flags & _DONE), kind, length

    def _take_data(self, read: _Read, length: int) -> None:
        offset = int.from_bytes(self._exactly(8), "big")
        for view in read.views(offset, length - 8):
            self._fill(view)

    def _error(self, length: int) -> TrimtabError:
        body = self._exactly(length)
        count = int.from_bytes(body[4:6], "big")
        return _failed(int.from_bytes(body[:4], "big"), body[6 : 6 + count].decode(errors="replace"))

    def _exactly(self, length: int) -> bytes:
        content = bytearray(length)
        self._fill(memoryview(content))
        return bytes(content)

    def _fill(self, view: memoryview) -> None:
        try:
            while view:
                count = self._socket.recv_into(view)
                if not count:
                    raise ConnectionResetError("the server closed the connection")
                view = view[count:]
        except OSError as error:
            raise _lost(error) from error


def _lost(error: OSError) -> Unavailable:
    return Unavailable("disk-export-lost", f"the export of the disk broke off: {error}; the guest may have stopped")


def _failed(code: int, detail: str) -> Unavailable:
    return Unavailable("disk-read-failed", f"QEMU could not read or write the disk: {detail or f'error {code}'}", errno=code)


def _protocol_error(why: str) -> Internal:
    return Internal("nbd-protocol", f"the server of the disk's export is not understood: {why}")
