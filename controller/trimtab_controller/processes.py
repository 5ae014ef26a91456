"""The children of `trimtab-controller all`, each also a process of its own under systemd. Composition only."""

import asyncio
import gc
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from trimtab_controller import installation, log, metrics, supervisor
from trimtab_controller.beats import PERIOD_S, beat_from_thread, beat_of_process
from trimtab_controller.clock import SystemClock
from trimtab_controller.config import PROCESSES, Settings, join_host_port
from trimtab_controller.pki import FleetPki
from trimtab_controller.secret_box import SecretBox

if TYPE_CHECKING:
    from trimtab_controller.api.context import ApiContext, ConsoleOpener
    from trimtab_controller.rpc.heard import HeardHosts

logger = structlog.get_logger(__name__)

TLS_RELOAD_EVERY_S = 30.0
API_GRACE_S = 5
# Objects made and kept before the youngest are looked through. What a request or a step makes is freed by its count; the default of
# 700 walks through all that was imported some times a second, for nothing.
GC_THRESHOLDS = (50_000, 20, 50)
# How long a thread that computes keeps the interpreter from one that wants it, in the api: its event loop wants it several times for
# every answer, and is kept from it by reads. Python's own 5 ms are meant for threads that all compute.
API_SWITCH_S = 0.0005
# What a viewer may paste at once; a session passes it on in smaller pieces.
CONSOLE_MESSAGE_BYTES = 256 << 10


def run(name: str, settings: Settings) -> None:
    """Run one process until SIGTERM or SIGINT."""
    log.configure(name, log_format=settings.log_format, level=settings.log_level)
    gc.set_threshold(*GC_THRESHOLDS)
    installation.require_founded(settings)
    installation.require_schema(settings)
    beat = beat_of_process()
    server = metrics.serve(name, settings.metrics_port_of(name), settings.metrics_bind_address)
    try:
        _RUNNERS[name](settings, beat)
    finally:
        server.shutdown()
    logger.info("process ends")


def _run_gateway(settings: Settings, beat: Callable[[], None]) -> None:
    from trimtab_controller import wiring
    from trimtab_controller.rpc import server

    nudger = wiring.build_nudger(settings)
    try:
        asyncio.run(server.run(settings, nudge=nudger.nudge, beat=beat))
    finally:
        nudger.stop()


def _run_engine(settings: Settings, beat: Callable[[], None]) -> None:
    from trimtab_controller import wiring
    from trimtab_controller.loops import engine_process
    from trimtab_controller.rpc.heard import HeardHosts
    from trimtab_controller.rpc.state_answers import GatewayAsker

    database = wiring.build_database(settings, pool_size=2)
    asker = GatewayAsker(database, wiring.ControllerChannels(settings))
    heard = HeardHosts(settings.effective_redis_url, ask_gateways=asker.states)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    try:
        engine_process.run(settings, stopping=stopping, beat=beat, host_states=heard.states)
    finally:
        heard.stop()
        database.close()


def _run_worker(settings: Settings, beat: Callable[[], None]) -> None:
    from trimtab_controller import tasks

    stopping = beat_from_thread(beat)
    try:
        tasks.run_worker(settings)
    finally:
        stopping.set()


# --- api -------------------------------------------------------------------------------------------------------------------


def _run_api(settings: Settings, beat: Callable[[], None]) -> None:
    import uvicorn
    import uvloop

    from trimtab_controller import wiring
    from trimtab_controller.api.app import create_app
    from trimtab_controller.bounded_head import BoundedHead
    from trimtab_controller.request_metrics import measured
    from trimtab_controller.rpc.heard import HeardHosts
    from trimtab_controller.rpc.state_answers import GatewayAsker

    sys.setswitchinterval(API_SWITCH_S)
    nudger = wiring.build_nudger(settings)
    agents_database = wiring.build_database(settings, pool_size=4)
    asker = GatewayAsker(agents_database, wiring.ControllerChannels(settings))
    heard = HeardHosts(settings.effective_redis_url, ask_gateways=asker.states)
    context = api_context(
        settings,
        agents=wiring.build_agents(settings, agents_database),
        consoles=wiring.build_consoles(settings, agents_database),
        nudge=nudger.nudge,
        heard=heard,
    )
    tls = ApiTls(settings)
    server = uvicorn.Server(
        uvicorn.Config(
            measured(create_app(context)),
            host=settings.bind_address,
            port=settings.api_port,
            http=BoundedHead,
            ws="websockets-sansio",
            ws_max_size=CONSOLE_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            ssl_context_factory=lambda _config, _default: tls.context,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=API_GRACE_S,
        )
    )
    # uvicorn raises what it caught again once it has stopped; by then there is nothing left to do.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        uvloop.run(_serve_api(server, tls, settings, beat))
    finally:
        heard.stop()
        asker.close()
        nudger.stop()
        agents_database.close()


