"""A guest is held until its release or its bound, and a release never tells of a stillness that was over."""

import threading

import pytest

from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.holding import HOLD_MAX_S, HoldReport, Holds, HoldState
from trimtab_protos.errors import InvalidRequest


def held_in_a_thread(
    holds: Holds, *, bound_s: float = 10.0, is_cancelled: threading.Event | None = None
) -> tuple[threading.Thread, list[HoldReport]]:
    ends: list[HoldReport] = []
    cancelled = is_cancelled or threading.Event()
    thread = threading.Thread(
        target=lambda: ends.append(holds.hold("inst-1", "vm-1", bound_s=bound_s, is_cancelled=cancelled.is_set)), daemon=True
    )
    thread.start()
    assert holds.wait_for("inst-1", "vm-1", timeout_s=20).state is HoldState.HELD
    return thread, ends


def test_a_release_lets_it_go_on_and_says_that_it_was_still_also_when_asked_again() -> None:
    holds = Holds(ManualClock())
    thread, ends = held_in_a_thread(holds)
    assert holds.release("inst-1", "vm-1").state is HoldState.RELEASED
    thread.join(20)
    assert [one.state for one in ends] == [HoldState.RELEASED]
    assert holds.release("inst-1", "vm-1").state is HoldState.RELEASED


def test_at_the_bound_it_goes_on_by_itself_and_a_late_release_is_told_so() -> None:
    clock = ManualClock()
    holds = Holds(clock)
    thread, ends = held_in_a_thread(holds, bound_s=10.0)
    clock.advance(11)
    thread.join(20)
    assert [one.state for one in ends] == [HoldState.EXPIRED]
    assert holds.release("inst-1", "vm-1").state is HoldState.EXPIRED


def test_a_release_before_the_hold_means_that_it_is_never_held() -> None:
    holds = Holds(ManualClock())
    assert holds.release("inst-1", "vm-1").state is HoldState.ABANDONED
    assert holds.hold("inst-1", "vm-1", bound_s=10, is_cancelled=lambda: False).state is HoldState.ABANDONED


def test_a_job_that_is_run_again_is_of_another_instant_whatever_was_told_before() -> None:
    holds = Holds(ManualClock())
    thread, _ends = held_in_a_thread(holds)
    holds.release("inst-1", "vm-1")
    thread.join(20)
    assert holds.hold("inst-1", "vm-1", bound_s=10, is_cancelled=lambda: False).state is HoldState.EXPIRED


def test_a_cancelled_job_holds_nobody() -> None:
    holds, cancelled = Holds(ManualClock()), threading.Event()
    thread, ends = held_in_a_thread(holds, is_cancelled=cancelled)
    cancelled.set()
    thread.join(20)
    assert [one.state for one in ends] == [HoldState.EXPIRED]


def test_nobody_is_held_for_longer_than_the_host_allows() -> None:
    with pytest.raises(InvalidRequest, match="hold_max_ms"):
        Holds(ManualClock()).hold("inst-1", "vm-1", bound_s=HOLD_MAX_S + 1, is_cancelled=lambda: False)
