"""What a saga is: named steps, each one external effect or one transaction, each with its undo.

A saga file reads top to bottom: step table, Params, steps, one `SAGA = Saga(...)`. The engine (`engine.py`) runs the steps in
order and journals each outcome; a crash anywhere repeats at most the step that was not recorded, so every step and every undo
may run twice. After a step marked `pivot` the saga only rolls forward.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trimtab_controller.core.model import Operation
from trimtab_controller.store.database import Session
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey, Direction

if TYPE_CHECKING:
    from trimtab_controller.agents.client import AgentClient

P = TypeVar("P")
T = TypeVar("T")
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wait:
    """Not finished: run this step again after `seconds`, or when somebody wakes the operation."""

    seconds: float
    waiting_for: str
    progress: Json | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """A cancel hook proved that the step's effect ended without taking place: undo."""


@dataclass(frozen=True, slots=True)
class TookPlace:
    """An undo found that the step's effect did take place after all and cannot be taken back: go forward from it."""

    result: Json


StepResult = Json | Wait | None


@dataclass(frozen=True, slots=True)
class Context(Generic[P]):
    """What every step sees. `results` holds the journaled results of the steps before, by step name."""

    operation: Operation
    params: P
    results: Mapping[str, Json]
    now: datetime


@dataclass(frozen=True, slots=True)
class Transaction(Context[P]):
    """A step that is one SQL transaction; the engine records its outcome in the same one, so it takes place exactly once.

    `undone` holds, for an undo, the results of the undos before it.
    """

    session: Session
    undone: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Effect(Context[P]):
    """A step that is one external effect. It may read, then call agents; it writes nothing to SQL."""

    agents: "AgentClient"
    read: Callable[[Callable[[Session], Any]], Any]
    step: str
    direction: Direction
    # Seconds since the step before it was recorded: how long this one has been tried or waited for.
    waited_s: float = 0.0

    def key(self, *, subject_id: str, epoch: int = 0, part: str = "", direction: Direction | None = None) -> CommandKey:
        """Return the command's identity; `part` tells several commands of one step apart."""
        return CommandKey(
            operation_id=self.operation.id,
            step=f"{self.step}/{part}" if part else self.step,
            direction=direction or self.direction,
            turn=self.operation.turn,
            subject_id=subject_id,
            epoch=epoch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One row of the table. `do` and `undo` take a Transaction or an Effect, by `is_transaction`."""

    name: str
    do: Callable[[Any], StepResult]
    undo: Callable[[Any], StepResult | TookPlace] | None
    is_transaction: bool
    # Why there is nothing to undo.
    because: str = ""
    # Once recorded, there is no way back.
    pivot: bool = False
    # Called instead of `do` when a cancel is asked for while the step waits: Stopped, Wait, or the result (too late).
    cancel: Callable[[Any], StepResult | Stopped] | None = None
    # Of an effect: its result where the results of earlier steps show that nothing is to be done, else None.
    known: Callable[[Mapping[str, Json]], Json | None] | None = None

    def __post_init__(self) -> None:
        if (self.undo is None) == (self.because == ""):
            raise ValueError(f"step {self.name}: give an undo, or the reason why there is none")


def transaction(
    name: str,
    do: Callable[[Transaction[Any]], StepResult],
    undo: Callable[[Transaction[Any]], StepResult] | None,
    *,
    because: str = "",
    pivot: bool = False,
) -> Step:
    return Step(name=name, do=do, undo=undo, is_transaction=True, because=because, pivot=pivot)


def effect(
    name: str,
    do: Callable[[Effect[Any]], StepResult],
    undo: Callable[[Effect[Any]], StepResult | TookPlace] | None,
    *,
    because: str = "",
    pivot: bool = False,
    cancel: Callable[[Effect[Any]], StepResult | Stopped] | None = None,
    known: Callable[[Mapping[str, Json]], Json | None] | None = None,
) -> Step:
    return Step(name=name, do=do, undo=undo, is_transaction=False, because=because, pivot=pivot, cancel=cancel, known=known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saga(Generic[P]):
    """A kind of operation. Step names are stable: release N finishes journals that release N-1 began."""

    name: str
    version: int
    params: type[P]
    steps: tuple[Step, ...]
    # At most one live exclusive operation per subject.
    is_exclusive: bool = True
    # Whether there is no way back from the moment of acceptance: a cancel comes too late.
    is_forward_only: Callable[[P], bool] = lambda _params: False
    # Result shown to the user, from the journaled results.
    result: Callable[[Mapping[str, Json]], Json] = lambda _results: {}
    # Names of steps that older versions journaled and this one no longer has.
    retired: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if len(names) != len(set(names)):
            raise ValueError(f"saga {self.name}: two steps share a name")

    def params_from_json(self, document: Json) -> P:
        """Return the Params. InvalidRequest on a missing or unknown field: a defect on the accepting side."""
        fields = {field.name: field for field in dataclasses.fields(self.params)}  # type: ignore[arg-type]
        unknown = document.keys() - fields.keys()
        if unknown:
            raise InvalidRequest("params-unknown", f"{self.name} takes no {', '.join(sorted(unknown))}")
        try:
            return self.params(**document)
        except TypeError as error:
            raise InvalidRequest("params-missing", f"{self.name}: {error}") from error
