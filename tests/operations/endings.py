"""How tests look at an operation that has come to its end."""

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation


def ended(story: FleetStory, operation: Operation, expected: OperationState) -> Operation:
    """Check that it ended so, and that nothing is left of anything that nobody owns."""
    found = story.operation(operation.id)
    assert found.state is expected, (found.error, story.journal(operation.id))
    assert audit_invariants(story) == []
    return found
