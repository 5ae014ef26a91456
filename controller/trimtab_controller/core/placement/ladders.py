"""How many hosts have less than so much of a resource free, known without looking at them all.

A ladder is the column of one resource in order of size. What was claimed or given back since it was sorted stands beside it: the
figures that are gone and those that came instead, both in order, so that a question is three searches.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.columns import Integers

# More figures beside the ladder cost more to keep in order than all of them cost to sort, at 100,000 hosts.
_BESIDE = 4096


class Ladder:
    """The free amounts of one resource in one set of books."""

    __slots__ = ("_beside", "_came", "_column", "_gone", "_known", "_rungs", "_seen")

    def __init__(self, books: Books, resource: str, *, beside: int = _BESIDE) -> None:
        self._beside = beside
        self._column: Integers = books.free[resource]
        self._sort(books.changed_rows)

    def _sort(self, changed: Sequence[int]) -> None:
        self._seen = len(changed)
        self._known = self._column.copy()
        # Of a memoryview single figures are read in a third of the time that an array takes.
        self._rungs = np.sort(self._known).data
        self._gone: list[int] = []
        self._came: list[int] = []

    def below(self, amount: int, changed: Sequence[int]) -> int:
        """Return how many hosts have less than `amount` free; `changed` is `Books.changed_rows`, as it is now."""
        if self._seen != len(changed):
            self._follow(changed)
        return bisect_left(self._rungs, amount) - bisect_left(self._gone, amount) + bisect_left(self._came, amount)

    def _follow(self, changed: Sequence[int]) -> None:
        if len(changed) - self._seen + len(self._gone) > self._beside:
            self._sort(changed)
            return
        column, known = self._column, self._known
        for row in {*changed[self._seen :]}:
            before, now = known.item(row), column.item(row)
            if before != now:
                insort(self._gone, before)
                insort(self._came, now)
                known[row] = now
        self._seen = len(changed)


def ladder_of(books: Books, resource: str) -> Ladder:
    """Return the ladder that is kept with these books; made by the first who asks. KeyError for what no host has."""
    ladder: Ladder | None = books.ladders.get(resource)
    if ladder is None:
        ladder = books.ladders[resource] = Ladder(books, resource)
    return ladder