async def _serve_api(server: Any, tls: "ApiTls", settings: Settings, beat: Callable[[], None]) -> None:
    async def keep() -> None:
        loop = asyncio.get_running_loop()
        reload_at_s = loop.time() + TLS_RELOAD_EVERY_S
        while True:
            if server.started:
                beat()
            if loop.time() >= reload_at_s:
                reload_at_s = loop.time() + TLS_RELOAD_EVERY_S
                await asyncio.to_thread(_renew, settings, tls)
            await asyncio.sleep(PERIOD_S)

    keeping = asyncio.create_task(keep())
    try:
        await server.serve()
    finally:
        keeping.cancel()


def _renew(settings: Settings, tls: "ApiTls") -> None:
    try:
        installation.ensure_certificate(settings, SystemClock())
        tls.reload()
    except Exception:
        logger.exception("certificate of the api not renewed; the present one stays in use")


class ApiTls:
    """The API's TLS; new connections get the certificate that is on disk. One's own certificate goes before the fleet's."""

    def __init__(self, settings: Settings) -> None:
        self._certificate = settings.api_certificate or settings.controller_certificate_path
        self._key = settings.api_key or settings.controller_key_path
        self._pki = FleetPki(settings.pki_dir)
        self._stamp: object = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.reload()

    def reload(self) -> None:
        stamp = [(stat.st_mtime_ns, stat.st_ino) for stat in (os.stat(self._certificate), os.stat(self._key))]
        if stamp == self._stamp:
            return
        if self._certificate.parent == self._pki.directory:
            self._pki.controller_pair()  # waits while the two files do not belong together
        self.context.load_cert_chain(self._certificate, self._key)
        self._stamp = stamp


def api_context(
    settings: Settings, *, agents: Any, consoles: "ConsoleOpener", nudge: Callable[[], None], heard: "HeardHosts"
) -> "ApiContext":
    """Return what the API is given."""
    from trimtab_controller.api.context import ApiContext, ApiSettings
    from trimtab_controller.store.database import AsyncDatabase

    metrics_address = settings.advertise[0]
    return ApiContext(
        db=AsyncDatabase(settings.effective_database_url, on_commit=metrics.count_commit),
        clock=SystemClock(),
        agents=agents,
        consoles=consoles,
        settings=ApiSettings(
            has_overlay=bool(settings.ovn_northbound),
            uploads_dir=settings.uploads_dir,
            gateway_address=settings.gateway_addresses[0],
            join_addresses=settings.join_addresses,
            gateway_addresses=settings.gateway_addresses,
            upload_max_bytes=settings.upload_max_bytes,
            rate_limit_per_s=settings.rate_limit_per_s,
            image_url_hosts=settings.image_url_hosts,
            image_url_networks=settings.image_url_networks,
            agent_metrics_port=settings.agent_metrics_port,
            lease_ttl_s=settings.lease_ttl_s,
            controller_targets={name: join_host_port(metrics_address, settings.metrics_port_of(name)) for name in PROCESSES},
        ),
        join_place=lambda: installation.join_place(settings),
        ca_bundle_pem=FleetPki(settings.pki_dir).bundle_pem,
        nudge=nudge,
        heard=heard.heard,
        secrets=SecretBox(settings.pki_dir),
        host_states=heard.states,
        probes=lambda: probes(settings, heard),
    )


def probes(settings: Settings, heard: "HeardHosts") -> Mapping[str, str]:
    """Return the health of what SQL does not know of; the worker's only where our own supervisor runs it."""
    found = {"redis": heard.problem()}
    worker = supervisor.read_status(settings.data_dir).get("worker")
    if worker is not None:
        found["worker"] = "ok" if worker["is_running"] else "not running"
    return found


_RUNNERS = {"api": _run_api, "engine": _run_engine, "gateway": _run_gateway, "worker": _run_worker}
