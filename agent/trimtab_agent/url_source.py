"""Reads an image from an https address that a user gave: the place where a stranger chooses what this host connects to.

Every address that a name resolves to is judged, one that passed is pinned for the connection, and each redirect is judged anew;
so neither a second answer of the name service nor a redirect leads inside. Proxies of the environment are not used: they would
resolve names themselves.

    connect ── handshake ── headers ──redirect──> connect ...          one time for all of it: HEAD_TIMEOUT_S
                               └────── body ── end                      TOTAL_TIMEOUT_S, and a rate

A timeout of the socket counts anew from each byte, and http.client reads interim answers, a chunk's length and trailers without end,
so every wait for the server is cut into looks at the clock and at a cancel (`_Watch`).
"""

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from trimtab_protos.errors import Conflict, InvalidRequest, PermissionDenied, Unavailable
from trimtab_protos.messages import UrlSource

BLOCK_BYTES = 1 << 20
MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 30.0
"""How long a server may say nothing."""
HEAD_TIMEOUT_S = 60.0
"""From the first connection to the last header; the next redirect does not begin it anew."""
TOTAL_TIMEOUT_S = 6 * 3600.0
MIN_RATE_BYTES_S = 10 * 1024
RATE_JUDGED_AFTER_S = 60.0
"""A server that drips bytes would hold one of the host's two import slots for hours."""
MAX_URL_LENGTH = 2000
_LOOK_EVERY_S = 0.2

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Sequence[str]]
T = TypeVar("T")
if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def resolve(name: str, port: int) -> Sequence[str]:
    """Return every address of a name."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise Unavailable("url-host-unknown", f"the name {name} cannot be resolved: {error}", host=name) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def read_url(
    source: UrlSource,
    *,
    resolver: Resolver = resolve,
    clock_s: Callable[[], float] = time.monotonic,
    cancelled: threading.Event | None = None,
    on_size: Callable[[int], None] = lambda _size_bytes: None,
) -> Iterator[bytes]:
    """Yield the content in blocks; ends with an error of the ten kinds. `on_size` is told a Content-Length before the first.

    Conflict(job-cancelled) soon after `cancelled` was set, wherever it stands; only a name that is being resolved, and a connection
    that is not there yet (CONNECT_TIMEOUT_S), are waited for.
    """
    watch = _Watch(clock_s, cancelled or threading.Event())
    allowed = _networks(source.allowed_networks)
    context = _tls_context(source.ca_pem)
    url = source.url
    for _hop in range(MAX_REDIRECTS + 1):
        connection, response = _request(_checked(url), watch, allowed=allowed, context=context, resolver=resolver)
        with connection:
            if response.status in {301, 302, 303, 307, 308}:
                target = response.getheader("Location") or ""
                url = urljoin(url, target)
                continue
            if response.status != 200:
                raise _refused_status(response.status)
            if response.length is not None:
                on_size(response.length)
            yield from _blocks(response, watch)
            return
    raise InvalidRequest("url-redirects-too-often", f"the address redirects more than {MAX_REDIRECTS} times", field="url")


def judge(address_text: str, allowed: Sequence[Network]) -> bool:
    """Tell whether this host may connect to the address: public, or in a network that the operator allowed."""
    try:
        address: Address = ipaddress.ip_address(address_text.partition("%")[0])
    except ValueError:
        return False
    if any(address.version == network.version and address in network for network in allowed):
        return True
    inner = _inner(address)
    if inner is not None:
        # An IPv4 address in IPv6 clothes is judged as what it leads to, and never by the clothes.
        return judge(str(inner), allowed)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address in _NAT64 or address in _NAT64_LOCAL:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.teredo is not None:
        return address.teredo[1]
    if int(address) >> 32 == 0 and int(address) > 1:  # ::a.b.c.d, deprecated and still routed by some
        return ipaddress.IPv4Address(int(address))
    return address.ipv4_mapped or address.sixtofour


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest("url-malformed", "the address cannot be parsed", field="url") from error
    if parts.scheme != "https":
        raise InvalidRequest("url-not-https", "only https addresses are read, as in https://example.org/disk.qcow2", field="url")
    if len(url) > MAX_URL_LENGTH or not parts.hostname or parts.username is not None or port == 0:
        raise InvalidRequest("url-malformed", "the address needs a host and no user name", field="url")
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise InvalidRequest("url-malformed", "the address has a blank or a control character", field="url")
    return parts


def _request(
    parts: SplitResult, watch: "_Watch", *, allowed: Sequence[Network], context: ssl.SSLContext, resolver: Resolver
) -> tuple[ssl.SSLSocket, http.client.HTTPResponse]:
    """Return the connection, which the caller closes, and the answer as far as its headers."""
    host, port = parts.hostname or "", parts.port or 443
    pinned = _pin(host, port, allowed=allowed, resolver=resolver)
    watch.look()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        with contextlib.ExitStack() as opened:
            timeout_s = min(CONNECT_TIMEOUT_S, max(_LOOK_EVERY_S, watch.left_of_head_s))  # none is negative
            plain = opened.enter_context(socket.create_connection((pinned, port), timeout=timeout_s))
            # The address was judged; the certificate is still checked for the name.
            tls = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            opened.enter_context(tls)
            tls.settimeout(_LOOK_EVERY_S)
            _patiently(watch, tls.do_handshake)
            connection = http.client.HTTPSConnection(host, port, context=context)
            connection.sock = cast(socket.socket, _Line(tls, watch))
            connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "trimtab-agent"})
            response = connection.getresponse()
            opened.pop_all()
            return tls, response
    except ssl.SSLCertVerificationError as error:
        raise InvalidRequest(
            "url-certificate-refused", f"the certificate of {host} is not trusted: {error}", host=host
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable("url-unreachable", f"{host} cannot be read: {error}", host=host) from error


def _pin(host: str, port: int, *, allowed: Sequence[Network], resolver: Resolver) -> str:
    addresses = resolver(host, port)
    refused = [address for address in addresses if not judge(address, allowed)]
    if refused or not addresses:
        # All or nothing: a name with one inner address among public ones is an attack or a mistake.
        raise PermissionDenied(
            "url-address-refused",
            f"{host} leads to an address that images may not be read from; the operator may allow its network",
            host=host,
        )
    return addresses[0]


class _Watch:
    """Ends a read that was cancelled or takes too long."""

    def __init__(self, clock_s: Callable[[], float], cancelled: threading.Event) -> None:
        self.clock_s = clock_s
        self._cancelled = cancelled
        self._began_s = clock_s()
        self._has_head = False
        self.done_bytes = 0
        """Of the body."""

    @property
    def left_of_head_s(self) -> float:
        return self._began_s + HEAD_TIMEOUT_S - self.clock_s()

    def begin_body(self) -> None:
        self._began_s, self._has_head = self.clock_s(), True

    def look(self) -> None:
        if self._cancelled.is_set():
            raise Conflict("job-cancelled", "the transfer was cancelled")
        spent_s = self.clock_s() - self._began_s
        if not self._has_head:
            if spent_s >= HEAD_TIMEOUT_S:
                raise _too_slow(f"no answer was whole within {HEAD_TIMEOUT_S:.0f} s, redirects among them")
        elif spent_s > TOTAL_TIMEOUT_S or (spent_s > RATE_JUDGED_AFTER_S and self.done_bytes / spent_s < MIN_RATE_BYTES_S):
            raise _too_slow(f"{self.done_bytes} bytes in {spent_s:.0f} s")


def _too_slow(why: str) -> Unavailable:
    return Unavailable(
        "url-too-slow",
        f"the server sends too slowly: {why}; import it again, or fetch the file elsewhere and send it: `trimtab image import NAME FILE`",
    )


def _patiently(watch: _Watch, call: Callable[[], T]) -> T:
    """Repeat a call on a socket that waits for `_LOOK_EVERY_S` at most; TimeoutError where nothing comes for long."""
    began_s = watch.clock_s()
    while True:
        watch.look()
        try:
            return call()
        except TimeoutError:
            if watch.clock_s() - began_s > READ_TIMEOUT_S:
                raise TimeoutError(f"it said nothing for {READ_TIMEOUT_S:.0f} s") from None


class _Line:
    """What http.client needs of a socket. It does not close the connection: who opened it does."""

    def __init__(self, tls: ssl.SSLSocket, watch: _Watch) -> None:
        self._tls = tls
        self._watch = watch

    def sendall(self, content: bytes) -> None:
        self._tls.sendall(content)  # waits for nobody: a request is smaller than what the kernel takes at once

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self._tls, self._watch))

    def close(self) -> None:
        pass


class _Incoming(io.RawIOBase):
    def __init__(self, tls: ssl.SSLSocket, watch: _Watch) -> None:
        super().__init__()
        self._tls = tls
        self._watch = watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        return _patiently(self._watch, lambda: self._tls.recv_into(buffer))


def _blocks(response: http.client.HTTPResponse, watch: _Watch) -> Iterator[bytes]:
    watch.begin_body()
    while True:
        try:
            # read1: what is there now, so that a dripping server is judged and a cancel is seen.
            block = response.read1(BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable("url-broke-off", f"the download broke off after {watch.done_bytes} bytes: {error}") from error
        if not block:
            break
        watch.done_bytes += len(block)
        yield block
    if response.length:  # what Content-Length promised and did not come
        raise Unavailable("url-broke-off", f"the download broke off after {watch.done_bytes} bytes")


def _networks(texts: Sequence[str]) -> list[Network]:
    try:
        return [ipaddress.ip_network(text) for text in texts]
    except ValueError as error:
        raise InvalidRequest("network-malformed", f"allowed_networks: {error}", field="allowed_networks") from error


def _tls_context(ca_pem: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_pem:
        try:
            context.load_verify_locations(cadata=ca_pem)
        except ssl.SSLError as error:
            raise InvalidRequest("ca-malformed", "ca_pem is no certificate in PEM", field="ca_pem") from error
    return context


def _refused_status(status: int) -> Exception:
    if status in {408, 425, 429, 500, 502, 503, 504}:
        return Unavailable("url-answered-with-error", f"the server answered with HTTP status {status}", status=status)
    return InvalidRequest("url-answered-with-error", f"the server answered with HTTP status {status}", status=status)
