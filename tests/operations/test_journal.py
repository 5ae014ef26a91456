"""The fold of a journal into what is to be done next: every prefix of every saga's journal, forward and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import JournalEntry, OperationError
from trimtab_controller.operations.journal import Finished, Forward, Undo, fold, turned_state
from trimtab_controller.operations.registry import all_sagas
from trimtab_controller.operations.saga import Saga, Step, transaction
from trimtab_protos.errors import Conflict, Internal
from trimtab_protos.messages import Direction

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
FAILURE = OperationError.of(Conflict("no", "it failed"))
every_saga = pytest.mark.parametrize("saga", all_sagas().values(), ids=list(all_sagas()))


def entry(position: int, step: str, *, direction: Direction = Direction.DO, failed: bool = False) -> JournalEntry:
    return JournalEntry(
        position=position,
        step=step,
        direction=direction,
        has_succeeded=not failed,
        turn=1,
        result={} if failed else {"of": step},
        error=FAILURE if failed else None,
        at=BEGAN + timedelta(seconds=position),
    )


def forward(steps: Sequence[Step]) -> list[JournalEntry]:
    return [entry(position, step.name) for position, step in enumerate(steps)]


def going_back(saga: Saga[Any], failed_at: int) -> tuple[list[JournalEntry], list[Step]]:
    """Return the journal up to the failure of a step, and the steps to undo, in order."""
    journal = forward(saga.steps[:failed_at])
    journal.append(entry(failed_at, saga.steps[failed_at].name, failed=True))
    return journal, [step for step in reversed(saga.steps[: failed_at + 1]) if step.undo is not None]


@every_saga
def test_every_prefix_goes_on_with_the_first_step_that_is_not_recorded(saga: Saga[Any]) -> None:
    for length in range(len(saga.steps)):
        position = fold(saga, forward(saga.steps[:length]), is_compensating=False)
        assert isinstance(position.next, Forward)
        assert position.next.step is saga.steps[length]
        assert position.next.is_last == (length == len(saga.steps) - 1)
        assert position.next.is_committed == any(step.pivot for step in saga.steps[:length])
        assert position.results == {step.name: {"of": step.name} for step in saga.steps[:length]}
        assert position.length == length
        assert position.since == (BEGAN + timedelta(seconds=length - 1) if length else None)
        assert position.failure is None


@every_saga
def test_a_complete_journal_has_nothing_left(saga: Saga[Any]) -> None:
    assert fold(saga, forward(saga.steps), is_compensating=False).next == Finished()


@every_saga
def test_every_prefix_of_every_way_back_undoes_the_latest_step_that_is_not_undone(saga: Saga[Any]) -> None:
    for failed_at in range(len(saga.steps)):
        journal, undos = going_back(saga, failed_at)
        for number, step in enumerate(undos):
            position = fold(saga, journal, is_compensating=True)
            assert position.next == Undo(step, is_last=number == len(undos) - 1)
            assert position.failure == FAILURE
            journal.append(entry(len(journal), step.name, direction=Direction.UNDO))
        assert fold(saga, journal, is_compensating=True).next == Finished()


@every_saga
def test_the_step_that_failed_is_undone_too_since_its_effect_is_unknown(saga: Saga[Any]) -> None:
    for failed_at, step in enumerate(saga.steps):
        if step.undo is not None:
            journal, undos = going_back(saga, failed_at)
            assert undos[0] is step
            assert fold(saga, journal, is_compensating=True).next == Undo(step, is_last=len(undos) == 1)


def test_an_effect_that_took_place_after_all_is_gone_forward_from() -> None:
    saga = all_sagas()["vm.migrate"]
    names = [step.name for step in saga.steps]
    move = names.index("move")
    journal, _undos = going_back(saga, move)
    journal.append(entry(len(journal), "move"))
    position = fold(saga, journal, is_compensating=False)
    assert position.next == Forward(saga.steps[move + 1], is_last=False, is_committed=True)
    assert position.results["move"] == {"of": "move"}


def test_what_is_forward_only_is_committed_from_its_first_step() -> None:
    saga = all_sagas()["vm.delete"]
    position = fold(saga, [], is_compensating=False, is_forward_only=True)
    assert position.next == Forward(saga.steps[0], is_last=False, is_committed=True)


def test_a_step_of_a_newer_release_is_not_guessed_at() -> None:
    with pytest.raises(Internal, match="no step teleport"):
        fold(all_sagas()["vm.create"], [entry(0, "teleport")], is_compensating=False)


def test_a_retired_step_counts_for_nothing() -> None:
    saga = Saga(name="a", version=2, params=Nothing, steps=(step_of(0, has_undo=True),), retired=frozenset({"gone"}))
    position = fold(saga, [entry(0, "gone")], is_compensating=False)
    assert position.next == Forward(saga.steps[0], is_last=True, is_committed=False)


def test_what_was_cancelled_ends_as_cancelled() -> None:
    assert turned_state(was_cancelled=True) is OperationState.CANCELLED
    assert turned_state(was_cancelled=False) is OperationState.FAILED


# --- any saga, any walk ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    pass


def step_of(number: int, *, has_undo: bool, pivot: bool = False) -> Step:
    def run(_context: Any) -> None:
        """Never called."""

    if has_undo:
        return transaction(f"step{number}", run, run, pivot=pivot)
    return transaction(f"step{number}", run, None, because="a test", pivot=pivot)


@st.composite
def sagas(draw: st.DrawFn) -> Saga[Any]:
    undos = draw(st.lists(st.booleans(), min_size=1, max_size=8))
    pivot = draw(st.integers(0, len(undos)))
    steps = tuple(step_of(number, has_undo=has_undo, pivot=number == pivot) for number, has_undo in enumerate(undos))
    return Saga(name="any", version=1, params=Nothing, steps=steps)


@given(saga=sagas(), fail_at=st.integers(0, 8))
def test_any_walk_does_each_step_once_and_undoes_it_once_in_reverse(saga: Saga[Any], fail_at: int) -> None:
    journal: list[JournalEntry] = []
    is_compensating = False
    walked: list[tuple[str, Direction]] = []
    for _ in range(4 * len(saga.steps)):
        following = fold(saga, journal, is_compensating=is_compensating).next
        if isinstance(following, Finished):
            break
        if isinstance(following, Forward):
            must_fail = len(journal) == fail_at and not following.is_committed
            journal.append(entry(len(journal), following.step.name, failed=must_fail))
            is_compensating = must_fail
            if not must_fail:
                walked.append((following.step.name, Direction.DO))
        else:
            journal.append(entry(len(journal), following.step.name, direction=Direction.UNDO))
            walked.append((following.step.name, Direction.UNDO))
    assert len(walked) == len(set(walked)), "nothing happens twice"
    done = [name for name, direction in walked if direction is Direction.DO]
    undone = [name for name, direction in walked if direction is Direction.UNDO]
    names = [step.name for step in saga.steps]
    if not is_compensating:
        assert done == names
        return
    reached = names[: len(done) + 1]
    assert undone == [step.name for step in reversed(saga.steps) if step.name in reached and step.undo is not None]
