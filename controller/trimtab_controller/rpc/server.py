"""Two gRPC servers in one loop: hosts (mutual TLS) and joins (server TLS only); certificates are read anew for each connection."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, SystemClock, mint
from trimtab_controller.config import Settings, join_host_port
from trimtab_controller.pki import FleetPki
from trimtab_controller.rpc import gateway as gateway_service
from trimtab_controller.rpc import join as join_service
from trimtab_controller.rpc import state_answers
from trimtab_controller.rpc.gateway import Gateway
from trimtab_controller.rpc.host_states import HostStateMirror
from trimtab_controller.rpc.join import JoinServicer
from trimtab_controller.rpc.watch import Watch
from trimtab_controller.store import certificates
from trimtab_controller.store.database import Database
from trimtab_protos import tls
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

STREAMS_PER_CONNECTION = 32
JOIN_MESSAGE_MAX_BYTES = 256 << 10
DRAIN_WITHIN_MS = 2000
STOP_GRACE_S = 3.0
CERTIFICATES_EVERY_S = 600.0
LOOKS_PER_LIFE = 12
"""At least so often in a host certificate's life, where that is short: the figure exported is old otherwise."""

_HOST_OPTIONS = [*tls.server_options(), ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION)]
_JOIN_OPTIONS = [
    ("grpc.max_receive_message_length", JOIN_MESSAGE_MAX_BYTES),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a second gateway on this port must fail, not take half of the joins
]


class CertificateSource:
    """What each new connection is served with; the last good files where the present ones cannot be read."""

    def __init__(self, pki: FleetPki, *, is_mutual: bool) -> None:
        self._pki = pki
        self._is_mutual = is_mutual
        self._stamp: object = None
        self._present = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._present,
            self._fetch,  # type: ignore[arg-type]  # the stubs forget that None means "unchanged"
            require_client_authentication=self._is_mutual,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        key, certificate = self._pki.controller_pair()
        roots = self._pki.bundle_pem().encode() if self._is_mutual else None
        self._stamp = self._stamp_now()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=roots)

    def _stamp_now(self) -> object:
        names = ("controller.key", "controller.pem", "ca.pem")
        return [(stat.st_mtime_ns, stat.st_ino) for stat in ((self._pki.directory / name).stat() for name in names)]

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, from a thread of its own; raising would break the handshake."""
        try:
            if self._stamp_now() == self._stamp:
                return None
            self._present = self._read()
        except Exception:
            log.exception("certificates cannot be read; the last good ones stay in use")
            return None
        return self._present


@dataclass(slots=True)
class GatewayProcess:
    """A running gateway; `ports` are what was bound, which matters where the settings said 0 in tests."""

    gateway: Gateway
    watch: Watch
    mirror: HostStateMirror
    host_server: Any
    join_server: Any
    health: Any
    host_port: int
    join_port: int
    tasks: list[asyncio.Task[Any]]

    async def stop(self) -> None:
        """Let hosts go elsewhere, give the right to grant back, and end."""
        await self.health.enter_graceful_shutdown()
        sessions = list(self.gateway.sessions.values())
        await asyncio.gather(*(session.ask_to_reconnect(DRAIN_WITHIN_MS) for session in sessions))
        await asyncio.gather(self.host_server.stop(STOP_GRACE_S if sessions else 0), self.join_server.stop(0))
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.gateway.right.give_up()
        self.gateway.right.close()
        await self.mirror.close()


async def start(
    settings: Settings,
    database: Database,
    *,
    clock: Clock | None = None,
    nudge: Callable[[], None] = lambda: None,
    host_address: str = "",
    join_address: str = "",
) -> GatewayProcess:
    """Start serving; the addresses default to the settings' ports. Raises Unavailable where a port is taken."""
    clock = clock or SystemClock()
    pki = FleetPki(settings.pki_dir)
    gateway = Gateway(settings, database, clock, pki, gateway_id=mint("gw"), nudge=nudge)
    mirror = HostStateMirror(settings.effective_redis_url, gateway_id=gateway.gateway_id)
    watch = Watch(gateway, mirror)

    host_server = grpc.aio.server(options=_HOST_OPTIONS)
    gateway_service.add_to_server(gateway, host_server)
    state_answers.add_to_server(gateway, host_server)
    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, host_server)
    host_port = _bind(
        host_server,
        host_address or join_host_port(settings.bind_address, settings.gateway_port),
        CertificateSource(pki, is_mutual=True),
    )
    join_server = grpc.aio.server(options=_JOIN_OPTIONS)
    join_service.add_to_server(JoinServicer(settings, database, clock, pki), join_server)
    join_port = _bind(
        join_server,
        join_address or join_host_port(settings.bind_address, settings.join_port),
        CertificateSource(pki, is_mutual=False),
    )

    await gateway.right.renew()  # before the first host: without it every heartbeat would be refused
    await host_server.start()
    await join_server.start()
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    tasks = [asyncio.create_task(watch.run(), name="gateway-watch")]
    log.info("gateway serves", gateway_id=gateway.gateway_id, host_port=host_port, join_port=join_port)
    return GatewayProcess(gateway, watch, mirror, host_server, join_server, health_servicer, host_port, join_port, tasks)


def _bind(server: Any, address: str, source: CertificateSource) -> int:
    try:
        port: int = server.add_secure_port(address, source.credentials())
    except RuntimeError as error:
        raise Unavailable("port-taken", f"cannot listen on {address}: {error}", address=address) from error
    return port


async def keep_certificates(settings: Settings, database: Database, clock: Clock) -> None:
    """Renew this node's certificate at half life and export when certificates expire; runs until cancelled."""
    pki = FleetPki(settings.pki_dir)
    every_s = min(CERTIFICATES_EVERY_S, settings.agent_certificate_hours * 3600 / LOOKS_PER_LIFE)
    while True:
        try:
            await asyncio.to_thread(refresh_certificates, settings, pki, database, clock)
        except Exception:
            log.exception("certificates not refreshed")
        await asyncio.sleep(every_s)


def refresh_certificates(settings: Settings, pki: FleetPki, database: Database, clock: Clock) -> None:
    now = clock.now()
    if pki.ensure_controller_certificate(settings.advertise, now=now, life=timedelta(days=settings.controller_certificate_days)):
        log.info("controller certificate renewed")
    metrics.CONTROLLER_EXPIRY.set(pki.controller_certificate().not_valid_after_utc.timestamp())
    metrics.CA_EXPIRY.set(pki.signing().certificate.not_valid_after_utc.timestamp())
    in_force = database.read(lambda session: certificates.in_force(session, now))
    if in_force:
        metrics.EARLIEST_EXPIRY.set(min(one.not_after for one in in_force).timestamp())


async def run(settings: Settings, *, nudge: Callable[[], None], beat: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; `beat` tells the supervisor each second that the loop turns."""
    database, clock = Database(settings.effective_database_url, on_commit=metrics.count_commit), SystemClock()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    process = await start(settings, database, clock=clock, nudge=nudge)
    process.tasks.append(asyncio.create_task(keep_certificates(settings, database, clock)))
    while not stopped.is_set():
        beat()
        try:
            await asyncio.wait_for(stopped.wait(), timeout=1.0)
        except TimeoutError:
            continue
    log.info("gateway drains", sessions=len(process.gateway.sessions))
    await process.stop()
    database.close()
