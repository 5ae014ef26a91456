"""What an example of a saga is: one valid operation of a kind, and what is promised of its ends. See `examples.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Operation


def _nothing(_story: FleetStory, _operation: Operation) -> None:
    """The invariants say it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    kind: str
    arrange: Callable[[FleetStory], Operation]
    done: Callable[[FleetStory, Operation], None] = _nothing
    undone: Callable[[FleetStory, Operation], None] = _nothing
    # Effects that cannot be taken back once they took place: an error reported after them is not believed.
    takes_place: frozenset[str] = frozenset()
