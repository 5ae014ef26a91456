"""Folds an operation's journal into what is to be done next. Pure, so that every prefix of every journal can be tested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import JournalEntry, Operation, OperationError
from trimtab_controller.operations.saga import Saga, Step
from trimtab_protos.errors import Internal, TrimtabError
from trimtab_protos.messages import Direction


@dataclass(frozen=True, slots=True)
class Forward:
    """Run `step`. `is_last`: its record ends the operation as done. `is_committed`: there is no way back."""

    step: Step
    is_last: bool
    is_committed: bool


@dataclass(frozen=True, slots=True)
class Undo:
    """Undo `step`, which was recorded or may have begun. `is_last`: its record ends the compensation."""

    step: Step
    is_last: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is left to do in this direction."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where an operation stands."""

    next: Forward | Undo | Finished
    results: Mapping[str, Mapping[str, Any]]
    # Of the undos that took place.
    undone: Mapping[str, Mapping[str, Any]]
    # What made the operation turn round; None going forward.
    failure: OperationError | None
    # What it was folded from.
    entries: tuple[JournalEntry, ...]
    is_forward_only: bool

    @property
    def length(self) -> int:
        return len(self.entries)

    @property
    def since(self) -> datetime | None:
        """When the last outcome was recorded: the next step has been tried or waited for since then. None: nothing yet."""
        return self.entries[-1].at if self.entries else None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was journaled, and the operation as it goes on from there."""

    operation: Operation
    entries: tuple[JournalEntry, ...]
    # The operation ended with the last of them.
    end: OperationState | None = None
    # The step after them, taken in the same transaction and undone alone, and what stopped it.
    failure: tuple[Position, Forward, TrimtabError] | None = None


def fold(saga: Saga[Any], entries: Sequence[JournalEntry], *, is_compensating: bool, is_forward_only: bool = False) -> Position:
    """Return the position. Steps of older versions that this one retired count for nothing."""
    known = {step.name for step in saga.steps}
    for entry in entries:
        if entry.step not in known and entry.step not in saga.retired:
            raise Internal("journal-unknown-step", f"{saga.name} has no step {entry.step}; was it begun by a newer release?")
    results, undone = _results(entries, Direction.DO), _results(entries, Direction.UNDO)
    failure = next((entry.error for entry in reversed(entries) if entry.error is not None), None)
    if is_compensating:
        following: Forward | Undo | Finished = _next_undo(saga, set(results), set(undone))
    else:
        following = _next_forward(saga, set(results), is_forward_only)
    return Position(
        next=following,
        results=results,
        undone=undone,
        failure=failure,
        entries=tuple(entries),
        is_forward_only=is_forward_only,
    )


def _results(entries: Sequence[JournalEntry], direction: Direction) -> dict[str, Mapping[str, Any]]:
    """Return what the steps that succeeded in this direction came to, by name."""
    return {entry.step: entry.result for entry in entries if entry.direction is direction and entry.has_succeeded}


def _next_forward(saga: Saga[Any], done: set[str], is_forward_only: bool) -> Forward | Finished:
    remaining = [step for step in saga.steps if step.name not in done]
    if not remaining:
        return Finished()
    is_committed = is_forward_only or any(step.pivot and step.name in done for step in saga.steps)
    return Forward(remaining[0], is_last=len(remaining) == 1, is_committed=is_committed)


def _next_undo(saga: Saga[Any], done: set[str], undone: set[str]) -> Undo | Finished:
    """Every recorded step is undone, latest first, and before them the first unrecorded one, whose effect is unknown."""
    reached: list[Step] = []
    for step in saga.steps:
        reached.append(step)
        if step.name not in done:
            break
    remaining = [step for step in reversed(reached) if step.undo is not None and step.name not in undone]
    return Undo(remaining[0], is_last=len(remaining) == 1) if remaining else Finished()


def turned_state(*, was_cancelled: bool) -> OperationState:
    """Return how a compensated operation ends."""
    return OperationState.CANCELLED if was_cancelled else OperationState.FAILED


def end_of(position: Position, *, is_forward: bool) -> OperationState:
    """Return how an operation ends that has nothing left to do in this direction."""
    if is_forward:
        return OperationState.DONE
    failure = position.failure
    return turned_state(was_cancelled=failure is not None and failure.code in {"cancelled", "job-cancelled"})
