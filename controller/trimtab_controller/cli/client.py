"""The API over one kept-alive HTTPS connection, by the standard library: an HTTP package would double the CLI's start.

Every mutation carries an idempotency key, so that sending it again (a connection that the server closed while idle, a controller
that asks to come back later) never does it twice. This is the only place that retries; what it cannot know it reports as unknown.
"""

import http.client
import json
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeAlias
from urllib.parse import urlencode, urlsplit

from trimtab_controller.cli.errors import CommandFailed, from_problem, usage
from trimtab_controller.cli.paths import Query
from trimtab_controller.cli.sse import ServerEvent, parse

READ_TIMEOUT_S = 30.0
# Three of the server's heartbeats (15 s): a silent stream is a broken one.
STREAM_TIMEOUT_S = 45.0
UPLOAD_TIMEOUT_S = 120.0
# Longer waits are the user's to decide.
_LONGEST_RETRY_AFTER_S = 5.0
_BUSY_TRIES = 3
# One that was a long time coming tells of something behind the server, as a host that is cut off; asking again only adds to the wait.
_BUSY_SAID_WITHIN_S = 1.0
_PAGE_SIZE = 1000

_TOKEN_FIRST = re.compile(rb'\{"next_page_token": ?"([^"\\]+)",')

Answer: TypeAlias = tuple[int, http.client.HTTPMessage, bytes]
"""Status, headers and content."""


