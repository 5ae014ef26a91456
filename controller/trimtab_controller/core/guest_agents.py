"""What is known of a vm's guest agent over the runs of its guest. Pure.

    "" --heard--> ANSWERS <--heard/not heard--> SILENT
                  ANSWERS, SILENT --guest off--> RESTING --heard--> ANSWERS
                                                 RESTING --not heard--> SILENT

A guest that never had an agent stays "": nothing is missed there. One that had is missed from the moment it runs without.
"""

from enum import StrEnum

from trimtab_controller.core.lifecycle import ObservedState


class GuestAgent(StrEnum):
    NEVER = ""
    ANSWERS = "answers"
    # Its guest runs, and the agent that was there before does not answer.
    SILENT = "silent"
    # Its guest is off; it had an agent.
    RESTING = "resting"


_OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


def follow(known: GuestAgent, state: ObservedState, *, is_heard: bool) -> GuestAgent:
    """Return what is known after one more observation of the vm; a guest that is paused or on its way tells nothing."""
    if state is ObservedState.RUNNING:
        if is_heard:
            return GuestAgent.ANSWERS
        return GuestAgent.NEVER if known is GuestAgent.NEVER else GuestAgent.SILENT
    if state in _OFF and known is not GuestAgent.NEVER:
        return GuestAgent.RESTING
    return known
