"""The best hosts for requests of one family, which differ in their sizes alone, found without looking at every host.

What a request wishes besides its sizes decides which hosts come into question at all, and how good each of them is besides what
stays free on it. That is kept for each family of requests, in three parts:

    crowds   hosts that are alike in everything asked for, as most of a fleet are that nothing runs on yet: one question for all
    tiles    all others, by what they have free (`tiles.py`): most are answered for by bounds
    loose    those that were claimed from or given back to since they were put in order: each is looked at

A decision scores what the bounds leave over, with the same scorers that a scan uses, so the answer is the scan's, to the last figure
(a property test holds them together). Before it, those rows that changed since the last one (`Books.changed_rows`) become loose;
when there are too many of them, they become tiles; when too many tiles were made so, everything is put in order anew.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import ge
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.filters import FILTERS, Reads
from trimtab_controller.core.placement.fleet import ALL, Floats, Mask, RowIndex
from trimtab_controller.core.placement.ladders import ladder_of
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.ranking import best_of_rows
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.scoring import Scores, shortlist_of
from trimtab_controller.core.placement.shapes import Asked
from trimtab_controller.core.placement.sieve import lasting_sieve
from trimtab_controller.core.placement.tiles import Hosts, Tiles
from trimtab_controller.core.placement.verdict import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is kept, and of what size; small ones are for tests, which have no hundred thousand hosts."""

    fleet_at_least: int = 8192
    """Hosts; a smaller fleet is scanned as fast."""
    asked_at_least: int = 16
    """Putting a family's hosts in order costs about as much as so many scans."""
    kept_rows: int = 2_000_000
    """Rows that all families together may keep, at some 40 bytes; the family that was asked for longest ago goes first."""
    families_at_least: int = 4
    crowd_at_least: int = 256
    crowds_at_most: int = 16
    loose_at_most: int = 1536
    """Hosts: to look at each of them costs about as much as to look into tiles."""
    spare_tiles: int = 96
    """At least, for hosts that become loose; when they are used up, all hosts are put in order anew."""
    places: int = 96
    """Of a tile."""
    few_tiles: int = 32
    """So few are not worth asking for bounds: all hosts in them are looked at."""
    looked_into: int = 7
    """Tiles that are scored at first, at least; more where they do not hold the best."""
    forbidden_at_most: int = 64
    """Hosts that a vm is kept from by the members of its group; a group that has them everywhere is left to a scan. With those that
    are wanted they must not be more than a tile has places: of a crowd no more are found."""


SIZES = Sizes()
# Where a host is that does not come into question; in the first crowd, the next one is one less; others are at a place of a tile.
_ABSENT, _CROWDS = -1, -2
# Families of which it is remembered that they were asked for.
_ASKED_FAMILIES = 10_000
# Hosts that are looked at to find out which are alike.
_SAMPLE = 1024
# Whether a filter or scorer has anything to say, any host shows.
_ONE = np.zeros(1, dtype=np.intp)
_OF_ROW = tuple(each for each in FILTERS if each.reads is Reads.ROW)
_OF_BOOKS = tuple(each for each in FILTERS if each.reads is Reads.BOOKS)


def family_decision(asked: Asked, *, count: int, sizes: Sizes = SIZES) -> Decision | None:
    """Return the decision with the best `count` hosts; None where the family is not kept (yet), only a scan can tell, or none fits."""
    trial, policy, key = asked.trial, asked.policy, asked.family
    books = trial.books
    if len(books.fleet) < sizes.fleet_at_least:
        return None
    # Taken out and put back: the order of the dictionary is the order of use. A number says how often it was asked for so far.
    kept: Family | int = books.families.pop(key, 0)
    if isinstance(kept, int):
        if len(books.families) >= _ASKED_FAMILIES:
            del books.families[next(iter(books.families))]
        if kept < sizes.asked_at_least or not can_be_kept(trial, policy):
            books.families[key] = kept + 1
            return None
        _make_room(books, sizes)
        kept = Family(trial, policy, sizes=sizes)
    books.families[key] = kept
    return kept.decision(trial, count=count)


