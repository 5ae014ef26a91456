"""States of operations and vms, and which may follow which. Each arrow has its reason beside it."""

from enum import StrEnum


class OperationState(StrEnum):
    """`failed` means undone; `needs_attention` means an undo failed or attempts ran out: an operator decides."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    COMPENSATING = "compensating"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NEEDS_ATTENTION = "needs_attention"


LIVE_STATES = frozenset({OperationState.QUEUED, OperationState.RUNNING, OperationState.WAITING, OperationState.COMPENSATING})
ENDED_STATES = frozenset(OperationState) - LIVE_STATES

TRANSITIONS: dict[OperationState, frozenset[OperationState]] = {
    OperationState.QUEUED: frozenset(
        {
            OperationState.RUNNING,  # a driver claimed it
            OperationState.CANCELLED,  # cancelled before anything was done
            OperationState.FAILED,  # superseded before anything was done
            OperationState.DONE,  # superseded, and what its acceptance recorded was all that it was for
        }
    ),
    OperationState.RUNNING: frozenset(
        {
            OperationState.WAITING,  # the agent or the leader owns the next move
            OperationState.COMPENSATING,  # a step failed for good, or a cancel was asked for before the pivot
            OperationState.DONE,  # every step is recorded
            OperationState.FAILED,  # superseded by recovery, delete or forced stop
            OperationState.NEEDS_ATTENTION,  # past the pivot and out of attempts
        }
    ),
    OperationState.WAITING: frozenset(
        {
            OperationState.RUNNING,  # due again
            OperationState.COMPENSATING,  # as from running
            OperationState.FAILED,  # superseded
            OperationState.DONE,  # superseded, as from queued
            OperationState.NEEDS_ATTENTION,  # the deadline passed and the outcome stays unknown
        }
    ),
    OperationState.COMPENSATING: frozenset(
        {
            OperationState.FAILED,  # everything is undone
            OperationState.CANCELLED,  # everything is undone, and it was the user's wish
            OperationState.RUNNING,  # the pivot's effect turned out to have taken place: only forward is left
            OperationState.NEEDS_ATTENTION,  # an undo failed for good
        }
    ),
    OperationState.NEEDS_ATTENTION: frozenset(
        {
            OperationState.RUNNING,  # an operator asked to retry forward
            OperationState.COMPENSATING,  # an operator asked to retry the undo
            OperationState.FAILED,  # an operator gave up, or the subject was superseded
        }
    ),
    OperationState.DONE: frozenset(),
    OperationState.FAILED: frozenset(),
    OperationState.CANCELLED: frozenset(),
}


class DesiredPower(StrEnum):
    """What the user wants of a vm."""

    RUNNING = "running"
    STOPPED = "stopped"
    PAUSED = "paused"
    DELETED = "deleted"


class ObservedState(StrEnum):
    """What was last proven of a vm, always shown with its age; `unknown` where no host could be asked."""

    UNKNOWN = "unknown"
    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    INCOMING = "incoming"


class HostConnectivity(StrEnum):
    """What the gateways know of a host: never `dead`, which only a fence proves."""

    NEW = "new"
    UP = "up"
    SUSPECT = "suspect"
    LOST = "lost"
    FENCED = "fenced"


UNHEARD = frozenset({HostConnectivity.SUSPECT, HostConnectivity.LOST, HostConnectivity.FENCED})
"""Of a host that nobody hears from."""
