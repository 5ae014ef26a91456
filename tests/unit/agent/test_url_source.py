"""Reading an image from an address that a stranger chose: where it may lead, and what ends it."""

import contextlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.agent.factories import ca_pem, new_fleet_authority
from trimtab_agent.url_source import HEAD_TIMEOUT_S, MAX_REDIRECTS, READ_TIMEOUT_S, judge, read_url
from trimtab_protos.errors import InvalidRequest, PermissionDenied, TrimtabError, Unavailable
from trimtab_protos.messages import UrlSource

LOOPBACK = ("127.0.0.0/8",)
CONTENT = bytes(range(256)) * 10_000
OK = b"HTTP/1.1 200 OK\r\n"


class Web:
    """An https server on loopback under the name images.example; what a path answers is a function."""

    def __init__(self, directory: Path) -> None:
        self.authority = new_fleet_authority()
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self.authority.sign_controller(
            key.public_key(), ["images.example", "other.example"], now=datetime.now(UTC), life=timedelta(hours=1)
        )
        pair = directory / "pair.pem"
        pair.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            + issued.pem.encode()
        )
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                web.answers[self.path](self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.port = self.server.server_address[1]

    def url(self, path: str, host: str = "images.example") -> str:
        return f"https://{host}:{self.port}{path}"

    def source(self, path: str, *, allowed: Sequence[str] = LOOPBACK, host: str = "images.example") -> UrlSource:
        return UrlSource(url=self.url(path, host), allowed_networks=tuple(allowed), ca_pem=ca_pem(self.authority).decode())


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path)
    yield web
    web.server.shutdown()
    web.server.server_close()


def resolves_to(*addresses: str) -> Callable[[str, int], Sequence[str]]:
    return lambda _name, _port: list(addresses)


def plain(content: bytes, *, status: int = 200, announced: int | None = None) -> Callable[..., None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def redirect(target: str) -> Callable[..., None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def read(source: UrlSource, *addresses: str) -> bytes:
    return b"".join(read_url(source, resolver=resolves_to(*(addresses or ("127.0.0.1",)))))


def refusal(source: UrlSource, *addresses: str) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        read(source, *addresses)
    return caught.value


def test_content_is_read_whole_from_an_allowed_network(web: Web) -> None:
    web.answers["/disk"] = plain(CONTENT)
    assert read(web.source("/disk")) == CONTENT


def test_the_size_is_told_before_the_first_block_and_may_be_refused(web: Web) -> None:
    web.answers["/disk"] = redirect("/there")
    web.answers["/there"] = plain(CONTENT)
    told: list[int] = []
    blocks = read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), on_size=told.append)
    next(blocks)
    assert told == [len(CONTENT)]

    def refuse(size_bytes: int) -> None:
        raise InvalidRequest("image-too-large", f"{size_bytes} are too many")

    with pytest.raises(InvalidRequest, match=f"{len(CONTENT)} are too many"):
        next(read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), on_size=refuse))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "2001:0:0:0:0:0:80ff:fffe",
        "not-an-address",
    ],
)
def test_inner_addresses_in_any_clothes_are_refused(address: str) -> None:
    assert not judge(address, [])


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert judge(address, [])


def test_an_inner_address_needs_the_operators_word(web: Web) -> None:
    web.answers["/disk"] = plain(CONTENT)
    error = refusal(web.source("/disk", allowed=()))
    assert (type(error), error.code) == (PermissionDenied, "url-address-refused")
    assert web.asked == []


def test_one_inner_address_among_public_ones_refuses_the_name(web: Web) -> None:
    assert refusal(web.source("/disk", allowed=()), "8.8.8.8", "127.0.0.1").code == "url-address-refused"


