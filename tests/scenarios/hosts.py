"""A simulated host: agent, warden, beacon, hypervisor, power device; each with its own ways to fail. Times are the world's seconds.

The agent's lease runs on the host's own clock, from when the acknowledged renewal was sent. The warden is another process: it kills
when that lease has ended, whatever the agent does. A paused host does nothing at all; on resume its warden looks first.
"""

from dataclasses import dataclass, field
from typing import Any

from trimtab_controller.core.failover.records import Seen


@dataclass
class Double:
    """A guest that is scripted to fail."""

    start_failures: int = 0
    migrate_failures: int = 0
    stop_fails: bool = False
    only_on_host: str = ""

    def start_fails_on(self, host: str) -> bool:
        if self.start_failures <= 0 or (self.only_on_host and host != self.only_on_host):
            return False
        self.start_failures -= 1
        return True


@dataclass
class Domain:
    vm: str
    epoch: int
    seen: Seen
    is_io_error: bool = False


@dataclass
class SimHost:
    name: str
    is_powered: bool = True
    boot: int = 1
    rate: float = 1.0
    """How fast its clock runs; 0.99 is 1 % slow."""
    wall_offset_s: float = 0.0
    is_paused: bool = False
    agent_is_alive: bool = True
    agent_is_stopped: bool = False
    warden_is_alive: bool = True
    has_storage: bool = True
    has_uplink: bool = True
    has_beacon: bool = False
    takes_commands: bool = True
    renewals_arrive: bool = True
    replies_arrive: bool = True
    link_is_cut: bool = False
    peers_cut: set[str] = field(default_factory=set)
    power_device: str = "works"
    """works, error, slow, lying, none."""
    power_slow_s: float = 40.0
    kill_s: float = 2.0
    memory_bytes: int = 0
    cpus: int = 0
    capabilities: frozenset[str] = frozenset({"migrate", "backup"})
    lease_sent_s: float | None = None
    """When the last acknowledged renewal was sent; None: no lease since boot."""
    is_revoked_seen: bool = False
    domains: dict[str, Domain] = field(default_factory=dict)
    highest_epoch: dict[str, int] = field(default_factory=dict)
    journal: dict[tuple[str, int], Any] = field(default_factory=dict)
    """What each start answered: a known key gets its recorded answer, whatever arrives late or twice."""
    session_is_open: bool = False
    is_killing: bool = False
    goes_down: bool = False

    @property
    def runs(self) -> bool:
        return self.is_powered and not self.is_paused

    @property
    def agent_acts(self) -> bool:
        return self.runs and self.agent_is_alive and not self.agent_is_stopped

    @property
    def hears_controller(self) -> bool:
        return self.agent_acts and not self.link_is_cut and self.takes_commands and self.replies_arrive

    def lease_ends_s(self, ttl_s: float) -> float:
        """Return when its lease ends, on the world's clock; a slow clock makes it last longer."""
        return float("-inf") if self.lease_sent_s is None else self.lease_sent_s + ttl_s / self.rate

    def has_lease(self, now: float, ttl_s: float) -> bool:
        return now < self.lease_ends_s(ttl_s)

    def cut_power(self) -> None:
        """Lose every process and the lease; disks and the agent's journal stay."""
        self.is_powered = False
        self.is_paused = False
        self.session_is_open = False
        self.lease_sent_s = None
        self.is_killing = False
        for domain in self.domains.values():
            domain.seen = Seen.STOPPED

    def boot_up(self) -> None:
        self.boot += 1
        self.is_powered = True
        self.is_paused = False
        self.agent_is_alive, self.agent_is_stopped, self.warden_is_alive = True, False, True
        self.link_is_cut = False
        self.lease_sent_s = None
        self.session_is_open = False
        self.is_killing = False
        self.goes_down = False

    @property
    def boot_id(self) -> str:
        return f"{self.name}-boot-{self.boot}"

    def writers(self) -> set[str]:
        """Return the vms whose disks a process of this host may write now."""
        return {name for name, domain in self.domains.items() if self.runs and domain.seen is Seen.RUNNING}
