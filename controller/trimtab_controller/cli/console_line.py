"""One session at a console: a token from the API, and the websocket that it opens.

The websockets of all sessions live in one event loop in a thread of its own. Two threads at one TLS connection, as the blocking
client of `websockets` has them, are one too many: OpenSSL's objects are for one thread at a time, and one connection in some 150
never finished its handshake (measured with Python 3.11, where nothing locks them).
"""

import json
import ssl
import threading
from collections.abc import Coroutine, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from trimtab_controller.cli.errors import CommandFailed, from_problem
from trimtab_controller.cli.session import Session

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from websockets.asyncio.client import ClientConnection

T = TypeVar("T")
OPEN_TIMEOUT_S = 30.0
# What a controller closes with when the session was ended for a reason, `CODE: sentence`.
_ENDED_CODE = 4000


class ConsoleLine:
    """An open session; one thread may read while another one writes."""

    def __init__(self, socket: "ClientConnection") -> None:
        self._socket = socket
        self._was_left = False

    def pieces(self) -> Iterator[bytes]:
        """Yield what the console says until the session is over. CommandFailed with the controller's word where it was ended."""
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                yield _bytes(_wait_for(self._socket.recv()))
        except ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (0, "")
            if code == _ENDED_CODE:
                name, _, sentence = reason.partition(": ")
                raise CommandFailed(
                    sentence or "the session was ended", code=name or "session-ended", kind="conflict"
                ) from closed
            if not self._was_left and code != 1000:
                raise CommandFailed(
                    "the connection to the controller was lost; open the console again",
                    code="connection-lost",
                    kind="unavailable",
                ) from closed

    def write(self, content: bytes) -> None:
        """Send bytes; those of a session that is over are dropped, since its reader tells why."""
        from websockets.exceptions import ConnectionClosed

        try:
            _wait_for(self._socket.send(content))
        except ConnectionClosed:
            return

    def close(self) -> None:
        self._was_left = True
        _wait_for(self._socket.close())


def open_line(session: Session, vm_path: str, kind: str) -> ConsoleLine:
    """Return an open session at the console of the vm at `vm_path`; refusals are the API's own."""
    from websockets.exceptions import InvalidHandshake, InvalidStatus

    ticket: dict[str, Any] = session.client.send("POST", f"{vm_path}:console", {"kind": kind})
    parts = urlsplit(session.context.url)
    tls = ssl.create_default_context(cafile=session.context.ca or None)
    uri = f"wss://{parts.hostname}:{parts.port or 8443}{parts.path.rstrip('/')}{ticket['path']}"
    try:
        socket = _wait_for(_connect(uri, tls, [ticket["subprotocol"], ticket["token"]]))
    except InvalidStatus as refused:
        raise from_problem(refused.response.status_code, _document(refused.response.body), request_id="") from refused
    except (OSError, InvalidHandshake) as error:
        raise CommandFailed(
            f"the controller does not open the console: {error}", code="console-unreachable", kind="unavailable"
        ) from error
    return ConsoleLine(socket)


async def _connect(uri: str, tls: ssl.SSLContext, protocols: Sequence[str]) -> "ClientConnection":
    from websockets.asyncio.client import connect
    from websockets.typing import Subprotocol

    return await connect(
        uri,
        ssl=tls,
        subprotocols=[Subprotocol(one) for one in protocols],
        compression=None,
        proxy=None,
        open_timeout=OPEN_TIMEOUT_S,
        max_size=None,
    )


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run_coroutine_threadsafe(work, _loop()).result()


@cache
def _loop() -> "AbstractEventLoop":
    """Return the loop of all sessions; it ends with the program."""
    import asyncio

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="consoles", daemon=True).start()
    return loop


def _bytes(message: str | bytes) -> bytes:
    return message.encode() if isinstance(message, str) else bytes(message)


def _document(body: bytes | bytearray | None) -> Any:
    try:
        return json.loads(body or b"")
    except ValueError:
        return None
