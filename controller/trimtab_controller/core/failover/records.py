"""What the failover core knows: hosts, vms, rules. Frozen; `Draft` (draft.py) makes the next state.

    host:  new -> up -> suspect -> lost -> fenced -> (comes back) -> up          suspect and lost may return to up, none is skipped
    vm:    settled -> recovering -> starting -> settled                          a host was fenced: every holder is proven gone
           settled -> restarting -> starting                                     the guest ended alone
           settled -> moving -> settled | recovering                             two holders until one side is observed
           any -> needs_attention                                                only an operator goes on
Times are seconds of the leader's CLOCK_BOOTTIME; `LeaderStarted` says what becomes of them on another machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from trimtab_controller.core.failover.settings import FailoverSettings
from trimtab_controller.core.lifecycle import HostConnectivity

NEVER_S = float("-inf")


class Proof(StrEnum):
    """The ladder: what makes certain that a host's guests can no longer write. Only these lead to `fenced`."""

    CLEAN_STOP = "clean_stop"
    POWER_OFF = "power_off"
    LEASE_BOUND = "lease_bound"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One line of a host's timeline. `proof` is set where it proves the host silent for good."""

    at_s: float
    what: str
    proof: Proof | None = None


class Closing(StrEnum):
    """What becomes of the guests of a host that was asked to go down."""

    NO = "no"
    FREEZE = "freeze"  # stopped, kept for this host, started here again
    RECOVER = "recover"  # stopped, started elsewhere
    DRAIN = "drain"  # moved first


class Hold(StrEnum):
    """Maintenance."""

    NO = "no"
    DRAINING = "draining"
    HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerTry:
    """A power-off under way or its last failure."""

    path: str
    number: int
    at_s: float
    is_under_way: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    id: str
    standing: HostConnectivity = HostConnectivity.NEW
    since_s: float = NEVER_S
    heard_s: float = NEVER_S
    """When the latest renewal of a host with a live lease was handled, on either channel."""
    handled_s: float = NEVER_S
    """When the latest renewal was *granted*, whether or not the host learned of it: what its lease is counted from."""
    is_armed: bool = False
    """Its warden reported itself armed with the latest renewal."""
    kill_s: float = 0.0
    """K as the host measured it; 0: not reported."""
    boot_id: str = ""
    degraded: tuple[str, ...] = ()
    """What is wrong with a host that lives: never a reason to call it dead."""
    has_storage: bool = True
    has_storage_since_s: float = NEVER_S
    lost_pools: frozenset[str] = frozenset()
    """Of one without storage: the pools that it does not reach; none named: all."""
    power_paths: tuple[str, ...] = ()
    """Names of the power devices, in order of use."""
    power: PowerTry | None = None
    ends_granting_since_s: float | None = None
    """Since when we want granting ended and the fence intent written; None: the host may renew."""
    granting_ended: bool = False
    intent_s: float | None = None
    """When the fence intent was durable on the shared storage (or there is none to write it to)."""
    has_beacon: bool = False
    """It renews its lease on shared storage as well: only a fence intent that stood there all the time ends its lease."""
    intent_is_proven: bool = False
    """The intent was read again after the bound had passed, and was still ours."""
    evidence: tuple[Evidence, ...] = ()
    proof: Proof | None = None
    was_armed_at_loss: bool = False
    clean_vms: frozenset[str] | None = None
    """Vms that the agent confirmed stopped before its host went down; None: it said nothing."""
    hold: Hold = Hold.NO
    closing: Closing = Closing.NO
    is_reboot: bool = False
    closing_since_s: float = NEVER_S
    may_go_down: bool = False
    losses: tuple[float, ...] = ()
    quarantined_until_s: float = NEVER_S
    is_released: bool = False
    """An operator let recovery of this host go on although failover is frozen."""
    memory_bytes: int = 0
    cpus: int = 0
    is_cordoned: bool = False
    has_listed: bool = False
    """Since this leader began, the host listed all that it holds. Until every live host has, nothing is started: the store may
    have lost its last second, and with it a start that took place."""
    leftovers: frozenset[str] = frozenset()
    """Vms that moved away and whose stopped definition is still here."""


