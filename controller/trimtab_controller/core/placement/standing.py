"""The best hosts for one shape of request, kept along while the books change, instead of scanning the fleet for every request.

A fleet gets many requests of few shapes. For each shape this keeps who passes each filter, how many each filter refuses, and the
best hosts in order. Before an answer it looks again at just those rows that were claimed from or given back to since the last one
(`Books.changed_rows`), with the same filters and scorers that a scan uses. So the answer is the scan's, to the last figure (a
property test holds them together), and its cost does not grow with the fleet.

The ranking holds every fitting host down to a bound. It shrinks as its hosts fill up; when it holds too few, it is made anew by
scoring the hosts that fit: once in some two hundred changes.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.filters import FILTERS, Filter, Reads
from trimtab_controller.core.placement.fleet import ALL, Integers, Mask, RowIndex, Rows
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.scoring import Scores, SingleScores, six_digits, six_digits_of
from trimtab_controller.core.placement.shapes import Asked
from trimtab_controller.core.placement.sieve import lasting_sieve
from trimtab_controller.core.placement.verdict import Columns, Decision, Shortlist

RANKED = 256
# Rows of masks that all shapes together may keep; the shape that was asked for longest ago goes first.
_KEPT_ROWS = 16_000_000
_SHAPES_AT_LEAST = 16
_ASKED_SHAPES = 10_000

_OF_ROW = tuple(each for each in FILTERS if each.reads is Reads.ROW)
_OF_BOOKS = tuple(each for each in FILTERS if each.reads is Reads.BOOKS)

# Up to so many rows plain Python knows sooner than numpy how things stand.
_FEW_ROWS = 8

# Minus the score, row, host's id, its name, score as shown, then the scores by scorer as shown: sorts best first, equal ones by row.
Entry = tuple[Any, ...]


def standing_decision(asked: Asked, *, count: int, depth: int = RANKED) -> Decision | None:
    """Return the decision with the best `count` hosts; None where nobody asked for the shape before, or none fits."""
    trial, shape = asked.trial, asked.shape
    books = trial.books
    # Taken out and put back: the order of the dictionary is the order of use.
    standing: Standing | None = books.standing.pop(shape, None)
    if standing is None:
        if _is_first_time(books, shape):
            return None
        while len(books.standing) >= max(_SHAPES_AT_LEAST, _KEPT_ROWS // max(1, len(books.fleet))):
            del books.standing[next(iter(books.standing))]
        standing = Standing(trial, asked.policy, depth=depth)
    books.standing[shape] = standing
    standing.follow(trial)
    return standing.decision(trial, count=count)


def _is_first_time(books: Books, shape: Hashable) -> bool:
    """Return whether nobody asked for this shape lately: then a scan is cheaper than keeping an answer nobody comes back for."""
    if shape in books.asked_shapes:
        return False
    if len(books.asked_shapes) >= _ASKED_SHAPES:
        books.asked_shapes.clear()
    books.asked_shapes.add(shape)
    return True


class Standing:
    """One shape's answer on one set of books."""

    __slots__ = (
        "_bound",
        "_counted",
        "_depth",
        "_entry_of",
        "_fit_count",
        "_fits",
        "_lasting",
        "_names",
        "_policy",
        "_ranked",
        "_scores_one",
        "_seen",
    )

    def __init__(self, trial: Trial, policy: Policy, *, depth: int) -> None:
        self._depth = depth
        self._policy = policy
        self._lasting = lasting_sieve(trial)
        self._fits: Mask = self._lasting.fits.copy()
        self._counted = [counted for each in _OF_ROW if (counted := _Counted.of(trial, each)) is not None]
        for counted in self._counted:
            self._fits &= counted.mask
        self._fit_count = int(np.count_nonzero(self._fits))
        self._seen = len(trial.books.changed_rows)
        self._names: tuple[str, ...] = ()
        self._ranked: list[Entry] = []
        self._entry_of: dict[int, Entry] = {}
        self._bound: Entry | None = None
        self._rank(trial)
        is_plain = all(counted.column is not None for counted in self._counted)
        self._scores_one = SingleScores.of(trial, policy) if is_plain else None

    def follow(self, trial: Trial) -> None:
        """Look again at the rows that changed since the last time."""
        changed = trial.books.changed_rows
        if self._seen == len(changed):
            return
        rows = {*changed[self._seen :]}
        self._seen = len(changed)
        if self._scores_one is not None and len(rows) <= _FEW_ROWS:
            entries = self._follow_each(trial, rows, self._scores_one)
        else:
            entries = self._follow_all(trial, np.array([*rows], dtype=np.intp))
        self._rerank(rows, entries)

    def _follow_all(self, trial: Trial, rows: RowIndex) -> list[Entry]:
        """Count these rows again, and return where they stand now, those that fit."""
        fits = self._lasting.fits[rows]
        for counted in self._counted:
            passes = counted.filter.fitting(trial, rows)
            assert passes is not None  # it had something to say about this shape before
            counted.refused += int(np.count_nonzero(counted.mask[rows])) - int(np.count_nonzero(passes))
            counted.mask[rows] = passes
            fits &= passes
        self._fit_count += int(np.count_nonzero(fits)) - int(np.count_nonzero(self._fits[rows]))
        self._fits[rows] = fits
        fitting = rows[fits]
        if not fitting.size:
            return []
        scores = Scores.of(trial, fitting, self._policy)
        self._names = tuple(scores.parts)
        return _entries(trial, fitting, scores, ALL)

    def _follow_each(self, trial: Trial, rows: Iterable[int], scores_one: SingleScores) -> list[Entry]:
        """Do the same, by plain figures."""
        entries = []
        self._names = tuple(scores_one.makers)
        for row in rows:
            fits = self._lasting.fits.item(row)
            for counted in self._counted:
                fits &= counted.passes(row)
            if fits != self._fits.item(row):
                self._fits[row] = fits
                self._fit_count += 1 if fits else -1
            if fits:
                total, parts = scores_one.at(trial, row)
                shown, host = [six_digits_of(score) for score in parts], trial.fleet.hosts[row]
                # One scorer's figure is the total.
                shown_total = shown[0] if len(shown) == 1 else six_digits_of(total)
                entries.append((-total, row, host.host_id, host.name, shown_total, *shown))
        return entries

    def decision(self, trial: Trial, *, count: int) -> Decision | None:
        """Return the decision as things are since `follow`; None where no host fits, or none of those that are ranked."""
        fit_count = self._fit_count
        refused_by = {counted.filter.name: counted.refused for counted in self._counted if counted.refused}
        within: Mask | None = None
        for each in _OF_BOOKS:
            mask = each.fitting(trial, ALL)
            if mask is not None:
                refused_by[each.name] = mask.size - int(np.count_nonzero(mask))
                within = mask if within is None else within & mask
        if within is not None:
            fit_count = int(np.count_nonzero(self._fits & within))
            refused_by = {name: refused for name, refused in refused_by.items() if refused}
        best = self._best(trial, min(count, fit_count), within)
        if not best:
            return None
        _, rows, host_ids, names, totals, *columns = zip(*best, strict=True)
        return Decision(
            request=trial.request,
            policy=self._policy.name,
            fitting=Shortlist(Columns(host_ids, names, totals, dict(zip(self._names, columns, strict=True)))),
            refused=(),
            host_count=len(trial.fleet),
            fit_count=fit_count,
            refused_by={**self._lasting.refused_by, **refused_by},
            cells=trial.cells_on(rows[0]),
        )

    def _best(self, trial: Trial, count: int, within: Mask | None) -> list[Entry]:
        """Return the best `count` of the ranked that are `within`; none where that would leave out one that is not ranked."""
        if len(self._ranked) < count:
            self._rank(trial)  # it holds at least `count` afterwards
        if within is None:
            return self._ranked[:count]
        best = list(islice((entry for entry in self._ranked if within[entry[1]]), count))
        return best if len(best) == count else []

    def _rank(self, trial: Trial) -> None:
        """Score all hosts that fit and keep the best, in order."""
        rows = np.flatnonzero(self._fits)
        if rows.size == 0:
            self._ranked, self._entry_of, self._bound = [], {}, None
            return
        scores = Scores.of(trial, rows, self._policy)
        self._names = tuple(scores.parts)
        best = best_positions(scores.totals, count=min(self._depth, rows.size))
        self._ranked = _entries(trial, rows[best], scores, best)
        self._entry_of = {entry[1]: entry for entry in self._ranked}
        self._bound = self._ranked[-1] if rows.size > self._depth else None

    def _rerank(self, rows: Iterable[int], entries: Iterable[Entry]) -> None:
        """Move the changed rows to where they now stand."""
        ranked, entry_of, bound = self._ranked, self._entry_of, self._bound
        for row in rows:
            old = entry_of.pop(row, None)
            if old is not None:
                del ranked[bisect_left(ranked, old)]
        for entry in entries:
            if bound is None or entry <= bound:
                insort(ranked, entry)
                entry_of[entry[1]] = entry
        if len(ranked) > 2 * self._depth:
            for entry in ranked[self._depth :]:
                del entry_of[entry[1]]
            del ranked[self._depth :]
            self._bound = ranked[-1]


