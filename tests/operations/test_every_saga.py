"""Every saga, every step: failed, repeated, cancelled, cut by death before and after every record, on a wire that breaks.

Whatever is done to it, an operation ends; it ends as done or as undone, nothing between; and nothing is left anywhere that no live
row owns (`invariants.py`). Each test proves that it really reached the step that it means.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.examples import EXAMPLES, Example
from tests.operations.faults import (
    INJECTED,
    Behaviour,
    DriverDied,
    Misbehaving,
    MortalDatabase,
    StepFault,
    everything_twice,
)
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.wire import How, WireFault
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.operations.registry import all_sagas, saga_named
from trimtab_controller.operations.saga import Saga, Step
from trimtab_controller.store import operations
from trimtab_protos.messages import Direction

# Run once more by drivers that share commits, as the product's do: of each shape of saga one, and what ends guests.
SHARED = (
    "image.import on a local pool",
    "plan.apply",
    "pool.create",
    "vm.create",
    "vm.create on a local pool",
    "vm.delete",
    "vm.migrate",
    "vm.migrate with its disk",
    "vm.recover",
    "vm.resize",
    "vm.stop",
    "volume.create as a clone on a local pool",
)
every_example = pytest.mark.parametrize(
    ("name", "shares_commits"),
    [
        *(pytest.param(name, False, id=name) for name in sorted(EXAMPLES)),
        *(pytest.param(name, True, id=f"{name}, commits shared") for name in SHARED),
    ],
)

DONE, FAILED, CANCELLED = OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED


def test_every_saga_has_an_example() -> None:
    assert {example.kind for example in EXAMPLES.values()} == set(all_sagas())


# --- parts --------------------------------------------------------------------------------------------------------------------


def is_committed(saga: Saga[Any], step: Step, operation: Operation) -> bool:
    """Tell whether there is no way back when `step` runs."""
    before = saga.steps[: saga.steps.index(step)]
    return saga.is_forward_only(saga.params_from_json(operation.params)) or any(one.pivot for one in before)


def last_uncommitted(saga: Saga[Any], operation: Operation) -> Step | None:
    """Return the last step whose failure undoes the operation; None where none does."""
    return next((step for step in reversed(saga.steps) if not is_committed(saga, step, operation)), None)


def undoable(saga: Saga[Any], operation: Operation) -> list[Step]:
    """Return the steps whose undo runs when the last step before the pivot fails."""
    last = last_uncommitted(saga, operation)
    reached = saga.steps[: saga.steps.index(last) + 1] if last is not None else ()
    return [step for step in reached if step.undo is not None]


def check_end(story: FleetStory, example: Example, operation: Operation, expected: OperationState, what: str) -> Operation:
    """Check the state in which it ended, what its kind promises of that, and every invariant."""
    ended = story.operation(operation.id)
    assert ended.state is expected, f"{what}: {ended.state} instead of {expected}: {ended.error}; {story.journal(operation.id)}"
    if expected is not DONE:
        story.hear_hosts()  # a guest that was asked to end and did is seen so, although the operation was undone
    (example.done if expected is DONE else example.undone)(story, ended)
    violations = audit_invariants(story)
    assert violations == [], f"{what}: {story.journal(operation.id)}"
    return ended


def failed_step(story: FleetStory, operation: Operation) -> str:
    """Return the step at which the operation turned round, from its journal."""
    return next(entry.removeprefix("failed ") for entry in story.journal(operation.id) if entry.startswith("failed "))


# --- one step misbehaves -----------------------------------------------------------------------------------------------------


@every_example
def test_a_step_that_fails_for_good_undoes_everything(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    for step in saga.steps:
        operation = example.arrange(matrix_story)
        fault = StepFault(example.kind, step.name, Behaviour.FAIL_BEFORE)
        matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(fault)))
        assert fault.met == 1
        if is_committed(saga, step, operation):
            check_end(matrix_story, example, operation, DONE, f"{step.name} failed past the pivot")
            continue
        ended = check_end(matrix_story, example, operation, FAILED, f"{step.name} failed")
        assert failed_step(matrix_story, operation) == step.name
        assert ended.error is not None
        assert ended.error.code == INJECTED


@every_example
def test_an_effect_that_took_place_and_reports_failure_is_undone(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    for step in saga.steps:
        if step.is_transaction or step.name in example.takes_place:
            continue
        operation = example.arrange(matrix_story)
        fault = StepFault(example.kind, step.name, Behaviour.FAIL_AFTER)
        matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(fault)))
        assert fault.met == 1
        is_late = is_committed(saga, step, operation)
        check_end(matrix_story, example, operation, DONE if is_late else FAILED, f"{step.name} failed after the fact")
        if not is_late:
            assert failed_step(matrix_story, operation) == step.name


@every_example
def test_a_step_that_is_not_possible_now_is_done_later(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    for step in saga_named(example.kind).steps:
        operation = example.arrange(matrix_story)
        fault = StepFault(example.kind, step.name, Behaviour.UNAVAILABLE, times=2)
        matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(fault)))
        assert fault.met == 2
        check_end(matrix_story, example, operation, DONE, f"{step.name} was not possible at first")


@every_example
def test_every_step_and_every_undo_may_run_twice(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    operation = example.arrange(matrix_story)
    matrix_story.settle(matrix_story.new_engine(saga_of=everything_twice))
    check_end(matrix_story, example, operation, DONE, "everything twice")

    last = last_uncommitted(saga, operation)
    if last is None:
        return
    operation = example.arrange(matrix_story)
    fault = StepFault(example.kind, last.name, Behaviour.FAIL_BEFORE)

    def twice_then_fail(kind: str) -> Saga[Any]:
        return Misbehaving(fault).over(everything_twice(kind))

    matrix_story.settle(matrix_story.new_engine(saga_of=twice_then_fail))
    assert fault.met == 1
    check_end(matrix_story, example, operation, FAILED, f"everything twice, then {last.name} failed")


# --- cancel ------------------------------------------------------------------------------------------------------------------


@every_example
def test_a_cancel_before_any_step_undoes_unless_the_pivot_is_behind(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    for step in saga.steps:
        operation = example.arrange(matrix_story)
        cancel_before(matrix_story, operation, saga, step)
        if matrix_story.shares_commits:
            # What was committed with the step before is done: it is undone too, or there is no way back any more.
            state = matrix_story.operation(operation.id).state
            assert state in {DONE, CANCELLED}
            check_end(matrix_story, example, operation, state, f"cancelled after the commit before {step.name}")
            continue
        expected = DONE if is_committed(saga, step, operation) else CANCELLED
        check_end(matrix_story, example, operation, expected, f"cancelled before {step.name}")
        if expected is CANCELLED:
            assert failed_step(matrix_story, operation) == step.name


def cancel_before(story: FleetStory, operation: Operation, saga: Saga[Any], step: Step) -> None:
    """Ask for a cancel in the instant after the step before `step` was recorded, and go on to the end."""
    index = saga.steps.index(step)
    if index == 0:
        story.cancel(operation.id)
        story.settle()
        return
    asked = []

    def on_step(kind: str, name: str, outcome: str, _seconds: float) -> None:
        is_of_it = (kind, name) == (saga.name, saga.steps[index - 1].name)
        if is_of_it and outcome == "succeeded" and not asked:
            asked.append(name)
            story.cancel(operation.id)

    story.settle(story.new_engine(on_step=on_step))
    assert asked


@every_example
def test_a_cancel_while_an_effect_is_under_way_is_honoured_after_it(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    for step in saga.steps:
        if step.is_transaction:
            continue
        operation = example.arrange(matrix_story)
        fault = StepFault(
            example.kind,
            step.name,
            Behaviour.MEANWHILE,
            meanwhile=lambda cancelled=operation.id: matrix_story.cancel(cancelled),  # type: ignore[misc]
        )
        matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(fault)))
        assert fault.met == 1
        is_too_late = step.pivot or is_committed(saga, step, operation)
        check_end(matrix_story, example, operation, DONE if is_too_late else CANCELLED, f"cancelled during {step.name}")


# --- undos that fail -----------------------------------------------------------------------------------------------------------


@every_example
@pytest.mark.parametrize("behaviour", [Behaviour.UNAVAILABLE, Behaviour.UNKNOWN])
def test_an_undo_that_is_not_possible_now_is_done_later(matrix_story: FleetStory, name: str, behaviour: Behaviour) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    for step in saga.steps:
        operation = example.arrange(matrix_story)
        last = last_uncommitted(saga, operation)
        is_meant = step in undoable(saga, operation) and not (step.is_transaction and behaviour is Behaviour.UNKNOWN)
        if last is None or not is_meant:
            matrix_story.settle()
            continue
        failure = StepFault(example.kind, last.name, Behaviour.FAIL_BEFORE)
        fault = StepFault(example.kind, step.name, behaviour, direction=Direction.UNDO)
        matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(failure, fault)))
        assert fault.met == 1
        check_end(matrix_story, example, operation, FAILED, f"undo of {step.name} was {behaviour.name}")


@every_example
def test_an_undo_that_fails_for_good_asks_for_an_operator_and_goes_on_when_told_to(matrix_story: FleetStory, name: str) -> None:
    example = EXAMPLES[name]
    saga = saga_named(example.kind)
    operation = example.arrange(matrix_story)
    last = last_uncommitted(saga, operation)
    steps = undoable(saga, operation)
    if last is None or not steps:
        return
    failure = StepFault(example.kind, last.name, Behaviour.FAIL_BEFORE)
    fault = StepFault(example.kind, steps[0].name, Behaviour.FAIL_BEFORE, direction=Direction.UNDO, times=None)
    matrix_story.settle(matrix_story.new_engine(saga_of=Misbehaving(failure, fault)))
    parked = matrix_story.operation(operation.id)
    assert (parked.state, parked.step) == (OperationState.NEEDS_ATTENTION, steps[0].name)
    retry(matrix_story, operation)
    matrix_story.settle()
    check_end(matrix_story, example, operation, FAILED, f"undo of {steps[0].name} was retried by an operator")


def retry(story: FleetStory, operation: Operation) -> None:
    story.db.write(lambda session: operations.retry(session, operation.id, actor=story.actor.name, now=story.clock.now()))


# --- death -------------------------------------------------------------------------------------------------------------------


def deaths(
    story: FleetStory,
    example: Example,
    *,
    after_commit: bool,
    saga_of: Callable[[], Callable[[str], Saga[Any]]],
    last: Step | None = None,
) -> Iterator[tuple[Operation, str]]:
    """Let a driver die at its first write, its second, and so on until one lives; yield each operation when it has ended.

    `last`: the step at which it turns round.
    """
    for number in range(1, 1000):
        operation = example.arrange(story)
        database = MortalDatabase(story.db, number, after_commit)
        engine = story.new_engine(db=database, saga_of=saga_of())
        try:
            story.settle(engine)
        except DriverDied:
            story.lose_driver()
            story.settle(story.new_engine(saga_of=engine.saga_of))
        yield operation, f"died {'after' if after_commit else 'before'} commit {number}"
        if not database.has_died:
            steps = saga_named(example.kind).steps
            before = steps[: steps.index(last)] if last is not None else ()
            records = len(before) + 1 + sum(step.undo is not None for step in before) if last is not None else len(steps)
            assert number > (1 if story.shares_commits else records), "it died at every record at least"
            return


@every_example
@pytest.mark.parametrize("after_commit", [False, True], ids=["before", "after"])
def test_a_driver_that_dies_at_any_commit_is_taken_over(matrix_story: FleetStory, name: str, after_commit: bool) -> None:
    example = EXAMPLES[name]
    for operation, what in deaths(matrix_story, example, after_commit=after_commit, saga_of=lambda: saga_named):
        check_end(matrix_story, example, operation, DONE, what)


@pytest.mark.parametrize(
    ("name", "shares_commits", "after_commit"),
    [
        *(pytest.param(name, False, False, id=f"{name}, before") for name in sorted(EXAMPLES)),
        # After them: of each shape of saga one; over all of them it would take as long again as before them.
        *(
            pytest.param(
                name, is_shared, is_after, id=f"{name}{', commits shared' * is_shared}, {'after' if is_after else 'before'}"
            )
            for name in SHARED
            for is_shared, is_after in ((True, False), (False, True), (True, True))
        ),
    ],
)
def test_a_driver_that_dies_at_any_commit_of_an_undo_is_taken_over(
    matrix_story: FleetStory, name: str, after_commit: bool
) -> None:
    example = EXAMPLES[name]
    probe = example.arrange(matrix_story)
    matrix_story.settle()
    last = last_uncommitted(saga_named(example.kind), probe)
    if last is None:
        return

    def failing() -> Misbehaving:
        return Misbehaving(StepFault(example.kind, last.name, Behaviour.FAIL_BEFORE, times=None))

    for operation, what in deaths(matrix_story, example, after_commit=after_commit, saga_of=failing, last=last):
        check_end(matrix_story, example, operation, FAILED, what)


# --- the wire ------------------------------------------------------------------------------------------------------------------


@every_example
@pytest.mark.parametrize("how", [How.UNREACHABLE, How.REPLY_LOST, How.TWICE])
def test_any_command_may_be_lost_or_doubled_on_the_wire(matrix_story: FleetStory, name: str, how: How) -> None:
    example = EXAMPLES[name]
    for number in range(1000):
        operation = example.arrange(matrix_story)
        fault = matrix_story.wire.plan(WireFault(how, after_calls=number))
        matrix_story.settle()
        check_end(matrix_story, example, operation, DONE, f"command {number} was {how.name}")
        if not fault.met.is_set():
            matrix_story.wire.clear()
            return
