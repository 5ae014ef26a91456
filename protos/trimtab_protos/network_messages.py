"""The messages about packets as frozen dataclasses; see `messages.py`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    name: str
    mtu: int = 1500
    has_carrier: bool = True
    ports: tuple[str, ...] = ()
    is_ours: bool = False
    is_open_vswitch: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallRule:
    protocol: str
    first_port: int = 0
    last_port: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallSpec:
    generation: int
    is_closed: bool = False
    rules: tuple[FirewallRule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    host_id: str
    agent_address: str
    migration_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFinding:
    host_id: str
    agent_problem: str = ""
    libvirt_problem: str = ""
    migration_problem: str = ""
    mtu: int = 0
    mtu_passed: int = 0
    rate_bytes_s: int = 0
    clock_ahead_ms: int = 0
    has_clock: bool = False
