"""What can go wrong with one step, given to the engine as a saga whose step misbehaves, or as a database that dies under it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, TypeVar

from trimtab_controller.operations.registry import saga_named
from trimtab_controller.operations.saga import Effect, Saga, Step, Transaction, Wait
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict, DeadlineExceeded, TrimtabError, Unavailable
from trimtab_protos.messages import Direction

T = TypeVar("T")

INJECTED = "injected-by-a-test"


class Behaviour(Enum):
    FAIL_BEFORE = auto()
    """The step raises for good and did nothing."""
    FAIL_AFTER = auto()
    """The step takes effect, then raises for good."""
    UNAVAILABLE = auto()
    """The step raises what is tried again, and did nothing."""
    UNKNOWN = auto()
    """The step takes effect, then its caller's deadline ends."""
    TWICE = auto()
    """The step runs twice in a row."""
    MEANWHILE = auto()
    """Something else happens (`meanwhile`) just before the step runs."""


@dataclass(slots=True, eq=False)
class StepFault:
    """Lets one step of one kind misbehave, `times` times (None: always)."""

    kind: str
    step: str
    behaviour: Behaviour
    direction: Direction = Direction.DO
    times: int | None = 1
    meanwhile: Callable[[], None] = lambda: None
    met: int = 0

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(context: Any) -> Any:
            if self.times is not None and self.met >= self.times:
                return run(context)
            return self._misbehave(run, context)

        return wrapped

    def _misbehave(self, run: Callable[[Any], Any], context: Any) -> Any:
        if self.behaviour in {Behaviour.FAIL_AFTER, Behaviour.UNKNOWN}:
            result = run(context)
            if isinstance(result, Wait):
                return result  # it has not taken effect yet
            self.met += 1
            if self.behaviour is Behaviour.UNKNOWN:
                raise DeadlineExceeded(INJECTED, "who knows")
            raise Conflict(INJECTED, "a permanent failure, after the fact")
        self.met += 1
        match self.behaviour:
            case Behaviour.FAIL_BEFORE:
                raise Conflict(INJECTED, "a permanent failure")
            case Behaviour.UNAVAILABLE:
                raise Unavailable(INJECTED, "not now")
            case Behaviour.TWICE:
                return run_twice(run, context)
            case _:
                self.meanwhile()
                return run(context)


class Misbehaving:
    """Finds sagas as the registry does, with these faults built in: what an engine takes as `saga_of`."""

    def __init__(self, *faults: StepFault) -> None:
        self._faults = faults

    def __call__(self, name: str) -> Saga[Any]:
        return self.over(saga_named(name))

    def over(self, saga: Saga[Any]) -> Saga[Any]:
        """Return this saga with the faults built in."""
        for fault in self._faults:
            if fault.kind == saga.name:
                saga = replace(saga, steps=tuple(_with(step, fault) for step in saga.steps))
        return saga


def everything_twice(name: str) -> Saga[Any]:
    """Return the saga with every do and every undo run two times."""
    saga = saga_named(name)
    steps = tuple(_with(_with(step, _twice(step, Direction.DO)), _twice(step, Direction.UNDO)) for step in saga.steps)
    return replace(saga, steps=steps)


def run_twice(run: Callable[[Any], Any], context: Effect[Any] | Transaction[Any]) -> Any:
    """Run an effect twice; run a transaction, roll it back (as after a deadlock), and run it again."""
    if isinstance(context, Transaction):
        nested = context.session.begin_nested()
        run(context)
        nested.rollback()
        return run(context)
    try:
        run(context)
    except TrimtabError as error:
        if not error.retryable:
            raise
    return run(context)


def _with(step: Step, fault: StepFault) -> Step:
    if fault.step != step.name:
        return step
    if fault.direction is Direction.DO:
        # What the engine knows without running the step cannot misbehave: run it.
        return replace(step, do=fault.wrap(step.do), known=None)
    return step if step.undo is None else replace(step, undo=fault.wrap(step.undo))


def _twice(step: Step, direction: Direction) -> StepFault:
    return StepFault("", step.name, Behaviour.TWICE, direction=direction, times=None)


# --- death --------------------------------------------------------------------------------------------------------------------


class DriverDied(BaseException):
    """The driver's process ended here: nothing after this instant happens. No handler of errors may catch it."""


@dataclass(slots=True, eq=False)
class MortalDatabase:
    """The database as a driver sees it that dies at its n-th write: before its commit, or right after it."""

    real: Database
    dies_at_write: int
    after_commit: bool
    writes: int = field(default=0)
    has_died: bool = field(default=False)

    def read(self, query: Callable[[Session], T]) -> T:
        return self.real.read(query)

    def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        self.writes += 1
        if self.writes != self.dies_at_write:
            return self.real.write(transaction, durable=durable)
        self.has_died = True
        if self.after_commit:
            self.real.write(transaction, durable=durable)
            raise DriverDied

        def cut(session: Session) -> T:
            transaction(session)
            raise DriverDied

        return self.real.write(cut, durable=durable)