class Client:
    """Not for use by several threads."""

    def __init__(
        self,
        url: str,
        *,
        token: str,
        ca_path: str = "",
        timeout_s: float = READ_TIMEOUT_S,
        busy_said_within_s: float = _BUSY_SAID_WITHIN_S,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise usage(f"url: {url!r} is no https address; give one as https://controller.example:8443", code="url-invalid")
        try:
            self._port = parts.port or 8443
        except ValueError as error:
            raise usage(f"url: {url!r}: {error}; give one as https://controller.example:8443", code="url-invalid") from error
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")
        self._token = token
        self._ca_path = ca_path
        self._timeout_s = timeout_s
        self._busy_said_within_s = busy_said_within_s
        self._tls: ssl.SSLContext | None = None
        self._connection: http.client.HTTPSConnection | None = None
        self.url = url
        self.last_request_id = ""

    def get(self, path: str, query: Query | None = None, *, timeout_s: float | None = None) -> Any:
        return self._exchange("GET", path, query=query, body=None, key="", timeout_s=timeout_s)

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        request_id: str = "",
        if_match: str = "",
    ) -> Any:
        """Send a mutation; with `request_id` of an earlier one the server answers what it answered then."""
        key = request_id or _new_key()
        return self._exchange(method, path, query=query, body=body, key=key, if_match=if_match)

    def pages(self, path: str, query: Query | None = None, *, limit: int | None = None) -> Iterator[Any]:
        """Yield the items of a list, page by page, `limit` at most.

        The next page is asked for before this one is taken apart: until the end the client is for nothing else.
        """
        left, headers = sys.maxsize if limit is None else limit, self._headers({})

        def target_of(token: str, left: int) -> str:
            return self._target(path, {**(query or {}), "page_size": min(_PAGE_SIZE, left), "page_token": token or None})

        answer = self._ask("GET", target_of("", left), None, headers, None) if left > 0 else None
        while answer is not None:
            token, rest = _token_within(answer), left - _PAGE_SIZE
            following = target_of(token, rest) if token and rest > 0 else ""
            is_asked = bool(following) and self._ask_ahead(following, headers)
            try:
                document = self._judge(*answer)
                items = document.get("items", [])[:left]
                yield from items
                left, token = left - len(items), document.get("next_page_token") or ""
                if is_asked:
                    answer, is_asked = self._answer_ahead(), False
                else:
                    answer = None
            finally:
                if is_asked:
                    self.close()  # nobody waits for what was asked
            if answer is None and token and left > 0:
                answer = self._ask("GET", target_of(token, left), None, headers, None)

    def _ask_ahead(self, target: str, headers: dict[str, str]) -> bool:
        """Send a request whose answer is read later; tell whether it went out."""
        try:
            self._connect(self._timeout_s).request("GET", target, headers=headers)
        except (OSError, http.client.HTTPException):
            self.close()
            return False
        return True

    def _answer_ahead(self) -> Answer | None:
        """Return what came for it; None where it must be asked again."""
        assert self._connection is not None
        try:
            answer = _read(self._connection)
        except (OSError, http.client.HTTPException):
            self.close()
            return None
        return answer if _retry_after_s(answer[0], answer[1]) is None else None

    def upload(
        self,
        path: str,
        source: IO[bytes],
        *,
        size_bytes: int,
        query: Query | None = None,
        sha256: str = "",
        on_progress: Callable[[int], None],
    ) -> Any:
        """Stream `source` as it is read and return the server's answer, after checking that both sides saw the same bytes."""
        from trimtab_controller.cli import uploading

        headers = self._headers({"Content-Type": "application/octet-stream", "X-Content-SHA256": sha256})
        headers["Idempotency-Key"] = _new_key()
        content = uploading.Source(source, size_bytes, on_progress)
        # A connection of its own: one that was idle might break in the middle, and this is nothing to send twice.
        self.close()
        try:
            answered = uploading.post(self._connect(UPLOAD_TIMEOUT_S), self._target(path, query), headers, content)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error, "POST", key="") from error
        finally:
            self.close()
        answer = self._judge(answered.status, answered.headers, answered.content)
        received = str(answer.get("sha256", "")) if isinstance(answer, dict) else ""
        if received and received != content.sha256:
            raise CommandFailed(
                f"the upload was changed on its way: sent sha256 {content.sha256}, received {received}; import it again",
                code="upload-corrupted",
                request_id=self.last_request_id,
            )
        return answer

    def stream(self, path: str, query: Query | None = None, *, last_event_id: str = "") -> Iterator[ServerEvent]:
        """Yield a server-sent stream's events until it breaks (ConnectionError); an old position raises `events-expired`."""
        headers = self._headers({"Accept": "text/event-stream", "Cache-Control": "no-store", "Last-Event-ID": last_event_id})
        connection: http.client.HTTPSConnection | None = None
        try:
            connection = self._open(STREAM_TIMEOUT_S)
            connection.request("GET", self._target(path, query), headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                self._judge(response.status, response.headers, response.read())
            yield from parse(response)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error, "GET", key="") from error
        finally:
            if connection is not None:
                connection.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        query: Query | None,
        body: Mapping[str, Any] | None,
        key: str,
        if_match: str = "",
        timeout_s: float | None = None,
    ) -> Any:
        headers = self._headers({"Idempotency-Key": key, "If-Match": if_match})
        payload = None
        if body is not None:
            payload = json.dumps(body, ensure_ascii=False).encode("utf-8")
            headers["Content-Type"] = "application/json"
        return self._judge(*self._ask(method, self._target(path, query), payload, headers, timeout_s))

    def _ask(self, method: str, target: str, payload: bytes | None, headers: dict[str, str], timeout_s: float | None) -> Answer:
        """Return what is answered, after some tries where the server says that it is busy."""
        for left in reversed(range(_BUSY_TRIES)):
            asked_s = time.monotonic()
            status, answer_headers, content = self._once(method, target, payload, headers, timeout_s)
            pause_s = _retry_after_s(status, answer_headers)
            if pause_s is None or not left or time.monotonic() - asked_s > self._busy_said_within_s:
                return status, answer_headers, content
            time.sleep(pause_s)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, method: str, target: str, payload: bytes | None, headers: dict[str, str], timeout_s: float | None) -> Answer:
        was_open = self._connection is not None
        try:
            connection = self._connect(timeout_s or self._timeout_s)
            try:
                connection.request(method, target, body=payload, headers=headers)
                return _read(connection)
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError):
                if not was_open:
                    raise
            # The server closed an idle connection; the key makes sending again safe.
            self.close()
            connection = self._connect(timeout_s or self._timeout_s)
            connection.request(method, target, body=payload, headers=headers)
            return _read(connection)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._failure(error, method, key=headers.get("Idempotency-Key", "")) from error

    def _connect(self, timeout_s: float) -> http.client.HTTPSConnection:
        if self._connection is None:
            self._connection = self._open(timeout_s)
        self._connection.timeout = timeout_s
        if self._connection.sock is not None:
            self._connection.sock.settimeout(timeout_s)
        return self._connection

    def _open(self, timeout_s: float) -> http.client.HTTPSConnection:
        if self._tls is None:
            try:
                self._tls = ssl.create_default_context(cafile=self._ca_path or None)
            except (OSError, ssl.SSLError) as error:
                raise usage(
                    f"ca: cannot read certificates from {self._ca_path!r}: {error}; give the fleet's CA in PEM form",
                    code="ca-unreadable",
                ) from error
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        try:
            connection.connect()
        except OSError:
            connection.close()
            raise
        if connection.sock is not None:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _headers(self, extra: Mapping[str, str]) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "trimtab-cli"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        headers.update({name: value for name, value in extra.items() if value})
        return headers

    def _target(self, path: str, query: Query | None) -> str:
        given = {name: _as_text(value) for name, value in (query or {}).items() if value is not None}
        return f"{self._prefix}{path}" + (f"?{urlencode(given)}" if given else "")

    def _judge(self, status: int, headers: http.client.HTTPMessage, content: bytes) -> Any:
        self.last_request_id = headers.get("X-Request-Id", "")
        document = _decoded(content)
        if status < 400:
            if document is None and content.strip():
                raise CommandFailed(
                    f"{self.url} answered something that is not JSON; is this the address of a Trimtab controller?",
                    code="answer-not-json",
                )
            return document
        raise from_problem(status, document, request_id=self.last_request_id)

    def _failure(self, error: OSError | http.client.HTTPException, method: str, *, key: str) -> CommandFailed:
        address = f"{self._host}:{self._port}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return CommandFailed(
                f"the certificate of {address} cannot be trusted: {error.verify_message}",
                code="certificate-untrusted",
                kind="unauthenticated",
                hint=f"trimtab login --url {self.url} --ca FILE --token-stdin",
            )
        if isinstance(error, TimeoutError):
            again = f"; repeat it with --request-id {key} to learn the outcome, it is never done twice" if key else ""
            unknown = "whether it was done is unknown" if method != "GET" else "try again"
            return CommandFailed(
                f"{address} did not answer in time; {unknown}{again}", code="no-answer-in-time", kind="deadline_exceeded"
            )
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return CommandFailed(
            f"the controller at {address} cannot be reached: {cause}", code="controller-unreachable", kind="unavailable"
        )


def _new_key() -> str:
    import uuid

    return str(uuid.uuid4())


def _read(connection: http.client.HTTPSConnection) -> tuple[int, http.client.HTTPMessage, bytes]:
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def _token_within(answer: Answer) -> str:
    """Return the token of the next page where it stands first, as our servers write it; '' where the page must be read for it."""
    status, _headers, content = answer
    found = _TOKEN_FIRST.match(content) if status == http.client.OK else None
    return found[1].decode() if found else ""


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content) if content.strip() else None
    except ValueError:
        return None


def _as_text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _retry_after_s(status: int, headers: http.client.HTTPMessage) -> float | None:
    """Return the pause that the server asks for, or None where the answer stands."""
    if status not in {429, 503}:
        return None
    try:
        pause_s = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return pause_s if 0 <= pause_s <= _LONGEST_RETRY_AFTER_S else None
