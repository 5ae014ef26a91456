"""A small real controller for joins: `GET /v1/join` over HTTPS and the JoinService over gRPC, with a fleet's CA."""

import json
import ssl
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc

from tests.unit.agent.factories import ca_pem, host_credentials, new_fleet_authority
from trimtab_controller.pki import load_certificate, verify_rejoin_proof, verify_signed_by
from trimtab_protos import tls
from trimtab_protos.controller.v1 import join_service_pb2 as pb
from trimtab_protos.controller.v1.join_service_pb2_grpc import JoinServiceServicer, add_JoinServiceServicer_to_server
from trimtab_protos.errors import PermissionDenied

TOKEN = "jt-1.secret"
LIFE = timedelta(hours=1)


class JoinDouble(JoinServiceServicer):
    def __init__(self) -> None:
        self.authority = new_fleet_authority()
        self.host_id = "host-01abc"
        self.refusals: list[str] = []
        self.clock_offset_s = 0.0
        self.life = LIFE
        self.checks: list[pb.CheckJoinRequest] = []
        self.joins: list[pb.JoinRequest] = []
        self._grpc = grpc.server(ThreadPoolExecutor(4), options=tls.server_options())
        add_JoinServiceServicer_to_server(self, self._grpc)
        credentials = host_credentials(self.authority, tls.CONTROLLER_NAME)
        pair = [(credentials.key_pem, credentials.certificate_pem)]
        port = self._grpc.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        self.join_address = f"127.0.0.1:{port}"
        self._grpc.start()
        self._http = self._serve_https(credentials)
        self.url = f"https://127.0.0.1:{self._http.server_address[1]}"

    @property
    def ca_fingerprint(self) -> str:
        return self.authority.fingerprint

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(0).wait()

    def CheckJoin(self, request: pb.CheckJoinRequest, context: Any) -> pb.CheckJoinResponse:
        self.checks.append(request)
        now_ms = int((time.time() + self.clock_offset_s) * 1000)
        return pb.CheckJoinResponse(refusals=self.refusals, controller_unix_ms=now_ms)

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        if request.token != TOKEN:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the token is unknown")
        if request.facts.previous_host_id:
            previous = load_certificate(request.previous_certificate_pem, field="previous_certificate_pem")
            try:
                verify_signed_by([self.authority.certificate], previous)
            except PermissionDenied as error:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
            verify_rejoin_proof(previous, request.rejoin_proof, token=request.token, agent_csr_pem=request.agent_csr_pem)
        self.joins.append(request)
        now = datetime.now(UTC)
        address = request.facts.migration_address
        agent = self.authority.sign_agent(request.agent_csr_pem, self.host_id, now=now, life=self.life)
        libvirt = self.authority.sign_libvirt(request.libvirt_csr_pem, self.host_id, address, now=now, life=self.life)
        return pb.JoinResponse(
            host_id=self.host_id,
            agent_certificate_pem=agent.pem,
            libvirt_certificate_pem=libvirt.pem,
            ca_bundle_pem=ca_pem(self.authority).decode(),
            gateway_addresses=["127.0.0.1:8444"],
        )

    def _serve_https(self, credentials: tls.Credentials) -> ThreadingHTTPServer:
        document = {
            "ca_bundle_pem": ca_pem(self.authority).decode(),
            "join_addresses": [self.join_address],
            "gateway_addresses": ["127.0.0.1:8444"],
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(document).encode() if self.path == "/v1/join" else b"{}"
                self.send_response(200 if self.path == "/v1/join" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "pair.pem"
            path.write_bytes(credentials.key_pem + credentials.certificate_pem)
            context.load_cert_chain(path)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class FakeSystemctl:
    """Units as a fresh Debian has them; remembers what was asked for."""

    def __init__(self) -> None:
        self.words = {
            "libvirtd.socket": "enabled",
            "libvirtd-tls.socket": "disabled",
            "libvirtd.service": "enabled",
            "libvirt-guests.service": "enabled",
        }
        self.active = {"libvirtd.service", "libvirtd.socket", "libvirt-guests.service"}
        self.asked: list[str] = []
        self.fails_once: set[str] = set()

    def enablement(self, unit: str) -> str:
        return self.words.get(unit, "not-found")

    def is_active(self, unit: str) -> bool:
        return unit in self.active

    def set_enablement(self, unit: str, word: str, *, before: str | None = None) -> None:
        self.asked.append(f"{word} {unit}")
        self.words[unit] = word

    def run(self, verb: str, unit: str) -> None:
        from trimtab_protos.errors import Internal

        asked = f"{verb} {unit}".strip()
        self.asked.append(asked)
        if asked in self.fails_once:
            self.fails_once.discard(asked)
            raise Internal("systemctl-failed", f"{asked} failed")
        if verb == "daemon-reload":
            self.words.setdefault("trimtab-agent.service", "disabled")
        elif verb == "stop":
            self.active.discard(unit)
        else:
            self.active.add(unit)
