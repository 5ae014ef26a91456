"""A small real gateway over mutual TLS: grants what it is told to, keeps what it hears, and can be unkind."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import grpc

from tests.unit.agent.factories import ca_pem, host_credentials
from trimtab_controller.pki import SigningAuthority
from trimtab_protos import tls
from trimtab_protos.agent.v1 import domain_pb2, storage_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.controller.v1.gateway_service_pb2_grpc import (
    GatewayServiceServicer,
    add_GatewayServiceServicer_to_server,
)

BLOCK_BYTES = 1 << 16


@dataclass
class Heard:
    """What came up the streams."""

    hellos: list[pb.Hello] = field(default_factory=list)
    heartbeats: list[pb.Heartbeat] = field(default_factory=list)
    items: list[pb.OutboxItem] = field(default_factory=list)
    peers: list[frozenset[str]] = field(default_factory=list)
    renewals: list[pb.RenewCertificatesRequest] = field(default_factory=list)

    @property
    def durable_items(self) -> list[pb.OutboxItem]:
        return [item for item in self.items if item.sequence]


class GatewayDouble(GatewayServiceServicer):
    def __init__(self, authority: SigningAuthority) -> None:
        self.authority = authority
        self.heard = Heard()
        self.lease_number = 1
        self.database_mark = 0
        self.lease_ttl_ms = 2500
        self.heartbeat_every_ms = 250
        self.gateway_addresses: list[str] = []
        self.pools: list[storage_pb2.PoolSpec] = []
        self.networks: list[domain_pb2.NetworkSpec] = []
        self.ca_bundle_sha256 = ""
        self.grants = True
        self.acknowledges_heartbeats = True
        self.acknowledges_outbox = True
        self.uploads: dict[str, bytes] = {}
        self.breaks_upload_after = 0
        """Bytes after which the next reading of an upload breaks off; 0: never."""
        self.open_streams = 0
        self._to_send: set[asyncio.Queue[pb.SessionResponse]] = set()
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self, *, port: int = 0) -> None:
        server = grpc.aio.server(options=tls.server_options())
        add_GatewayServiceServicer_to_server(self, server)
        credentials = host_credentials(self.authority, tls.CONTROLLER_NAME)
        bound = server.add_secure_port(f"127.0.0.1:{port}", tls.server_credentials(lambda: credentials))
        await server.start()
        self._server = server
        self.address = f"127.0.0.1:{bound}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    def send_to_all(self, response: pb.SessionResponse) -> None:
        for queue in self._to_send:
            queue.put_nowait(response)

    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.SessionResponse]:
        self.heard.peers.append(tls.peer_names(context))  # type: ignore[arg-type]
        queue: asyncio.Queue[pb.SessionResponse] = asyncio.Queue()
        self._to_send.add(queue)
        self.open_streams += 1
        reader = asyncio.create_task(self._read(request_iterator, queue))
        try:
            while True:
                getting = asyncio.create_task(queue.get())
                done, _pending = await asyncio.wait({getting, reader}, return_when=asyncio.FIRST_COMPLETED)
                if getting not in done:
                    getting.cancel()
                    return
                yield getting.result()
        finally:
            reader.cancel()
            self._to_send.discard(queue)
            self.open_streams -= 1

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], queue: asyncio.Queue[pb.SessionResponse]) -> None:
        async for request in requests:
            match request.WhichOneof("body"):
                case "hello":
                    self.heard.hellos.append(request.hello)
                    queue.put_nowait(pb.SessionResponse(welcome=self._welcome()))
                case "heartbeat":
                    self.heard.heartbeats.append(request.heartbeat)
                    if self.acknowledges_heartbeats:
                        ack = pb.HeartbeatAck(
                            sequence=request.heartbeat.sequence,
                            lease_number=self.lease_number,
                            is_granted=self.grants,
                            database_mark=self.database_mark,
                        )
                        queue.put_nowait(pb.SessionResponse(heartbeat_ack=ack))
                case "outbox":
                    self.heard.items.extend(request.outbox.items)
                    last = request.outbox.items[-1].sequence
                    if self.acknowledges_outbox and last:
                        queue.put_nowait(pb.SessionResponse(outbox_ack=pb.OutboxAck(sequence=last)))

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(
            lease_ttl_ms=self.lease_ttl_ms,
            heartbeat_every_ms=self.heartbeat_every_ms,
            gateway_addresses=self.gateway_addresses,
            pools=self.pools,
            networks=self.networks,
            ca_bundle_sha256=self.ca_bundle_sha256,
        )

    async def RenewCertificates(  # type: ignore[override]
        self, request: pb.RenewCertificatesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.RenewCertificatesResponse:
        self.heard.renewals.append(request)
        host_id = tls.peer_host_id(context)  # type: ignore[arg-type]
        now, life = datetime.now(UTC), timedelta(hours=1)
        agent = self.authority.sign_agent(request.agent_csr_pem, host_id, now=now, life=life)
        libvirt = self.authority.sign_libvirt(request.libvirt_csr_pem, host_id, "192.0.2.1", now=now, life=life)
        return pb.RenewCertificatesResponse(
            agent_certificate_pem=agent.pem,
            libvirt_certificate_pem=libvirt.pem,
            ca_bundle_pem=ca_pem(self.authority).decode(),
        )

    async def ReadUpload(  # type: ignore[override]
        self, request: pb.ReadUploadRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.ReadUploadResponse]:
        content = self.uploads.get(request.upload_id)
        if content is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such upload")
            return
        limit, self.breaks_upload_after = self.breaks_upload_after, 0
        for offset in range(request.offset, len(content), BLOCK_BYTES):
            if limit and offset - request.offset >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            yield pb.ReadUploadResponse(content=content[offset : offset + BLOCK_BYTES])
