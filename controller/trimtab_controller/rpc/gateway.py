"""The GatewayService: sessions of hosts, renewal of their certificates, and uploads that they import.

Everything of one gateway lives in one event loop; SQL runs in threads of its own (group commits, our granting right, reads), so
that neither a slow disk nor a long write ever delays the acknowledgement of a heartbeat.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.config import Settings
from trimtab_controller.pki import FleetPki
from trimtab_controller.rpc.committer import GroupCommitter
from trimtab_controller.rpc.granting import GrantingRight
from trimtab_controller.rpc.host_states import HostState
from trimtab_controller.rpc.peers import Peer, peer_of, typed_errors
from trimtab_controller.rpc.sessions import PROGRESS_EVERY_S, Budget, HostSession, StreamBroken, pool_of, superseded, welcome_of
from trimtab_controller.services import sessions, uploads
from trimtab_controller.services.hosts import SignedPair, sign_pair
from trimtab_controller.services.sessions import Opened
from trimtab_controller.store import hosts
from trimtab_controller.store.database import Database
from trimtab_controller.store.host_reports import PoolReport
from trimtab_protos.agent.v1 import storage_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.controller.v1 import gateway_service_pb2_grpc as pb_grpc
from trimtab_protos.errors import InvalidRequest, NotFound, TrimtabError

log = structlog.get_logger(__name__)

UPLOAD_CHUNK_BYTES = 1 << 20
UPLOAD_ID = re.compile(r"up-[0-9a-z]{26}")
POOLS_EVERY_S = 10.0
OPENINGS_PER_S = 0.5
OPENINGS_BURST = 20.0


class Gateway:
    """What the sessions share: who is connected, what is known of them, and what is to be written of it."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        clock: Clock,
        pki: FleetPki,
        *,
        gateway_id: str,
        nudge: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.database = database
        self.clock = clock
        self.pki = pki
        self.gateway_id = gateway_id
        self.nudge = nudge
        self.committer = GroupCommitter(database)
        self.right = GrantingRight(
            database, clock, gateway_id=gateway_id, address=settings.gateway_addresses[0], ttl_s=settings.lease_ttl_s
        )
        self.states: dict[str, HostState] = {}
        self.sessions: dict[str, HostSession] = {}
        self.changed: set[str] = set()
        self.database_mark = 0
        """As last read, at most seconds old; hosts remember the highest that they are told."""
        self.pool_reports: dict[tuple[str, str], PoolReport] = {}
        self._pools_written: dict[tuple[str, str], tuple[float, tuple[bool, str]]] = {}
        self._openings: dict[str, Budget] = {}
        self._progress_written: dict[str, float] = {}

    # --- sessions ----------------------------------------------------------------------------------------------------------

    def may_open(self, host_id: str) -> bool:
        """Tell whether the host may open another session now: each costs a durable commit that others wait for."""
        budget = self._openings.get(host_id)
        if budget is None:
            budget = self._openings[host_id] = Budget(OPENINGS_PER_S, OPENINGS_BURST)
        return budget.take()

    def enter(self, session: HostSession) -> None:
        """Make the session the host's only one here; its number was committed, so it is the newest."""
        older = self.sessions.get(session.host_id)
        if older is not None:
            older.end(superseded(session.host_id))
        assert session.state is not None
        self.sessions[session.host_id] = session
        self.states[session.host_id] = session.state
        self.changed.add(session.host_id)
        metrics.SESSIONS.set(len(self.sessions))

    def leave(self, session: HostSession) -> None:
        """Forget the session; the host's state stays, so that its silence is judged."""
        if self.sessions.get(session.host_id) is session:
            del self.sessions[session.host_id]
            metrics.SESSIONS.set(len(self.sessions))

    def forget(self, host_id: str, why: TrimtabError) -> None:
        """Drop a host that was removed or has a newer session elsewhere."""
        session = self.sessions.get(host_id)
        if session is not None:
            session.end(why)
        self.states.pop(host_id, None)
        self._openings.pop(host_id, None)
        for key in [key for key in self._pools_written if key[0] == host_id]:
            del self._pools_written[key]

    def welcome(self, opened: Opened) -> pb.Welcome:
        return welcome_of(
            opened,
            lease_ttl_ms=int(self.settings.lease_ttl_s * 1000),
            heartbeat_every_ms=int(self.settings.heartbeat_s * 1000),
            gateway_addresses=self.settings.gateway_addresses,
            bundle_sha256=self.pki.bundle_sha256(),
        )

    # --- what sessions report ------------------------------------------------------------------------------------------------

    def note_heartbeat(self, state: HostState) -> None:
        self.changed.add(state.host_id)

    def note_pool(self, host_id: str, message: storage_pb2.PoolObservation) -> None:
        """Keep a pool's figures for the next write: each 10 s, or at once when its state changed."""
        key = (host_id, message.pool_id[:40])
        present = (message.is_responsive, message.problem)
        written_s, written = self._pools_written.get(key, (float("-inf"), None))
        now_s = self.clock.boottime_s()
        if present == written and now_s - written_s < POOLS_EVERY_S:
            return
        self._pools_written[key] = (now_s, present)
        self.pool_reports[key] = PoolReport(host_id, pool_of(message))

    def is_progress_due(self, operation_id: str) -> bool:
        """Tell whether a running job's figures are worth a write: at most each 2 s per operation."""
        now_s = self.clock.boottime_s()
        if now_s - self._progress_written.get(operation_id, float("-inf")) < PROGRESS_EVERY_S:
            return False
        if len(self._progress_written) > 10_000:
            self._progress_written.clear()
        self._progress_written[operation_id] = now_s
        return True

    def granted_ago_ms(self, host_id: str) -> int:
        """Return how long ago this gateway last granted the host a renewal, by our own clock; -1: it never did."""
        state = self.states.get(host_id)
        if state is None or state.granted_boottime_s is None:
            return -1
        return int((self.clock.boottime_s() - state.granted_boottime_s) * 1000)

    # --- certificates --------------------------------------------------------------------------------------------------------

    def renew_certificates(self, peer: Peer, request: pb.RenewCertificatesRequest) -> pb.RenewCertificatesResponse:
        """Sign and record; runs in a thread."""
        now = self.clock.now()
        host = self.database.read(lambda session: hosts.get(session, peer.host_id))
        signed = self.sign(host.id, host.migration_address, request.agent_csr_pem, request.libvirt_csr_pem)
        self.database.write(lambda session: sessions.record_renewal(session, host.id, peer.serial, signed, now))
        log.info("certificates renewed", host_id=host.id, host=host.name, serial=signed.agent.serial)
        return pb.RenewCertificatesResponse(
            agent_certificate_pem=signed.agent.pem,
            libvirt_certificate_pem=signed.libvirt.pem,
            ca_bundle_pem=self.pki.bundle_pem(),
        )

    def sign(self, host_id: str, migration_address: str, agent_csr_pem: str, libvirt_csr_pem: str) -> SignedPair:
        return sign_pair(
            self.pki.signing(),
            host_id,
            agent_csr_pem=agent_csr_pem,
            libvirt_csr_pem=libvirt_csr_pem,
            migration_address=migration_address,
            now=self.clock.now(),
            life=timedelta(hours=self.settings.agent_certificate_hours),
        )


