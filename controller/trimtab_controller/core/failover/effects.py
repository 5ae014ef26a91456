"""What the failover core wants done. An effect may be repeated: each is "ensure", and its outcome comes back as an event."""

from dataclasses import dataclass

from trimtab_controller.core.failover.records import Evidence, Proof
from trimtab_controller.core.lifecycle import HostConnectivity


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStanding:
    """Record the host's standing and its evidence, durably, before anything that follows from it."""

    host: str
    standing: HostConnectivity
    evidence: tuple[Evidence, ...]
    proof: Proof | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndGranting:
    """Commit a revocation: no gateway grants to this host any more; answer with GrantingEnded."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteIntent:
    """Write the fence intent where the host's beacon reads it; answer with IntentWritten."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveIntent:
    """Read the fence intent once more, now that the bound has passed since it was written; answer with IntentProven."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeGranting:
    """Lift the revocation: the host may renew again, on both channels."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOff:
    """Switch off by this path and read the status back. The doer checks our lease and the host's silence once more first."""

    host: str
    path: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartVm:
    """One transaction: supersede the vm's live operation, assign it to `host` under `epoch`, move its claim; then start it."""

    vm: str
    host: str
    epoch: int
    is_recovery: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StopVm:
    vm: str
    host: str
    epoch: int
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DestroyCopy:
    """Destroy what this host holds of the vm up to `epoch` and observe it absent; answer with Observed."""

    vm: str
    host: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveLeftover:
    """Undefine a stopped definition of a vm whose new home was seen running."""

    vm: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveVm:
    """Migrate (live) or relocate. Both hosts are holders until MoveEnded says what was observed."""

    vm: str
    source: str
    target: str
    epoch: int
    is_live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeVm:
    """Let the paused guest of a broken move run on; its other side was observed absent and the token is recorded."""

    vm: str
    host: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleMove:
    """Record that this side of a broken move is the vm's home: every other holder is proven gone."""

    vm: str
    host: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Ask this host what it holds of the vm; answer with Observed."""

    vm: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoDown:
    """The host may stop its remaining guests cleanly, report ClosedCleanly, and go down (or reboot)."""

    host: str
    is_reboot: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    subject: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """An operator's request that is not carried out, and why."""

    subject: str
    code: str
    message: str


Effect = (
    SetStanding
    | EndGranting
    | WriteIntent
    | ProveIntent
    | ResumeGranting
    | PowerOff
    | StartVm
    | StopVm
    | DestroyCopy
    | RemoveLeftover
    | MoveVm
    | ResumeVm
    | SettleMove
    | Inspect
    | GoDown
    | Alarm
    | Refuse
)
