"""What an example of an operation is. See `examples.py`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Operation

_numbers = itertools.count(1)


def name_of(noun: str) -> str:
    return f"{noun}{next(_numbers)}"


def nothing(_story: FleetStory, _operation: Operation) -> None:
    """The invariants say it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    kind: str
    arrange: Callable[[FleetStory], Operation]
    done: Callable[[FleetStory, Operation], None] = nothing
    undone: Callable[[FleetStory, Operation], None] = nothing
    # Effects that cannot be taken back once they took place: an error reported after them is not believed.
    takes_place: frozenset[str] = frozenset()
