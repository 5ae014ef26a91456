"""What can happen to the failover core. Each event is a fact that somebody observed; times of facts ride inside it."""

from dataclasses import dataclass

from trimtab_controller.core.failover.records import Desired, Seen, VmRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderStarted:
    """This process leads now. Whatever was loaded from the store is in the state; its instants belong to another clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """About once a second. `has_lease` was checked just before; `has_uplink`: our own way to the hosts is not in doubt."""

    has_lease: bool = True
    has_uplink: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """A gateway handled a renewal, or the beacon's slot was read with a new beat, at `at_s` of our clock."""

    host: str
    at_s: float
    boot_id: str = ""
    is_granted: bool = True
    is_lease_live: bool = True
    """The host itself holds its lease as live: it saw our acknowledgement lately."""
    is_armed: bool = False
    """Its warden said so with this very renewal; silence about it is a no."""
    kill_s: float = 0.0
    has_uplink: bool = True
    """The guests' network has its carrier."""
    has_storage: bool = True
    lost_pools: frozenset[str] = frozenset()
    """Which storage it is that it has not; none named: all."""
    takes_commands: bool = True
    """Our calls reach its agent."""
    is_beacon: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantingEnded:
    """Every live gateway acknowledged, or its own lease ended; none handled a renewal after `handled_s`."""

    host: str
    handled_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentWritten:
    """The fence intent is durable on the shared storage since `at_s`."""

    host: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentProven:
    """The fence intent was read again. `why`: it did not stand there all the time, so the wait begins anew; '' : it did."""

    host: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerAnswered:
    """`is_off`: the device was told to switch off *and* its status was read back as off."""

    host: str
    path: str
    number: int
    is_off: bool
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmedOff:
    host: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedCleanly:
    """The agent stopped these vms, saw their processes end, and its host goes down."""

    host: str
    vms: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """A host opens a session (again) and lists everything that it holds (vm -> what, epoch). A fenced or lost
    host has no lease yet."""

    host: str
    boot_id: str
    domains: tuple[tuple[str, int, Seen], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A host with a live session says what one vm's domain is there now."""

    vm: str
    host: str
    epoch: int
    seen: Seen
    is_io_error: bool = False
    was_crash: bool = False
    """It ended by itself: crash, kill, or removed by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEnded:
    vm: str
    host: str
    epoch: int
    is_running: bool
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEnded:
    vm: str
    host: str
    is_gone: bool
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveEnded:
    """Both hosts were asked after a migration: `host` has the guest; '': neither has it, or (not proven) nobody could tell."""

    vm: str
    epoch: int
    host: str
    is_proven: bool
    """Every other holder was observed absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wished:
    vm: str
    desired: Desired


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    vm: VmRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAsked:
    vm: str
    target: str
    is_live: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    vm: str
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceAsked:
    host: str
    is_on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownAsked:
    host: str
    is_reboot: bool
    policy: str
    """conditional, freeze, failover, migrate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseAsked:
    is_on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAsked:
    """Recover this host although failover is frozen."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedCorrupt:
    vm: str


Event = (
    LeaderStarted
    | Tick
    | Renewed
    | GrantingEnded
    | IntentWritten
    | IntentProven
    | PowerAnswered
    | ConfirmedOff
    | ClosedCleanly
    | SessionOpened
    | Observed
    | StartEnded
    | StopEnded
    | MoveEnded
    | Wished
    | Added
    | MoveAsked
    | StopAsked
    | MaintenanceAsked
    | ShutdownAsked
    | PauseAsked
    | ReleaseAsked
    | MarkedCorrupt
)