class Desired(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    """Off, but re-homed when its host dies."""
    DISABLED = "disabled"
    """Off and left alone."""
    DELETED = "deleted"
    IGNORED = "ignored"
    """Not ours to keep (ha=none or taken out by its owner)."""


class Phase(StrEnum):
    SETTLED = "settled"
    STARTING = "starting"
    STOPPING = "stopping"
    MOVING = "moving"
    RESTARTING = "restarting"
    RECOVERING = "recovering"
    NEEDS_ATTENTION = "needs_attention"


class Seen(StrEnum):
    """What was last proven of the guest; `unknown` where no host could be asked."""

    UNKNOWN = "unknown"
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    STOPPED = "stopped"
    ABSENT = "absent"


GONE = frozenset({Seen.STOPPED, Seen.ABSENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A host that may hold the vm's disks open for writing, under an epoch."""

    host: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    id: str
    desired: Desired = Desired.RUNNING
    is_local: bool = False
    """A writable disk lies on its host alone: nothing to restart elsewhere, and the warden does not kill it."""
    pools: frozenset[str] = frozenset()
    """Where its disks lie; none named: anywhere."""
    is_corrupt: bool = False
    """An image was marked corrupt: starting it again could destroy the rest."""
    priority: int = 0
    """Higher starts first."""
    name: str = ""
    """What people call it; '' : by its id."""
    project: str = ""
    group: str = ""
    """Its start group, '' for none. Groups of one name in two projects are two."""
    group_order: int = 0
    start_delay_s: float = 0.0
    """After the vms of lower order in its group; without a group after the proof that its host is off."""
    cpus: float = 0.0
    memory_bytes: int = 0
    host: str = ""
    epoch: int = 0
    holders: tuple[Holder, ...] = ()
    phase: Phase = Phase.SETTLED
    since_s: float = NEVER_S
    seen: Seen = Seen.UNKNOWN
    seen_s: float = NEVER_S
    has_lost_storage: bool = False
    """Paused by an I/O error on its disks: its host does not reach them. One that somebody else paused is nobody's to move."""
    why: str = ""
    not_before_s: float = NEVER_S
    restarts: int = 0
    """Failed starts on this host since it last ran."""
    relocations: int = 0
    failed_hosts: tuple[str, ...] = ()
    crashes: tuple[float, ...] = ()
    max_restart: int = 1
    max_relocate: int = 1
    has_failback: bool = True
    move_to: str = ""
    is_live_move: bool = True
    fallback: str = ""
    """Where it was before a drain; it goes back there when the host is free again."""
    is_end_unknown: bool = False
    """Nobody could tell how its move ended: both hosts are asked until one side is proven."""
    sides: Mapping[str, Seen] = field(default_factory=dict)
    """During a move whose end is not known: what each holder said since."""
    token: str = ""
    """The side of its latest broken move that went on, recorded before the other was destroyed."""
    ran_s: float = NEVER_S
    recoveries: int = 0

    @property
    def is_kept(self) -> bool:
        return self.desired in {Desired.RUNNING, Desired.STOPPED}

    @property
    def called(self) -> str:
        return self.name or self.id


def reaches_disks(host: HostRecord, vm: VmRecord) -> bool:
    """Tell whether the host has the storage of the vm; what is not named counts as lost."""
    return host.has_storage or bool(vm.pools and host.lost_pools and not vm.pools & host.lost_pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRule:
    """Where vms may run. Higher numbers in `hosts` are preferred; a strict rule forbids all other hosts."""

    vms: frozenset[str]
    hosts: Mapping[str, int]
    is_strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TogetherRule:
    vms: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApartRule:
    vms: frozenset[str]


Rule = HostRule | TogetherRule | ApartRule


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that the core decides on."""

    settings: FailoverSettings = field(default_factory=FailoverSettings)
    hosts: Mapping[str, HostRecord] = field(default_factory=dict)
    vms: Mapping[str, VmRecord] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    judging_from_s: float = NEVER_S
    """Silence before this instant means nothing: we were paused, new, or without our own lease."""
    started_s: float = NEVER_S
    """When this leader began: every lease counts as renewed then."""
    ticked_s: float = NEVER_S
    frozen: str = ""
    """Why failover does nothing now; empty: it works."""
    is_paused: bool = False
    """An operator paused it."""
    tombstones: frozenset[str] = frozenset()

    @property
    def is_frozen(self) -> bool:
        return bool(self.frozen) or self.is_paused
