"""Composition shared by the controller's processes: how an engine, an agent client and a nudger are put together."""

import threading
from collections.abc import Callable
from pathlib import Path

import grpc

from trimtab_controller import metrics
from trimtab_controller.agents.consoles import GrpcConsoles
from trimtab_controller.agents.grpc_client import AgentAddress, GrpcAgentClient
from trimtab_controller.clock import SystemClock, system_rng
from trimtab_controller.config import Settings
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import Engine, driver_name
from trimtab_controller.secret_box import SecretBox
from trimtab_controller.store import hosts, volume_keys
from trimtab_controller.store.database import Database
from trimtab_protos import tls

# Drivers write one short transaction at a time; more connections than threads would only wait for each other.
ENGINE_POOL_SIZE = 8


def build_database(settings: Settings, *, pool_size: int = ENGINE_POOL_SIZE) -> Database:
    return Database(settings.effective_database_url, pool_size=pool_size, on_commit=metrics.count_commit)


def build_agents(settings: Settings, db: Database) -> GrpcAgentClient:
    """Return a client that finds agents by their host rows and follows renewals of the controller's certificate."""
    connect = ControllerChannels(settings)

    def lookup(host_id: str) -> AgentAddress:
        return AgentAddress(host_id, *db.read(lambda session: hosts.reach_agent(session, host_id)))

    box = SecretBox(settings.pki_dir)
    client = GrpcAgentClient(
        lookup=lookup,
        connect=connect,
        open_seal=lambda sealed, place: box.open(sealed, place=place),
        seals_of=lambda subject_id: db.read(lambda session: volume_keys.of_subject(session, subject_id)),
        on_call=_count_call,
    )
    connect.on_renewal = client.reconnect_all
    return client


def build_consoles(settings: Settings, db: Database) -> GrpcConsoles:
    """Return what opens sessions at guests' consoles, for the API's event loop."""

    def find(host_id: str) -> str:
        return db.read(lambda session: hosts.reach_agent(session, host_id))[0]

    return GrpcConsoles(find=find, connect=ControllerChannels(settings).open_aio)


def build_engine(settings: Settings, *, process: str) -> Engine:
    """Return a driver for this process with connections of its own. Call it after any fork."""
    db = build_database(settings, pool_size=max(ENGINE_POOL_SIZE, settings.worker_threads))
    return Engine(
        db=db,
        agents=build_agents(settings, db),
        clock=SystemClock(),
        driver=driver_name(process),
        rng=system_rng(),
        on_step=_count_step,
        on_end=_count_end,
    )


def _count_step(kind: str, step: str, outcome: str, seconds: float) -> None:
    metrics.STEPS.labels(kind, step, outcome).inc()
    metrics.STEP_SECONDS.labels(kind, step).observe(seconds)


def _count_end(kind: str, state: str, seconds: float) -> None:
    metrics.OPERATIONS_ENDED.labels(kind, state).inc()
    metrics.OPERATION_SECONDS.labels(kind).observe(seconds)


def _count_call(verb: str, outcome: str, seconds: float) -> None:
    metrics.AGENT_CALL_SECONDS.labels(verb, outcome).observe(seconds)


def build_nudger(settings: Settings) -> Nudger:
    from trimtab_controller import tasks

    return Nudger(tasks.publisher(settings.broker_url), on_outcome=lambda outcome: metrics.NUDGES.labels(outcome).inc())


class ControllerChannels:
    """Opens channels to agents with the controller's certificate as it is on disk now."""

    def __init__(self, settings: Settings) -> None:
        self._ca = settings.ca_bundle_path
        self._certificate = settings.controller_certificate_path
        self._key = settings.controller_key_path
        self._lock = threading.Lock()
        self._stamp: tuple[float, ...] = ()
        self._credentials: grpc.ChannelCredentials | None = None
        self.on_renewal: Callable[[], None] = lambda: None

    def __call__(self, host_id: str, address: str) -> grpc.Channel:
        return grpc.secure_channel(address, self._current(), options=tls.channel_options(host_id))

    def open_aio(self, host_id: str, address: str) -> grpc.aio.Channel:
        """Return a channel of its own for the running loop."""
        return grpc.aio.secure_channel(address, self._current(), options=tls.channel_options(host_id, is_own_connection=True))

    def _current(self) -> grpc.ChannelCredentials:
        with self._lock:
            stamp = tuple(_modified(path) for path in (self._ca, self._certificate, self._key))
            if self._credentials is None or stamp != self._stamp:
                loaded = tls.load_credentials(ca_path=self._ca, certificate_path=self._certificate, key_path=self._key)
                self._credentials, self._stamp = loaded.for_channel(), stamp
            return self._credentials


def _modified(path: Path) -> float:
    return path.stat().st_mtime