class GatewayServicer(pb_grpc.GatewayServiceServicer):
    """Translates between the wire and `Gateway`; every error leaves as a typed one."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # It writes through the context and is no generator, since acknowledgements come from several tasks.
    async def Session(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.SessionRequest],
        context: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
    ) -> None:
        session: HostSession | None = None

        def count(code: str) -> None:
            was_open = session is not None and session.state is not None
            (metrics.SESSIONS_ENDED if was_open else metrics.SESSIONS_REFUSED).labels(code).inc()
            log.info("session ended" if was_open else "session refused", peer=context.peer(), code=code)

        async with typed_errors(context, "session", count=count):
            session = HostSession(self._gateway, peer_of(context), context)
            try:
                await session.serve(request_iterator)
            except StreamBroken:
                count("stream-broken")
            else:
                count("host-left")

    async def RenewCertificates(
        self,
        request: pb.RenewCertificatesRequest,
        context: grpc.aio.ServicerContext[pb.RenewCertificatesRequest, pb.RenewCertificatesResponse],
    ) -> pb.RenewCertificatesResponse:
        async with typed_errors(context, "renew certificates", count=lambda code: metrics.RENEWALS.labels(code).inc()):
            response = await asyncio.to_thread(self._gateway.renew_certificates, peer_of(context), request)
            metrics.RENEWALS.labels("renewed").inc()
        return response

    async def ReadUpload(
        self,
        request: pb.ReadUploadRequest,
        context: grpc.aio.ServicerContext[pb.ReadUploadRequest, pb.ReadUploadResponse],
    ) -> AsyncIterator[pb.ReadUploadResponse]:
        async with typed_errors(context, "read upload"):
            descriptor = await asyncio.to_thread(self._open_upload, peer_of(context), request)
        try:
            offset = request.offset
            while content := await asyncio.to_thread(os.pread, descriptor, UPLOAD_CHUNK_BYTES, offset):
                offset += len(content)
                metrics.UPLOAD_BYTES.inc(len(content))
                yield pb.ReadUploadResponse(content=content)
        finally:
            os.close(descriptor)

    def _open_upload(self, peer: Peer, request: pb.ReadUploadRequest) -> int:
        """Return a descriptor of the upload's file; NotFound unless a live operation lets this host read it."""
        if not UPLOAD_ID.fullmatch(request.upload_id) or request.offset < 0:
            raise InvalidRequest("upload-id-malformed", "upload_id: as in up-01jd..., offset: not negative", field="upload_id")
        upload_id = request.upload_id
        self._gateway.database.read(lambda session: uploads.check_reader(session, upload_id, peer.host_id))
        try:
            return os.open(Path(self._gateway.settings.uploads_dir) / upload_id, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound("upload-not-here", "this controller node does not have the upload", upload_id=upload_id) from error


def add_to_server(gateway: Gateway, server: Any) -> GatewayServicer:
    servicer = GatewayServicer(gateway)
    pb_grpc.add_GatewayServiceServicer_to_server(servicer, server)
    return servicer
