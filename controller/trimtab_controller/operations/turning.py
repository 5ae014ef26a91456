"""When an operation may turn round, why, and what is over once a step got through."""

from typing import Any

from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.operations.journal import Forward, Undo
from trimtab_protos.errors import Conflict


def may_turn(following: Forward | Undo) -> bool:
    """Tell whether the operation may still be undone instead of taking this step."""
    return isinstance(following, Forward) and not following.is_committed


def what_has_passed(operation: Operation) -> dict[str, Any]:
    """Return what is over once a step got through: its failed tries, and their error unless that is why the operation is undone."""
    return {"attempts": 0} if operation.state is OperationState.COMPENSATING else {"attempts": 0, "error": None}


def cancelled() -> Conflict:
    return Conflict("cancelled", "cancelled by the user")
