"""Hosts in tiles: few that have about as much free of everything, so that most of a large fleet is answered for by bounds.

A tile knows the least and the most that is free on its hosts. So it fits whole, or not at all, or has to be looked into: of 100,000
hosts that is one in ten. What a tile's best host can score at most is bounded likewise (`Scorer.bounds`), and only tiles that may
hold one of the best are scored.

From a tile hosts are only taken, when something is claimed from them or given back: its bounds hold without them. They go to the end,
into tiles without bounds, which are always looked into: there the hosts are loose. `settle` makes tiles of them that have bounds.

The columns are kept here by place, since figures that lie side by side are read in a tenth of the time that gathering them takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.columns import Integers
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Floats, Mask, RowIndex
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.scorers.base import Extents
from trimtab_controller.core.placement.scoring import Scores, weighted_mean

# Free of the first resource at a place that holds no host: less than anything that is asked for.
_NOTHING = np.iinfo(np.int64).min
# Limits that differ by less than this factor do not keep hosts out of the same tile.
_ALIKE = 1.1

Inverse = Mapping[str, Floats | float]


@dataclass(frozen=True, slots=True, eq=False)
class Hosts:
    """Some hosts, in some order, with what they are compared by."""

    rows: RowIndex
    free: Mapping[str, Integers]
    """By resource that is asked for."""
    inverse: Inverse
    """1 / limit of vcpus and memory; a single figure where all hosts of the fleet have it."""
    lasting: Mapping[str, Floats]
    """By scorer: the scores that do not change with the books."""

    def at(self, which: RowIndex | Mask) -> "Hosts":
        """Return those of the hosts."""
        return Hosts(
            self.rows[which],
            {name: column[which] for name, column in self.free.items()},
            {name: one if isinstance(one, float) else one[which] for name, one in self.inverse.items()},
            {name: column[which] for name, column in self.lasting.items()},
        )

    @classmethod
    def of(cls, trial: Trial, rows: RowIndex, *, resources: Sequence[str], lasting: Sequence[str]) -> "Hosts":
        """Return the hosts of these rows as the books are now; `lasting` names scorers, each of which must have something to say."""
        free, fleet = trial.books.free, trial.fleet
        inverse: dict[str, Floats | float] = {}
        for name in (VCPUS, MEMORY):
            common = fleet.common_inverse(name)
            inverse[name] = fleet.inverse_limits[name][rows] if common is None else common
        scores: dict[str, Floats] = {}
        for name in lasting:
            own = SCORERS[name].scores(trial, rows)
            assert own is not None
            scores[name] = own
        return cls(rows, {name: free[name][rows] for name in resources}, inverse, scores)

    @property
    def columns(self) -> list[Integers | Floats]:
        """All that is compared, but for what all hosts of the fleet have alike."""
        return [
            *self.free.values(),
            *self.lasting.values(),
            *[one for one in self.inverse.values() if isinstance(one, np.ndarray)],
        ]

    def near_each_other(self, places: int) -> RowIndex:
        """Return an order in which hosts that follow each other score alike where it lasts, then have about as much free of everything.

        By the first resource they are cut into slabs, each of those by the second, and so on: as many cuts for each resource, at
        whole tiles. Equal ones are in order of their rows.
        """
        slabs = np.zeros(self.rows.size, dtype=np.int64)
        limits = [np.round(np.log(one) / np.log(_ALIKE)) for one in self.inverse.values() if isinstance(one, np.ndarray)]
        for kind in (*self.lasting.values(), *limits):
            kinds, kind_of = np.unique(kind, return_inverse=True)
            slabs = slabs * kinds.size + kind_of
        cuts = max(1, round((self.rows.size / places) ** (1 / len(self.free))))
        order = np.arange(self.rows.size)
        for column in self.free.values():
            order = np.lexsort((self.rows, column, slabs))
            ordered = slabs[order]
            starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
            lengths = np.diff(starts, append=ordered.size)
            within = np.arange(ordered.size) - np.repeat(starts, lengths)
            thickness = np.repeat(-(-lengths // (cuts * places)) * places, lengths)
            slabs[order] = np.cumsum(within % thickness == 0)
        return order


class Tiles:
    """Hosts by place; so many places are a tile. The first tiles have bounds, those from `loose_from` on have none."""

    __slots__ = (
        "_compute",
        "_extents",
        "_inverse",
        "_lasting",
        "_lasting_bounds",
        "_least",
        "_most",
        "_offsets",
        "_places",
        "_sizes",
        "end",
        "free",
        "loose",
        "loose_from",
        "rows",
    )

    def __init__(self, like: Hosts, *, tiles: int, places: int) -> None:
        """Make room for so many tiles of hosts that are compared by what these are."""
        size, self._places = tiles * places, places
        self.rows: RowIndex = np.zeros(size, dtype=np.intp)
        self.free: list[Integers] = [np.full(size, _NOTHING) for _ in like.free]
        """By resource that is asked for, in the order in which amounts are given."""
        self._offsets = np.arange(places)
        self._compute = {name: list(like.free).index(name) for name in (VCPUS, MEMORY)}
        self._inverse, self._lasting = _room(like.inverse, size), {name: np.zeros(size) for name in like.lasting}
        self._sizes = np.zeros(tiles, dtype=np.int64)
        # Without bounds means: nothing is known to fit, whole or in part.
        self._least, self._most = [np.full(tiles, _NOTHING) for _ in like.free], [np.full(tiles, _NOTHING) for _ in like.free]
        self._extents = Extents(
            {name: np.zeros(tiles) for name in (VCPUS, MEMORY)},
            {name: np.zeros(tiles) for name in (VCPUS, MEMORY)},
            _room(like.inverse, tiles),
            _room(like.inverse, tiles),
        )
        self._lasting_bounds = {name: np.zeros(tiles) for name in like.lasting}
        self.loose: RowIndex = np.arange(0)
        """The tiles without bounds."""
        self.end = self.loose_from = 0
        """The first place that was never used, and the one from which on hosts are loose."""

    @property
    def is_full(self) -> bool:
        return self.end == self.rows.size

    # --- what a decision asks ------------------------------------------------------------------------------------------------

    def with_room(self, amounts: Sequence[int]) -> tuple[Mask, int]:
        """Return which tiles with bounds may have hosts with all of this free, and how many hosts of all tiles have it."""
        may, whole = self._most[0] >= amounts[0], self._least[0] >= amounts[0]
        for least, most, amount in zip(self._least[1:], self._most[1:], amounts[1:], strict=True):
            may &= most >= amount
            whole &= least >= amount
        in_part = np.concatenate(((may > whole).nonzero()[0], self.loose))
        return may, int(self._sizes @ whole) + self._count_in(in_part, amounts)

    def places_with_room(self, amounts: Sequence[int]) -> RowIndex:
        """Return every place whose host has all of this free; for few tiles."""
        fits = self.free[0][: self.end] >= amounts[0]
        for column, amount in zip(self.free[1:], amounts[1:], strict=True):
            fits &= column[: self.end] >= amount
        found: RowIndex = fits.nonzero()[0]
        return found

    def bounds(self, trial: Trial, policy: Policy, scorers: Sequence[str], may: Mask) -> Floats:
        """Return what no host of each tile that fits exceeds in score; less than any score where none `may` fit."""
        totals = _scores(trial, policy, scorers, self._extents, self._lasting_bounds).totals
        bounds: Floats = np.where(may, totals, -np.inf)
        return bounds

    def scored(
        self, trial: Trial, policy: Policy, scorers: Sequence[str], *, tiles: RowIndex, amounts: Sequence[int]
    ) -> tuple[RowIndex, Scores]:
        """Return the hosts of these tiles that have all of this free, and their scores."""
        free = [column.reshape(-1, self._places).take(tiles, axis=0) for column in self.free]
        fits = free[0] >= amounts[0]
        for column, amount in zip(free[1:], amounts[1:], strict=True):
            fits &= column >= amount
        which = fits.reshape(-1).nonzero()[0]
        places = ((tiles * self._places)[:, None] + self._offsets).reshape(-1).take(which)
        own = {name: free[number].reshape(-1).take(which) for name, number in self._compute.items()}
        inverse = {name: one if isinstance(one, float) else one.take(places) for name, one in self._inverse.items()}
        shares: dict[str, Floats] = {name: np.multiply(own[name], inverse[name]) for name in own}
        lasting = {name: one.take(places) for name, one in self._lasting.items()}
        # A set of one host has no bound but its score.
        scores = _scores(trial, policy, scorers, Extents(shares, shares, inverse, inverse), lasting)
        return self.rows.take(places), scores

    def _count_in(self, tiles: RowIndex, amounts: Sequence[int]) -> int:
        """Return how many hosts of these tiles have all of this free."""
        fits = self.free[0].reshape(-1, self._places).take(tiles, axis=0) >= amounts[0]
        for column, amount in zip(self.free[1:], amounts[1:], strict=True):
            fits &= column.reshape(-1, self._places).take(tiles, axis=0) >= amount
        return int(np.count_nonzero(fits))

    # --- where hosts are -----------------------------------------------------------------------------------------------------

    def lay(self, hosts: Hosts) -> tuple[RowIndex, RowIndex]:
        """Lay these hosts into tiles with bounds and return their rows and places. Those that are loose must be among them."""
        start, count = self.loose_from, hosts.rows.size
        ordered = hosts.at(hosts.near_each_other(self._places))
        begins = np.arange(0, count, self._places)
        places, tiles = slice(start, start + count), slice(start // self._places, start // self._places + begins.size)
        self._write(ordered, places)
        self._sizes[tiles] = np.diff(begins, append=count)
        for column, least, most in zip(ordered.free.values(), self._least, self._most, strict=True):
            least[tiles] = np.minimum.reduceat(column, begins)
            most[tiles] = np.maximum.reduceat(column, begins)
        for name, inverse in ordered.inverse.items():
            shares = ordered.free[name] * inverse
            self._extents.least_shares[name][tiles] = np.minimum.reduceat(shares, begins)
            self._extents.most_shares[name][tiles] = np.maximum.reduceat(shares, begins)
            if isinstance(inverse, np.ndarray):
                _column(self._extents.least_inverse, name)[tiles] = np.minimum.reduceat(inverse, begins)
                _column(self._extents.most_inverse, name)[tiles] = np.maximum.reduceat(inverse, begins)
        for name, scores in ordered.lasting.items():
            self._lasting_bounds[name][tiles] = np.maximum.reduceat(scores, begins)
        self.end = self.loose_from = tiles.stop * self._places
        self.loose = np.arange(0)
        return ordered.rows, np.arange(start, start + count)

    def leave_loose(self, hosts: Hosts) -> tuple[RowIndex, RowIndex]:
        """Put these hosts at the end, and return their rows and places."""
        places = slice(self.end, self.end + hosts.rows.size)
        self._write(hosts, places)
        self.end = places.stop
        self.loose = np.arange(self.loose_from // self._places, -(-self.end // self._places))
        return hosts.rows, np.arange(places.start, places.stop)

    def append_like(self, place: int, row: int) -> int:
        """Put a host at the end and return its place; all but its row and what is free is as at `place`. What is free is to be written."""
        new = self.end
        self.rows[new] = row
        for lasting in self._lasting.values():
            lasting[new] = lasting[place]
        for inverse in self._inverse.values():
            if isinstance(inverse, np.ndarray):
                inverse[new] = inverse[place]
        if new % self._places == 0:
            self.loose = np.arange(self.loose_from // self._places, new // self._places + 1)
        self.end += 1
        return new

    def take_out(self, place: int) -> None:
        """Leave the place empty, in a tile with bounds."""
        self.free[0][place] = _NOTHING
        self._sizes[place // self._places] -= 1

    def _write(self, hosts: Hosts, places: slice) -> None:
        self.rows[places] = hosts.rows
        for column, free in zip(self.free, hosts.free.values(), strict=True):
            column[places] = free
        for name, scores in hosts.lasting.items():
            self._lasting[name][places] = scores
        for name, inverse in hosts.inverse.items():
            if isinstance(inverse, np.ndarray):
                _column(self._inverse, name)[places] = inverse


def _scores(trial: Trial, policy: Policy, scorers: Sequence[str], sets: Extents, lasting: Mapping[str, Floats]) -> Scores:
    """Return the bounds of the scores of these sets."""
    parts: dict[str, Floats] = {}
    for name in scorers:
        if name in lasting:
            parts[name] = lasting[name]
        else:
            of_books = SCORERS[name].bounds
            assert of_books is not None  # for policies that ask other scorers no tiles are kept
            parts[name] = of_books(trial, sets)
    return Scores(weighted_mean(parts, policy), parts)


def _room(like: Inverse, size: int) -> dict[str, Floats | float]:
    return {name: one if isinstance(one, float) else np.zeros(size) for name, one in like.items()}


def _column(columns: Inverse, name: str) -> Floats:
    column = columns[name]
    assert isinstance(column, np.ndarray)
    return column
