"""A controller made of canned answers behind a real HTTPS server: what the CLI talks to in these tests."""

import json
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "tt-0123456789.secret"


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    connection: int

    @property
    def document(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    document: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    # Instead of a document: pieces of a stream that ends with the connection.
    pieces: Sequence[bytes] | None = None
    # The answer is sent before the body is read, and the connection closed.
    is_early: bool = False
    # The connection is closed without an answer.
    is_dropped: bool = False


Reply = Answer | Callable[[Seen], Answer]


def problem(status: int, code: str, kind: str, detail: str, **context: str) -> Answer:
    """Return a refusal as the API words it."""
    document = {
        "type": f"urn:trimtab:error:{code}",
        "title": "refused",
        "status": status,
        "detail": detail,
        "code": code,
        "kind": kind,
        "context": context,
        "request_id": "req-0f1e2d",
        "errors": [],
    }
    return Answer(document, status=status, headers={"Content-Type": "application/problem+json"})


class FakeController:
    def __init__(self, certificate: Path) -> None:
        self.seen: list[Seen] = []
        self._replies: dict[tuple[str, str], list[Reply]] = {}
        fake = self

        class Handler(_Handler):
            controller = fake

        self._server = _Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake belongs to the connection's thread: a client that never speaks must not stop the accept loop.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._server.server_address[1]}"

    def on(self, method: str, path: str, *replies: Reply) -> None:
        """Answer a path with these in turn; the last one stays."""
        self._replies[(method, path)] = list(replies)

    def reply(self, seen: Seen) -> Answer:
        self.seen.append(seen)
        replies = self._replies.get((seen.method, seen.path))
        if not replies:
            return problem(404, "route-not-found", "not_found", f"no reply was prepared for {seen.method} {seen.path}")
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        return reply if isinstance(reply, Answer) else reply(seen)

    def asked(self, method: str, path: str) -> list[Seen]:
        return [one for one in self.seen if (one.method, one.path) == (method, path)]

    def answers_early(self, method: str, path: str) -> bool:
        return any(isinstance(one, Answer) and one.is_early for one in self._replies.get((method, path), []))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that refuse the certificate or leave in the middle are what some tests are about; the rest is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    controller: FakeController
    protocol_version = "HTTP/1.1"
    timeout = 20

    def handle_expect_100(self) -> bool:
        if self.controller.answers_early(self.command, urlsplit(self.path).path):
            self._serve()
            return False
        return super().handle_expect_100()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        place = (self.command, parts.path, dict(parse_qsl(parts.query)), headers)
        is_early = self.controller.answers_early(self.command, parts.path)
        body = b"" if is_early else self.rfile.read(length)
        answer = self.controller.reply(Seen(*place, body=body, connection=id(self.connection)))
        if answer.is_dropped:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"X-Request-Id": "req-0f1e2d", **answer.headers}.items():
            self.send_header(name, value)
        if answer.pieces is not None:
            self._stream(answer.pieces)
            return
        content = b"" if answer.document is None else json.dumps(answer.document).encode()
        if isinstance(answer.document, str):
            content = answer.document.encode()
        self.send_header("Content-Length", str(len(content)))
        if is_early:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, pieces: Sequence[bytes]) -> None:
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
        self.close_connection = True

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `seen` instead."""


def page(*items: Mapping[str, Any], token: str = "") -> Answer:
    return Answer({"next_page_token": token, "items": list(items)})


def operation(state: str = "done", **fields: Any) -> dict[str, Any]:
    """Return an operation as the API shows it."""
    return {
        "id": "op-01",
        "kind": "vm.create",
        "project": "default",
        "subject": {"id": "vm-01", "name": "web1"},
        "state": state,
        "done": state in {"done", "failed", "cancelled", "needs_attention"},
        "step": "",
        "waiting_for": "",
        "is_cancel_requested": False,
        "attempts": 0,
        "progress": None,
        "error": None,
        "result": None,
        "actor": "ann",
        "request_id": "req-0f1e2d",
        "created_at": "2026-11-20T02:00:00+00:00",
        "updated_at": "2026-11-20T02:00:03+00:00",
        "ended_at": "2026-11-20T02:00:03+00:00",
        "steps": [],
        **fields,
    }


def vm(name: str = "web1", *, state: str = "running", age_s: float | None = 3.2, **fields: Any) -> dict[str, Any]:
    """Return a vm as the API shows it."""
    return {
        "id": f"vm-{name}",
        "name": name,
        "project": "default",
        "labels": {"tier": "web"},
        "desired": {"power": "running"},
        "observed": {"state": state, "reason": "", "host": "node1", "at": None, "age_s": age_s, "addresses": ["10.0.0.5"]},
        "host": "node1",
        "epoch": 1,
        "shape": {
            "vcpus": 2,
            "vcpus_max": 4,
            "memory_mib": 2048,
            "memory_max_mib": 2048,
            "arch": "x86_64",
            "machine": "pc-q35-7.2",
            "cpu_model": "Skylake-Server-v4",
            "firmware": "bios",
        },
        "host_selector": {},
        "host_class": "",
        "volumes": [{"id": "vol-01", "name": f"{name}-0", "pool": "local", "size_bytes": 20 << 30, "index": 0}],
        "nics": [{"id": "nic-01", "network": "default", "mac": "52:54:00:00:00:01", "addresses": ["10.0.0.5/24"], "index": 0}],
        "image": "debian",
        "problem": "",
        "operation": None,
        "deleted_at": None,
        "purge_after": None,
        "version": 1,
        "etag": '"1"',
        "created_at": "2026-11-20T02:00:00+00:00",
        **fields,
    }


def host(name: str = "node1", **fields: Any) -> dict[str, Any]:
    """Return a host as the API shows it."""
    return {
        "id": f"host-{name}",
        "name": name,
        "host_class": "default",
        "labels": {"rack": "r2"},
        "is_cordoned": False,
        "maintenance": None,
        "connectivity": "up",
        "connectivity_at": "2026-11-20T02:00:00+00:00",
        "troubles": [],
        "heard_at": "2026-11-20T02:00:00+00:00",
        "heard_age_s": 1.4,
        "agent_address": "10.1.0.1:9443",
        "migration_address": "10.1.0.1",
        "vcpus": {"limit": 16, "claimed": 6, "unmanaged": 2, "free": 8},
        "memory_mib": {"limit": 4096, "claimed": 1024, "unmanaged": 0, "free": 3072},
        "vms": 3,
        "vms_running": 2,
        "certificates": [{"purpose": "agent", "serial": "0a", "not_after": "2199-01-01T00:00:00+00:00"}],
        "pools": [{"pool": "local", "state": "ready", "problem": "", "observed_at": None}],
        "inventory": {
            "hostname": name,
            "arch": "x86_64",
            "kernel": "6.1.0",
            "agent_version": "0.1.0",
            "libvirt_version": "9.0.0",
            "qemu_version": "7.2.0",
            "accelerator": "tcg",
            "cpu_vendor": "GenuineIntel",
            "cpu_model": "Skylake-Server",
            "usable_cpu_models": ["qemu64"],
            "cpus": 4,
            "memory_mib": 8192,
            "machines": ["pc-q35-7.2"],
            "has_uefi": True,
            "numa_cells": [],
            "pci_devices": [],
            "bridges": [{"name": "br0", "mtu": 1500, "has_carrier": True, "is_ours": False}],
        },
        "inventory_at": "2026-11-20T02:00:00+00:00",
        "version": 1,
        "etag": '"1"',
        "created_at": "2026-11-20T02:00:00+00:00",
        **fields,
    }


def decision(**fields: Any) -> dict[str, Any]:
    """Return an explanation: node2 chosen, node1 fitting too, node3 refused for two reasons."""
    refusals = [
        {"filter": "memory", "code": "memory-short", "message": "needs 2048 MiB, 512 MiB free", "context": {}},
        {"filter": "cordon", "code": "host-cordoned", "message": "the host is cordoned", "context": {}},
    ]
    return {
        "vm": "web1",
        "host": "node2",
        "policy": "best-fit",
        "decided_at": "2026-11-20T02:00:00+00:00",
        "fleet_revision": 812,
        "summary": "node2 leaves the least memory over; 2 of 3 hosts fit",
        "verdicts": [
            {"host": "node2", "fits": True, "score": 0.82, "scores": {"best-fit": 0.82}, "reasons": []},
            {"host": "node1", "fits": True, "score": 0.41, "scores": {"best-fit": 0.41}, "reasons": []},
            {"host": "node3", "fits": False, "score": None, "scores": {}, "reasons": refusals},
        ],
        "host_count": 3,
        "fit_count": 2,
        "refused_by": {"memory": 1},
        "why_not": "",
        **fields,
    }