def can_be_kept(trial: Trial, policy: Policy) -> bool:
    """Return whether all that the family asks of a row are amounts, and all that it wishes of it has bounds."""
    for each in _OF_ROW:
        if each.resources is None:
            if each.fitting(trial, _ONE) is not None:
                return False
        elif any(name not in trial.amounts or name not in trial.books.free for name in each.resources(trial)):
            return False
    of_row = [SCORERS[name] for name in policy.weights if SCORERS[name].reads is Reads.ROW]
    return bool(of_row) and all(scorer.bounds is not None for scorer in of_row)


def _make_room(books: Books, sizes: Sizes) -> None:
    families = [key for key, kept in books.families.items() if isinstance(kept, Family)]
    most = max(sizes.families_at_least, sizes.kept_rows // len(books.fleet))
    for key in families[: max(0, len(families) - most + 1)]:
        del books.families[key]


class Crowd:
    """Hosts that have the same of everything, in order of their rows, but for the first of them: these fill a tile, in which they are
    found if they are among the best. The others are only counted."""

    __slots__ = ("_rows", "_start", "free")

    def __init__(self, free: tuple[int, ...], rows: RowIndex) -> None:
        self.free = free
        self._rows = rows
        self._start = 0

    def __len__(self) -> int:
        return self._rows.size - self._start

    def take_first(self) -> int:
        self._start += 1
        return self._rows.item(self._start - 1)

    def take_out(self, row: int) -> None:
        """Take a host out: those before it move up, and they are few, since of equal hosts the first is taken."""
        rows, start = self._rows, self._start
        place = start + int(rows[start:].searchsorted(row))
        rows[start + 1 : place + 1] = rows[start:place]
        self._start += 1


class Family:
    """The hosts that come into question for one family, on one set of books."""

    __slots__ = (
        "_asked",
        "_columns",
        "_crowds",
        "_lasting",
        "_looked_into",
        "_place",
        "_policy",
        "_resources",
        "_scorers",
        "_seen",
        "_sizes",
        "_tiles",
    )

    def __init__(self, trial: Trial, policy: Policy, *, sizes: Sizes) -> None:
        self._sizes = sizes
        self._policy = policy
        self._lasting = lasting_sieve(trial)
        named = [(each, tuple(each.resources(trial))) for each in _OF_ROW if each.resources is not None]
        self._asked = [(each, names) for each, names in named if names]
        self._resources = [name for _, names in self._asked for name in names]
        self._columns = [trial.books.free[name] for name in self._resources]
        self._scorers = [name for name in policy.weights if SCORERS[name].scores(trial, _ONE) is not None]
        self._looked_into: float = sizes.looked_into
        self._seen: int
        self._place: npt.NDArray[np.int32]
        self._tiles: Tiles
        self._crowds: list[Crowd]
        self._put_in_order(trial)

    def decision(self, trial: Trial, *, count: int) -> Decision | None:
        """Return the decision on the books as they are now; None where no host fits, or a scan is quicker."""
        amounts = [trial.amounts.get(name, -1) for name in self._resources]
        if -1 in amounts:
            return None  # none of a device, where others of the family ask for some
        forbidden, refused_by = self._forbidden(trial)
        wanted = count if forbidden is None else count + forbidden.size
        if wanted > min(self._sizes.places, count + self._sizes.forbidden_at_most):
            return None
        self._follow(trial)
        found = self._found(trial, amounts, wanted)
        rows, best, fit_count = found.rows, found.best, found.fit_count
        if forbidden is not None and forbidden.size:
            fit_count -= self._fitting_of(forbidden, amounts)
            best = best[np.isin(rows[best], forbidden, invert=True)]
        best = best[:count]
        if not best.size:
            return None
        return Decision(
            request=trial.request,
            policy=self._policy.name,
            fitting=shortlist_of(trial, found.scores, rows=rows[best], positions=best),
            refused=(),
            host_count=len(trial.fleet),
            fit_count=fit_count,
            refused_by={**self._lasting.refused_by, **self._refused_by_row(trial), **refused_by},
        )

    def _forbidden(self, trial: Trial) -> tuple[RowIndex | None, dict[str, int]]:
        """Return the hosts that filters refuse because of what is booked elsewhere, and how many each of these filters refuses."""
        forbidden, refused_by = None, {}
        for each in _OF_BOOKS:
            mask = each.fitting(trial, ALL)
            if mask is not None:
                rows = np.flatnonzero(~mask)
                forbidden = rows if forbidden is None else np.union1d(forbidden, rows)
                if rows.size:
                    refused_by[each.name] = int(rows.size)
        return forbidden, refused_by

    def _refused_by_row(self, trial: Trial) -> dict[str, int]:
        books, size = trial.books, len(trial.fleet)
        refused_by = {}
        for each, names in self._asked:
            if len(names) == 1:
                refused = ladder_of(books, names[0]).below(trial.amounts[names[0]], books.changed_rows)
            else:
                mask = each.fitting(trial, ALL)
                refused = 0 if mask is None else size - int(np.count_nonzero(mask))
            if refused:
                refused_by[each.name] = refused
        return refused_by

    def _fitting_of(self, rows: RowIndex, amounts: Sequence[int]) -> int:
        fits = self._lasting.fits[rows]
        for column, amount in zip(self._columns, amounts, strict=True):
            fits &= column[rows] >= amount
        return int(np.count_nonzero(fits))

    def _found(self, trial: Trial, amounts: Sequence[int], count: int) -> "_Found":
        """Return the best `count` of all that fit, or all of them where they are fewer."""
        tiles, policy, scorers = self._tiles, self._policy, self._scorers
        fit_count = sum([len(crowd) for crowd in self._crowds if all(map(ge, crowd.free, amounts))])
        if tiles.end <= self._sizes.places * self._sizes.few_tiles:
            rows = tiles.rows[tiles.places_with_room(amounts)]
            scores = Scores.of(trial, rows, policy, scorers=scorers)
            return _Found(fit_count + rows.size, rows, scores, best_of_rows(scores.totals, rows, count=min(count, rows.size)))
        may, in_tiles = tiles.with_room(amounts)
        count = min(count, in_tiles)
        bounds = tiles.bounds(trial, policy, scorers, may)
        looked_into = int(self._looked_into)
        picked = _highest(bounds, looked_into)
        rows, scores = tiles.scored(trial, policy, scorers, tiles=np.concatenate((picked, tiles.loose)), amounts=amounts)
        while True:
            bounds[picked] = -np.inf
            if rows.size < count:
                picked = _highest(bounds, looked_into)
            else:
                best = best_of_rows(scores.totals, rows, count=count)
                # Those that may hold a host as good as the last of these: each look only raises what has to be reached.
                picked = (bounds >= scores.totals[best[-1]]).nonzero()[0] if count else best
                if not picked.size:
                    # So that one look in five has to be followed by another, whatever the tiles have become.
                    enough = looked_into == int(self._looked_into)
                    self._looked_into = max(self._sizes.looked_into, self._looked_into + (-0.5 if enough else 2.0))
                    return _Found(fit_count + in_tiles, rows, scores, best)
                if picked.size > looked_into:
                    picked = _highest(bounds, looked_into)
            looked_into *= 2
            more_rows, more_scores = tiles.scored(trial, policy, scorers, tiles=picked, amounts=amounts)
            rows, scores = np.concatenate((rows, more_rows)), scores.joined(more_scores)

    # --- following the books -------------------------------------------------------------------------------------------------

    def _follow(self, trial: Trial) -> None:
        """Let the rows that changed since the last time be loose."""
        changed = trial.books.changed_rows
        if self._seen == len(changed):
            return
        rows = {*changed[self._seen :]}
        self._seen = len(changed)
        for row in rows:
            place = self._place.item(row)
            if place == _ABSENT:
                continue
            if place < self._tiles.loose_from:
                if not self._has_room(trial):
                    return
                place = self._loosen(row, place)
            for own, column in zip(self._tiles.free, self._columns, strict=True):
                own[place] = column.item(row)

    def _has_room(self, trial: Trial) -> bool:
        """Make room for one more that is loose. Return False if that put all hosts in order anew, as they are now."""
        tiles = self._tiles
        if tiles.is_full:
            self._put_in_order(trial)
            return False
        if tiles.end - tiles.loose_from == self._sizes.loose_at_most:
            self._keep_places(tiles.lay(self._hosts(trial, tiles.rows[tiles.loose_from : tiles.end])))
            return self._has_room(trial)
        return True

    def _loosen(self, row: int, place: int) -> int:
        """Move a host to the end, where it is loose; of a crowd the next one comes to its place."""
        tiles, crowds = self._tiles, self._crowds
        if place <= _CROWDS:
            number = _CROWDS - place
            crowds[number].take_out(row)
            new = tiles.append_like(number * self._sizes.places, row)
        else:
            new = tiles.append_like(place, row)
            number = place // self._sizes.places
            if number < len(crowds) and len(crowds[number]):
                following = crowds[number].take_first()
                tiles.rows[place] = following
                self._place[following] = place
            else:
                tiles.take_out(place)
        self._place[row] = new
        return new

    def _put_in_order(self, trial: Trial) -> None:
        sizes = self._sizes
        self._seen = len(trial.books.changed_rows)
        self._place = np.full(len(trial.fleet), _ABSENT, dtype=np.int32)
        hosts = self._hosts(trial, np.flatnonzero(self._lasting.fits))
        crowded = [*_crowded(hosts, sizes)]
        alone = ~np.logical_or.reduce(crowded) if crowded else np.ones(hosts.rows.size, dtype=np.bool_)
        needed = len(crowded) + -(-int(np.count_nonzero(alone)) // sizes.places)
        self._tiles = Tiles(hosts, tiles=needed + max(needed // 4, sizes.spare_tiles), places=sizes.places)
        self._crowds = []
        for number, alike in enumerate(crowded):
            crowd = hosts.at(alike)
            self._place[crowd.rows] = _CROWDS - number
            self._crowds.append(Crowd(tuple([column.item(0) for column in crowd.free.values()]), crowd.rows[sizes.places :]))
            self._keep_places(self._tiles.lay(crowd.at(np.arange(min(sizes.places, crowd.rows.size)))))
        others = hosts.at(alone)
        if others.rows.size > sizes.loose_at_most // 2:
            self._keep_places(self._tiles.lay(others))
        else:
            self._keep_places(self._tiles.leave_loose(others))

    def _keep_places(self, laid: tuple[RowIndex, RowIndex]) -> None:
        self._place[laid[0]] = laid[1]

    def _hosts(self, trial: Trial, rows: RowIndex) -> Hosts:
        lasting = [name for name in self._scorers if SCORERS[name].reads is Reads.FLEET]
        return Hosts.of(trial, rows, resources=self._resources, lasting=lasting)


class _Found(NamedTuple):
    fit_count: int
    rows: RowIndex
    """Some hosts that fit, among them the best."""
    scores: Scores
    best: RowIndex
    """Where the best stand in `rows`, in order."""


def _highest(bounds: Floats, count: int) -> RowIndex:
    """Return the positions of the `count` highest, in any order; none where no host fits."""
    if count >= bounds.size:
        return (bounds > -np.inf).nonzero()[0]
    highest: RowIndex = bounds.argpartition(bounds.size - count)[bounds.size - count :]
    return highest[bounds[highest] > -np.inf]


def _crowded(hosts: Hosts, sizes: Sizes) -> Iterator[Mask]:
    """Yield who of the hosts is alike in everything that is compared: the largest crowds, as a sample shows them."""
    columns = hosts.columns
    step = max(1, hosts.rows.size // _SAMPLE)
    sample = Counter(zip(*[column[::step].tolist() for column in columns], strict=True))
    for kind, seen in sample.most_common(sizes.crowds_at_most):
        if seen * step < sizes.crowd_at_least:
            return
        alike = columns[0] == kind[0]
        for column, figure in zip(columns[1:], kind[1:], strict=True):
            alike &= column == figure
        yield alike