def test_a_redirect_is_judged_like_the_first_address(web: Web) -> None:
    web.answers["/disk"] = redirect(web.url("/inner", host="other.example"))
    web.answers["/inner"] = plain(b"secret")

    def resolver(name: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"] if name == "images.example" else ["127.9.9.9"]

    source = web.source("/disk", allowed=("127.0.0.1/32",))
    with pytest.raises(PermissionDenied):
        b"".join(read_url(source, resolver=resolver))
    assert web.asked == ["/disk"]


def test_the_address_that_was_judged_is_the_one_connected_to(web: Web) -> None:
    """A name service that answers differently the second time changes nothing: it is asked once per hop."""
    web.answers["/disk"] = plain(CONTENT)
    answers = [["127.0.0.1"], ["127.9.9.9"]]
    content = b"".join(read_url(web.source("/disk", allowed=("127.0.0.1/32",)), resolver=lambda _n, _p: answers.pop(0)))
    assert content == CONTENT
    assert len(answers) == 1


@pytest.mark.parametrize("target", ["http://images.example/x", "file:///etc/passwd", "gopher://x/", "//\x00", "https://u:p@x/"])
def test_a_redirect_away_from_https_is_refused(web: Web, target: str) -> None:
    web.answers["/disk"] = redirect(target)
    assert isinstance(refusal(web.source("/disk")), InvalidRequest)


def test_redirects_end(web: Web) -> None:
    web.answers["/disk"] = redirect("/disk")
    assert refusal(web.source("/disk")).code == "url-redirects-too-often"
    assert len(web.asked) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "url",
    [
        "http://x/",
        "https://",
        "https://user@x/",
        "https://x y/",
        "https://x/\n",
        "https://x:0/",
        "https://x:99999/",
        "/etc/passwd",
    ],
)
def test_an_address_that_is_no_https_url_is_refused(url: str) -> None:
    assert isinstance(refusal(UrlSource(url=url), "8.8.8.8"), InvalidRequest)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_odd_spellings_of_loopback_are_refused_by_what_they_resolve_to(host: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        b"".join(read_url(UrlSource(url=f"https://{host}/disk")))
    assert caught.value.code in {"url-address-refused", "url-host-unknown"}


def test_a_certificate_for_another_name_is_refused(web: Web) -> None:
    web.answers["/disk"] = plain(CONTENT)
    assert refusal(web.source("/disk", host="wrong.example")).code == "url-certificate-refused"


def test_a_certificate_of_an_unknown_ca_is_refused(web: Web) -> None:
    source = UrlSource(url=web.url("/disk"), allowed_networks=LOOPBACK)
    assert refusal(source).code == "url-certificate-refused"


def test_a_transfer_that_breaks_off_is_not_taken_for_the_whole(web: Web) -> None:
    web.answers["/disk"] = plain(CONTENT[:1000], announced=5000)
    error = refusal(web.source("/disk"))
    assert (type(error), error.code) == (Unavailable, "url-broke-off")


@pytest.mark.parametrize(
    ("status", "kind"), [(404, InvalidRequest), (403, InvalidRequest), (503, Unavailable), (429, Unavailable)]
)
def test_an_error_page_is_not_an_image(web: Web, status: int, kind: type[TrimtabError]) -> None:
    web.answers["/disk"] = plain(b"<html>", status=status)
    assert type(refusal(web.source("/disk"))) is kind


class Clock:
    """A clock that servers move on, so that no test waits; `per_look_s` goes by whenever the reader looks at it."""

    def __init__(self) -> None:
        self.now_s = self.per_look_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.per_look_s
        return self.now_s


@dataclass
class Drip:
    """An answer that goes on for long, one piece each `pace_s`, and then hangs up: who waited for that was held all the time."""

    clock: Clock
    first: bytes
    again: bytes
    pace_s: float = 0.5
    is_begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):  # the client hung up, as it shall
            handler.wfile.write(self.first)
            assert self.is_begun.wait(20)
            for _ in range(2000):
                self.clock.now_s += self.pace_s
                handler.wfile.write(self.again)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"),
        (OK + b"X: ", b"a"),
        (b"HTTP/1.1 200 ", b"a"),
    ],
)
def test_a_server_that_never_ends_its_headers_is_given_up(web: Web, first: bytes, again: bytes) -> None:
    web.answers["/disk"] = drip = Drip(Clock(), first, again)
    drip.is_begun.set()
    with pytest.raises(Unavailable) as caught:
        b"".join(read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), clock_s=drip.clock))
    assert caught.value.code == "url-too-slow"
    assert f"within {HEAD_TIMEOUT_S:.0f} s" in caught.value.message
    assert "`trimtab image import NAME FILE`" in caught.value.message


def test_redirects_share_the_time_that_one_answer_has(web: Web) -> None:
    clock = Clock()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        clock.now_s += HEAD_TIMEOUT_S / 2 + 1
        redirect("/disk")(handler)

    web.answers["/disk"] = slow
    with pytest.raises(Unavailable) as caught:
        b"".join(read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), clock_s=clock))
    assert caught.value.code == "url-too-slow"
    assert len(web.asked) == 2


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (OK + b"\r\nabc", b"x"),
        # Neither a chunk's length nor what follows the last one brings a byte of the body.
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n5;", b"x"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", b"X: y\r\n"),
    ],
)
def test_a_server_that_drips_is_given_up(web: Web, first: bytes, again: bytes) -> None:
    web.answers["/disk"] = drip = Drip(Clock(), first, again)
    blocks = read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), clock_s=drip.clock)
    assert next(blocks) == b"abc"
    drip.is_begun.set()
    with pytest.raises(Unavailable, match=r"sends too slowly: \d+ bytes in") as caught:
        b"".join(blocks)
    assert caught.value.code == "url-too-slow"


def test_a_server_that_says_nothing_is_given_up(web: Web) -> None:
    clock, is_over = Clock(), threading.Event()

    def silent(_handler: http.server.BaseHTTPRequestHandler) -> None:
        clock.per_look_s = READ_TIMEOUT_S / 4
        is_over.wait(20)

    web.answers["/disk"] = silent
    with pytest.raises(Unavailable, match="said nothing for 30 s") as caught:
        b"".join(read_url(web.source("/disk"), resolver=resolves_to("127.0.0.1"), clock_s=clock))
    is_over.set()
    assert caught.value.code == "url-unreachable"


@pytest.mark.parametrize(
    ("given", "code"), [({"allowed_networks": ("nonsense",)}, "network-malformed"), ({"ca_pem": "nonsense"}, "ca-malformed")]
)
def test_a_malformed_setting_is_named(given: dict[str, object], code: str) -> None:
    assert refusal(UrlSource(url="https://x/", **given), "8.8.8.8").code == code  # type: ignore[arg-type]
