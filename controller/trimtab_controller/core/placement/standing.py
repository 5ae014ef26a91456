"""The best hosts for one shape of request, kept along while the books change, instead of scanning the fleet for every request.

A fleet gets many requests of few shapes. For each shape this keeps who passes each filter, how many each filter refuses, and the
best hosts in order. Before an answer it looks again at just those rows that were claimed from or given back to since the last one
(`Books.changed_rows`), with the same filters and scorers that a scan uses. So the answer is the scan's, to the last figure (a
property test holds them together), and its cost does not grow with the fleet.

The ranking holds every fitting host down to a bound. It shrinks as its hosts fill up; when it holds too few, it is made anew by
scoring the hosts that fit: once in some two hundred changes.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable
from itertools import islice

import numpy as np

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.filters import FILTERS, Filter, Reads
from trimtab_controller.core.placement.filters.capacity import lacks_shared_space
from trimtab_controller.core.placement.fleet import ALL, Mask, RowIndex, Rows
from trimtab_controller.core.placement.policies import Policy, knows_lifetimes
from trimtab_controller.core.placement.ranking import best_positions
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.scoring import Scores, six_digits
from trimtab_controller.core.placement.sieve import lasting_sieve, project_that_matters
from trimtab_controller.core.placement.verdict import Decision, Shortlist

RANKED = 256
# Rows of masks that all shapes together may keep; the shape that was asked for longest ago goes first.
_KEPT_ROWS = 16_000_000
_SHAPES_AT_LEAST = 16
_ASKED_SHAPES = 10_000

_OF_ROW = tuple(each for each in FILTERS if each.reads is Reads.ROW)
_OF_BOOKS = tuple(each for each in FILTERS if each.reads is Reads.BOOKS)

# (minus the score, row, score as shown, scores by scorer as shown): sorts best first, equal ones by row.
Entry = tuple[float, int, float, tuple[float, ...]]


def standing_decision(
    books: Books,
    request: PlacementRequest,
    policy: Policy,
    *,
    count: int,
    depth: int = RANKED,
) -> Decision | None:
    """Return the decision with the best `count` hosts; None where only a scan can tell: hosts are named, the group has wishes, none fits."""
    if _is_singular(request) or (books.occupancy is not None and knows_lifetimes(policy)):
        return None  # that a host is in use for so long changes with time, whatever is claimed
    trial = Trial.of(books, request)
    if trial.space.bound or lacks_shared_space(trial):
        return None
    shape = _shape(trial, policy)
    # Taken out and put back: the order of the dictionary is the order of use.
    standing: Standing | None = books.standing.pop(shape, None)
    if standing is None:
        if _is_first_time(books, shape):
            return None
        while len(books.standing) >= max(_SHAPES_AT_LEAST, _KEPT_ROWS // max(1, len(books.fleet))):
            del books.standing[next(iter(books.standing))]
        standing = Standing(trial, policy, depth=depth)
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


def _is_singular(request: PlacementRequest) -> bool:
    if request.group is not None and not all(rule.is_must for rule in request.group.rules):
        return True
    return bool(request.required_host_id or request.preferred_host_id or request.excluded_host_ids)


def _shape(trial: Trial, policy: Policy) -> Hashable:
    """Return all of a request that an answer depends on; the rest only names it, or is looked at in `decision`."""
    request = trial.request
    return (
        policy.name,
        request.kind,
        project_that_matters(trial),
        request.vcpus,
        request.memory_mib,
        request.disks,
        request.networks,
        request.arch,
        request.cpu_model,
        request.cpu_features,
        request.machine,
        request.firmware,
        request.capabilities,
        request.accelerator,
        request.host_class,
        request.is_dedicated,
        request.page_kib,
        request.cell_count,
        request.image_ids,
        request.tolerations,
        request.restarts_elsewhere,
        frozenset(request.host_selector.items()),
        frozenset(request.devices.items()),
        frozenset(request.resources.items()),
    )


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
        "_seen",
    )

    def __init__(self, trial: Trial, policy: Policy, *, depth: int) -> None:
        self._depth = depth
        self._policy = policy
        self._lasting = lasting_sieve(trial)
        self._fits: Mask = self._lasting.fits.copy()
        # Each filter with who passes it and how many do not.
        self._counted: list[tuple[Filter, Mask, list[int]]] = []
        for each in _OF_ROW:
            mask = each.fitting(trial, ALL)
            if mask is not None:
                self._counted.append((each, mask, [mask.size - int(np.count_nonzero(mask))]))
                self._fits &= mask
        self._fit_count = int(np.count_nonzero(self._fits))
        self._seen = len(trial.books.changed_rows)
        self._names: tuple[str, ...] = ()
        self._ranked: list[Entry] = []
        self._entry_of: dict[int, Entry] = {}
        self._bound: Entry | None = None
        self._rank(trial)

    def follow(self, trial: Trial) -> None:
        """Look again at the rows that changed since the last time."""
        changed = trial.books.changed_rows
        if self._seen == len(changed):
            return
        rows = np.array(list({*changed[self._seen :]}), dtype=np.intp)
        self._seen = len(changed)
        fits = self._lasting.fits[rows]
        for each, mask, refused in self._counted:
            passes = each.fitting(trial, rows)
            assert passes is not None  # it had something to say about this shape before
            refused[0] += int(np.count_nonzero(mask[rows])) - int(np.count_nonzero(passes))
            mask[rows] = passes
            fits &= passes
        self._fit_count += int(np.count_nonzero(fits)) - int(np.count_nonzero(self._fits[rows]))
        self._fits[rows] = fits
        self._rerank(trial, rows, fits)

    def decision(self, trial: Trial, *, count: int) -> Decision | None:
        """Return the decision as things are since `follow`; None where no host fits, or none of those that are ranked."""
        fit_count = self._fit_count
        refused_by = {each.name: refused[0] for each, _, refused in self._counted if refused[0]}
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
        hosts = [trial.fleet.hosts[entry[1]] for entry in best]
        columns = zip(*[entry[3] for entry in best], strict=True)
        return Decision(
            request=trial.request,
            policy=self._policy.name,
            fitting=Shortlist(
                tuple([host.host_id for host in hosts]),
                tuple([host.name for host in hosts]),
                tuple([entry[2] for entry in best]),
                dict(zip(self._names, columns, strict=True)),
            ),
            refused=(),
            host_count=len(trial.fleet),
            fit_count=fit_count,
            refused_by={**self._lasting.refused_by, **refused_by},
            cells=trial.cells_on(best[0][1]),
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
        self._ranked = _entries(rows[best], scores, best)
        self._entry_of = {entry[1]: entry for entry in self._ranked}
        self._bound = self._ranked[-1] if rows.size > self._depth else None

    def _rerank(self, trial: Trial, rows: RowIndex, fits: Mask) -> None:
        """Move the changed rows to where they now stand."""
        ranked, entry_of, bound = self._ranked, self._entry_of, self._bound
        for row in rows.tolist():
            old = entry_of.pop(row, None)
            if old is not None:
                del ranked[bisect_left(ranked, old)]
        fitting = rows[fits]
        if fitting.size == 0:
            return
        scores = Scores.of(trial, fitting, self._policy)
        self._names = tuple(scores.parts)
        for entry in _entries(fitting, scores, ALL):
            if bound is None or entry <= bound:
                insort(ranked, entry)
                entry_of[entry[1]] = entry
        if len(ranked) > 2 * self._depth:
            for entry in ranked[self._depth :]:
                del entry_of[entry[1]]
            del ranked[self._depth :]
            self._bound = ranked[-1]


def _entries(rows: RowIndex, scores: Scores, positions: Rows) -> list[Entry]:
    """Return the entries of `rows`, whose scores stand at `positions`."""
    totals = scores.totals[positions]
    shown = six_digits(totals)
    # One scorer's figure is the total.
    parts = [shown] if len(scores.parts) == 1 else [six_digits(values[positions]) for values in scores.parts.values()]
    columns = zip(*parts, strict=True) if parts else ((),) * len(shown)
    return list(zip((-totals).tolist(), rows.tolist(), shown, columns, strict=True))
