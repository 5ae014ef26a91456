"""What the API is given when it is put together; it looks nothing up by itself and keeps no global state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from trimtab_controller.agents.backups import BackupDisk, Piece
from trimtab_controller.clock import Clock
from trimtab_controller.services.fencing import Seals
from trimtab_controller.services.hosts import JoinPlace
from trimtab_controller.store.database import AsyncDatabase
from trimtab_controller.store.disk_reserve import KEEP_FREE_BYTES
from trimtab_protos.adoption_messages import Described
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Unavailable


class AgentReader(Protocol):
    """What the API asks of agents itself; everything else goes through operations."""

    def read_console(self, host_id: str, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]: ...

    def describe_domain(self, host_id: str, *, domain: str = "", vm_id: str = "") -> Described: ...

    def read_backup(self, host_id: str, disk: BackupDisk, format: str, offset: int, length: int) -> Piece: ...


class ConsoleLine(Protocol):
    """One open session at a guest's console."""

    async def read(self) -> bytes:
        """Return what the console said next; b"" where the guest's side has closed it. Unavailable where the host is lost."""

    async def write(self, content: bytes) -> None:
        """Send at most 64 KiB; waits while the console takes nothing."""

    async def close(self) -> None:
        """Leave the console; never raises."""


class ConsoleOpener(Protocol):
    async def open_console(self, host_id: str, vm_id: str, kind: ConsoleKind) -> ConsoleLine:
        """Return an open session. Conflict: busy, absent, or the guest does not run; NotFound; Unavailable."""


class NoConsoles:
    """Stands where no host can be reached: refuses."""

    async def open_console(self, host_id: str, vm_id: str, kind: ConsoleKind) -> ConsoleLine:
        del vm_id, kind
        raise Unavailable("peer-unreachable", f"this process reaches no consoles on {host_id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Bounds and addresses. Sizes in bytes, times in seconds."""

    uploads_dir: Path
    # Address of the gateway beside this API: agents read uploads from it.
    gateway_address: str = ""
    join_addresses: tuple[str, ...] = ()
    gateway_addresses: tuple[str, ...] = ()
    upload_max_bytes: int = 1 << 40
    # All uploads together; beyond it the spool is full.
    spool_max_bytes: int = 1 << 42
    # Left free on the spool's file system, since leases and operations need the disk too.
    spool_keep_free_bytes: int = 1 << 30
    # Left free on the embedded database's file system, else mutations are refused: leases need it.
    disk_keep_free_bytes: int = KEEP_FREE_BYTES
    upload_ttl_s: int = 24 * 3600
    body_max_bytes: int = 1 << 20
    # Mutations per second and user; reads get four times as many, an address four times that.
    rate_limit_per_s: float = 50.0
    # Wrong tokens per second and address; beyond it they are neither told apart nor written to the trail.
    login_failures_per_s: float = 1.0
    login_failures_burst: float = 20.0
    max_watchers: int = 500
    image_url_hosts: tuple[str, ...] = ()
    image_url_networks: tuple[str, ...] = ()
    # Whether the engine keeps an OVN as SQL says.
    has_overlay: bool = False
    agent_metrics_port: int = 9107
    # Of hosts' leases: what failover waits for where nothing else proves a host off.
    lease_ttl_s: float = 15.0
    # Process name -> ADDRESS:PORT of its metrics, for Prometheus.
    controller_targets: Mapping[str, str] = field(default_factory=dict)
    tail_poll_s: float = 0.25
    sse_heartbeat_s: float = 15.0
    console_timeout_s: float = 10.0
    # A session in which nothing is typed ends after this; one in which much is, after that.
    console_idle_s: float = 900.0
    console_max_s: float = 3600.0
    # How often it is asked whether a session may go on.
    console_check_s: float = 1.0
    # Of this process; a vm's own bound is its host's to keep.
    max_consoles: int = 200


def _no_nudge() -> None:
    """Nobody is told; the engine's redrive finds the row."""


def _nothing_heard() -> Mapping[str, datetime]:
    return {}


def _no_states() -> Mapping[str, Mapping[str, Any]]:
    return {}


class NoSecrets:
    """Stands where no key is: refuses."""

    @property
    def fleet_id(self) -> str:
        raise Unavailable("secrets-not-kept", "this process has no key, so it speaks for no fleet")

    def seal(self, secret: str, *, place: str) -> str:
        if secret:
            raise Unavailable("secrets-not-kept", f"this process has no key to keep the secret of {place} with")
        return ""


def _no_probes() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    db: AsyncDatabase
    clock: Clock
    agents: AgentReader
    settings: ApiSettings
    # What a paste line for a new host says besides its token.
    join_place: Callable[[], JoinPlace]
    # PEM of every CA that is trusted now; read again on each request, since it is rotated.
    ca_bundle_pem: Callable[[], str]
    # Called after commit; never blocks.
    nudge: Callable[[], None] = _no_nudge
    # Host id -> when a gateway last heard of it: an observation of a connected host is as old as that.
    heard: Callable[[], Mapping[str, datetime]] = _nothing_heard
    # Opens sessions at guests' consoles.
    consoles: ConsoleOpener = field(default_factory=NoConsoles)
    # Encrypts what operators give that must not lie in rows as it is.
    secrets: Seals = field(default_factory=NoSecrets)
    # Host id -> its state as a gateway last wrote it; see `rpc/host_states.py`.
    host_states: Callable[[], Mapping[str, Mapping[str, Any]]] = _no_states
    # Component -> "ok" or what is wrong, of those that SQL does not know of (worker, redis).
    probes: Callable[[], Mapping[str, str]] = _no_probes
