"""Sends a large body as it is read. The server is asked first (Expect: 100-continue): a refusal costs no gigabytes, and its words
are not lost in the reset of a connection that closes with half of the body unread.
"""

import contextlib
import hashlib
import http.client
import io
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from trimtab_controller.cli.errors import CommandFailed

# A server that does not know the question just waits for the body.
_PERMISSION_TIMEOUT_S = 3.0
_CHUNK_BYTES = 1 << 20
_ANSWER_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class RawAnswer:
    status: int
    headers: http.client.HTTPMessage
    content: bytes


@dataclass(slots=True)
class Source:
    """A file and what was seen of it on its way."""

    stream: IO[bytes]
    size_bytes: int
    on_progress: Callable[[int], None]
    sha256: str = ""

    def chunks(self) -> Iterator[bytes]:
        """Yield exactly the size that was declared; CommandFailed where the file changes meanwhile."""
        digest, sent = hashlib.sha256(), 0
        while sent < self.size_bytes:
            chunk = self.stream.read(min(_CHUNK_BYTES, self.size_bytes - sent))
            if not chunk:
                raise CommandFailed(
                    f"the file became shorter while it was sent: {sent} of {self.size_bytes} bytes", code="file-truncated"
                )
            digest.update(chunk)
            sent += len(chunk)
            yield chunk
            self.on_progress(sent)
        if self.stream.read(1):
            raise CommandFailed(
                f"the file grew while it was sent (past {self.size_bytes} bytes); import it when nothing writes to it",
                code="file-changed",
            )
        self.sha256 = digest.hexdigest()


def post(connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str], source: Source) -> RawAnswer:
    """Return the server's answer to the body, or to the question whether it may be sent. OSError, HTTPException as usual."""
    connection.putrequest("POST", target, skip_accept_encoding=True)
    for name, value in {**headers, "Content-Length": str(source.size_bytes), "Expect": "100-continue"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.sock is not None
    refusal = _ask(connection.sock)
    if refusal is not None:
        return refusal
    # A server that gives up halfway closes its side; what it said before is read below, if it still came through.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        for chunk in source.chunks():
            connection.send(chunk)
    response = connection.getresponse()
    return RawAnswer(response.status, response.headers, response.read())


def _ask(sock: socket.socket) -> RawAnswer | None:
    """Wait for leave to send: None is leave, or silence."""
    timeout_s = sock.gettimeout()
    sock.settimeout(_PERMISSION_TIMEOUT_S)
    try:
        # Unbuffered, so that nothing is taken that the final answer's reader needs.
        with sock.makefile("rb", buffering=0) as answer:
            line = _line(answer)
            headers = http.client.parse_headers(_Lines(answer))
            status = line.split()[1:2]
            if not status or not status[0].isdigit():
                raise http.client.BadStatusLine(line.decode("latin-1"))
            if status[0] == b"100":
                return None
            return RawAnswer(int(status[0]), headers, _content(answer, headers))
    except TimeoutError:
        return None
    finally:
        sock.settimeout(timeout_s)


class _Lines:
    """What the header parser needs of a file, over an unbuffered one."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def readline(self, _limit: int = -1) -> bytes:
        return _line(self._raw)


def _line(raw: io.RawIOBase) -> bytes:
    line = raw.readline(65537)
    if not line:
        raise http.client.RemoteDisconnected("the server closed the connection without an answer")
    return line


def _content(raw: io.RawIOBase, headers: http.client.HTTPMessage) -> bytes:
    length = headers.get("Content-Length", "")
    left = min(int(length), _ANSWER_BYTES_MAX) if length.isdigit() else _ANSWER_BYTES_MAX
    content = b""
    while left > 0:
        piece = raw.read(left)
        if not piece:
            break
        content, left = content + piece, left - len(piece)
    return content
