"""HTTP/1.1 by httptools, which parses a request in a tenth of h11's time, with the bound on a request's head that h11 has of itself."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_MAX_BYTES = 64 << 10
"""Of request line and headers that have not ended yet; nobody has shown a token by then, so nobody may fill our memory."""


class BoundedHead(HttpToolsProtocol):
    """One connection; a head that does not end in time is answered 400, and the connection closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_head_open = True
        self._open_bytes = 0

    def on_message_begin(self) -> None:
        self._is_head_open, self._open_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_head_open = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_head_open or self.transport.is_closing():
            return
        self._open_bytes += len(data)
        if self._open_bytes > HEAD_MAX_BYTES:
            self.send_400_response(f"The head of the request: at most {HEAD_MAX_BYTES} bytes.")
