"""What is known of a guest's agent over its guest's runs: missed is only one that was there."""

import pytest

from trimtab_controller.core.guest_agents import GuestAgent, follow
from trimtab_controller.core.lifecycle import ObservedState

NEVER, ANSWERS, SILENT, RESTING = GuestAgent.NEVER, GuestAgent.ANSWERS, GuestAgent.SILENT, GuestAgent.RESTING


@pytest.mark.parametrize(
    ("known", "when_heard", "when_silent", "when_off"),
    [
        (NEVER, ANSWERS, NEVER, NEVER),
        (ANSWERS, ANSWERS, SILENT, RESTING),
        (SILENT, ANSWERS, SILENT, RESTING),
        (RESTING, ANSWERS, SILENT, RESTING),
    ],
)
def test_an_agent_is_missed_from_when_its_guest_runs_without(
    known: GuestAgent, when_heard: GuestAgent, when_silent: GuestAgent, when_off: GuestAgent
) -> None:
    assert follow(known, ObservedState.RUNNING, is_heard=True) is when_heard
    assert follow(known, ObservedState.RUNNING, is_heard=False) is when_silent
    for state in (ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED):
        assert follow(known, state, is_heard=False) is when_off


@pytest.mark.parametrize("state", [ObservedState.PAUSED, ObservedState.UNKNOWN, ObservedState.INCOMING])
@pytest.mark.parametrize("known", list(GuestAgent))
def test_a_guest_that_does_not_run_of_its_own_tells_nothing(state: ObservedState, known: GuestAgent) -> None:
    assert follow(known, state, is_heard=False) is known