@dataclass(slots=True)
class _Counted:
    """A filter that has something to say, with who passes it."""

    filter: Filter
    mask: Mask
    refused: int
    column: Integers | None
    """What must be free of the one resource that it is about; None where it asks more than that."""
    amount: int

    @classmethod
    def of(cls, trial: Trial, each: Filter) -> "_Counted | None":
        mask = each.fitting(trial, ALL)
        if mask is None:
            return None
        resources = each.resources(trial) if each.resources is not None else ()
        column = trial.books.free.get(resources[0]) if len(resources) == 1 else None
        amount = 0 if column is None else trial.amounts.get(resources[0], 0)
        return cls(each, mask, mask.size - int(np.count_nonzero(mask)), column, amount)

    def passes(self, row: int) -> bool:
        """Return whether this row passes now, and count it."""
        assert self.column is not None
        passes = self.column.item(row) >= self.amount
        if passes != self.mask.item(row):
            self.mask[row] = passes
            self.refused += -1 if passes else 1
        return passes


def _entries(trial: Trial, rows: RowIndex, scores: Scores, positions: Rows) -> list[Entry]:
    """Return the entries of `rows`, whose scores stand at `positions`."""
    totals = scores.totals[positions]
    shown = six_digits(totals)
    # One scorer's figure is the total.
    parts = [shown] if len(scores.parts) == 1 else [six_digits(values[positions]) for values in scores.parts.values()]
    return list(zip((-totals).tolist(), rows.tolist(), *trial.fleet.names_at(rows), shown, *parts, strict=True))
