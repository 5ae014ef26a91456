"""An S3 server (moto's), and one in front of it that fails when a test says so."""

import contextlib
import http.client
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server

SERVER = "from moto.server import main; import sys; main(sys.argv[1:])"
START_S = 60.0
BUCKET = "backups"
_HOP_BY_HOP = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})


def free_port(address: str = "127.0.0.1") -> int:
    with create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextlib.contextmanager
def s3_server(address: str = "127.0.0.1") -> Iterator[str]:
    """Run a server with a bucket `backups` at this address, loopback or a lab's; lend its URL."""
    port = free_port(address)
    url = f"http://{address}:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, "-H", address, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        assert server.poll() is None, "the S3 server ended"
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    try:
        until_s = time.monotonic() + START_S
        while not answers():
            assert time.monotonic() < until_s, "the S3 server did not come up"
            time.sleep(0.02)
        yield url
    finally:
        server.terminate()
        server.wait(20)


class Front:
    """Passes requests on to a server, but for those that the test has it refuse, or whose answer it has it lose."""

    def __init__(self, behind: str) -> None:
        self.refuses: Callable[[str, str], bool] = lambda _method, _path: False
        self.loses: Callable[[str, str], bool] = lambda _method, _path: False
        self.refused, self.lost = list[str](), list[str]()
        self._behind = behind.removeprefix("http://")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if front.refuses(self.command, self.path):
                    front.refused.append(self.path)
                    self._answer(503, {}, b"")
                    return
                status, headers, body = front._pass_on(self.command, self.path, dict(self.headers), content)
                if front.loses(self.command, self.path):
                    front.lost.append(self.path)
                    self.close_connection = True
                    return
                self._answer(status, headers, body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                is_head = self.command == "HEAD"
                self.send_header("Content-Length", headers.get("Content-Length", "0") if is_head else str(len(body)))
                self.end_headers()
                if not is_head:
                    self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        return Handler

    def _pass_on(self, method: str, path: str, headers: dict[str, str], content: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._behind, timeout=60)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
            connection.request(method, path, content, kept)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()
