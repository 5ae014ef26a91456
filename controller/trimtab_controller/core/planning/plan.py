"""What a plan is: ordered steps that were reviewed before they are applied, and what stands in their way. Frozen; see `__init__`.

A plan is a forecast until it is applied. It is pinned to what it read (`Pin`), refused at apply where that changed in a way that
matters (`staleness.py`), and each step is checked again when its turn comes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

# Of the stored form; a reader that knows only older ones can say so.
_FORMAT = 1


class PlanKind(StrEnum):
    DRAIN = "drain"
    REBALANCE = "rebalance"
    CONSOLIDATE = "consolidate"
    # Restart of the vms of hosts that are proven dead.
    EVACUATE = "evacuate"
    # Host after host: drain, hold until the operator ends the maintenance, open again.
    UPGRADE = "upgrade"
    # Volumes leave a pool.
    DRAIN_POOL = "drain-pool"
    # The way back from a plan that was applied.
    UNDO = "undo"


class StepKind(StrEnum):
    CORDON = "cordon"
    MIGRATE = "migrate"
    # Stop, move, start: for a vm that cannot move while it runs and whose owner allows it.
    RESTART = "restart"
    # Start elsewhere what ran on a fenced host.
    RECOVER = "recover"
    # Wait until the operator ends the maintenance of the host.
    HOLD = "hold"
    UNCORDON = "uncordon"
    # A volume goes to another pool of its host.
    MOVE_VOLUME = "move-volume"


VM_STEPS = frozenset({StepKind.MIGRATE, StepKind.RESTART, StepKind.RECOVER})


class Cause(StrEnum):
    """Why a vm stays where it is."""

    DEVICE = "device"
    LOCAL_DISK = "local-disk"
    NO_TARGET = "no-target"
    ANTI_AFFINITY = "anti-affinity"
    BUSY = "busy"
    BACKUP = "backup"
    DRAIN_POLICY = "drain-policy"
    NOT_FENCED = "not-fenced"
    NOT_PROTECTED = "not-protected"
    STATE_UNKNOWN = "state-unknown"
    NOT_RUNNING = "not-running"
    DEADLINE = "deadline"
    NO_ROOM = "no-room"
    VOLUME_STAYS = "volume-stays"
    IMAGE_STAYS = "image-stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocker:
    """One vm (or host) in the way, with the command that clears it."""

    cause: Cause
    vm_id: str
    vm_name: str
    host_id: str
    message: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One object that the plan read. Where the version moved, the fingerprint says whether what mattered did."""

    object_id: str
    name: str
    version: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change. A forecast in its target and times; `after` and the source are binding."""

    position: int
    kind: StepKind
    host_id: str
    """The host that is left, cordoned, held or opened."""
    vm_id: str = ""
    vm_name: str = ""
    target_host_id: str = ""
    after: tuple[int, ...] = ()
    """Positions of the steps that must be done first: they free what this one needs."""
    is_target_fixed: bool = False
    """False: the scheduler picks the target when the step's turn comes."""
    copied_bytes: int = 0
    """Memory and local disks that go over the network."""
    starts_s: float = 0.0
    """Forecast, from the start of the plan."""
    ends_s: float = 0.0
    why: str = ""
    volume_id: str = ""
    """Of a step that moves a volume; its host is the one that does the work."""
    volume_name: str = ""
    pool_id: str = ""
    target_pool_id: str = ""

    @property
    def moves_vm(self) -> bool:
        return self.kind in VM_STEPS

    @property
    def takes_slot(self) -> bool:
        return self.moves_vm or self.kind is StepKind.MOVE_VOLUME


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPeak:
    """The most that one target carries at any moment of the plan, as shares of its limits."""

    host_id: str
    host_name: str
    vcpus_share: float
    memory_share: float
    load_share: float
    """Predicted CPU use; 0 where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    kind: PlanKind
    scope: tuple[str, ...]
    """Ids of the hosts that the plan is about; empty: the fleet."""
    steps: tuple[Step, ...]
    blockers: tuple[Blocker, ...] = ()
    pins: tuple[Pin, ...] = ()
    peaks: tuple[TargetPeak, ...] = ()
    duration_s: float = 0.0
    """Forecast until the last step is done; a hold counts nothing, since people decide it."""
    deadline_s: float | None = None
    late: str = ""
    """The vm that is still on its way when the deadline passes, in a sentence; '' where all are in time."""
    summary: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    """Figures that the plan improves, as they are."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """The same after the plan."""

    @property
    def moves(self) -> tuple[Step, ...]:
        """The steps that move a vm or a volume."""
        return tuple(step for step in self.steps if step.takes_slot)

    @property
    def is_empty(self) -> bool:
        return not self.steps

    def as_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Plan":
        """Return the plan of a stored document. ValueError for a form of a later release."""
        if document["format"] != _FORMAT:
            raise ValueError(f"plan in form {document['format']}, known is {_FORMAT}")
        return cls(
            kind=PlanKind(document["kind"]),
            scope=tuple(document["scope"]),
            steps=tuple(_step(one) for one in document["steps"]),
            blockers=tuple(Blocker(**{**one, "cause": Cause(one["cause"])}) for one in document["blockers"]),
            pins=tuple(Pin(**one) for one in document["pins"]),
            peaks=tuple(TargetPeak(**one) for one in document["peaks"]),
            duration_s=document["duration_s"],
            deadline_s=document["deadline_s"],
            late=document["late"],
            summary=document["summary"],
            before=dict(document["before"]),
            expected=dict(document["expected"]),
        )


def _step(document: Mapping[str, Any]) -> Step:
    return Step(**{**document, "kind": StepKind(document["kind"]), "after": tuple(document["after"])})


def undo_steps(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the way back from these steps, last first; each waits for the one before, so that no room is needed twice.

    Pass the steps that were done, with the targets that they got. Hosts are opened before anything returns to them, and shut after
    everything has left. Holds have no way back; a recovered vm does not return, since its host is dead.
    """
    done = tuple(steps)
    marks = [step for step in done if step.kind in {StepKind.CORDON, StepKind.UNCORDON}]
    first, last = {step.host_id: step.kind for step in reversed(marks)}, {step.host_id: step.kind for step in marks}
    opened = [(StepKind.UNCORDON, host_id) for host_id, kind in last.items() if first[host_id] is kind is StepKind.CORDON]
    shut = [(StepKind.CORDON, host_id) for host_id, kind in last.items() if first[host_id] is kind is StepKind.UNCORDON]
    back = [Step(position=0, kind=kind, host_id=host_id, why="undo") for kind, host_id in opened]
    back += [
        replace(step, host_id=step.target_host_id, target_host_id=step.host_id, is_target_fixed=True, why="undo")
        for step in reversed(done)
        if step.kind in {StepKind.MIGRATE, StepKind.RESTART}
    ]
    back += [
        replace(step, pool_id=step.target_pool_id, target_pool_id=step.pool_id, why="undo")
        for step in reversed(done)
        if step.kind is StepKind.MOVE_VOLUME
    ]
    back += [Step(position=0, kind=kind, host_id=host_id, why="undo") for kind, host_id in shut]
    return tuple(
        replace(step, position=position, after=(position - 1,) if position else (), starts_s=0.0, ends_s=0.0)
        for position, step in enumerate(back)
    )
