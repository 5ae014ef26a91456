"""The arithmetic of rebalancing: loads as shares of each host, their spread, and the best next move. Columns in, moves out.

The score is the weighted sum of the standard deviations of the hosts' shares, one for each dimension. The worth of a move is what it
takes off the score times the number of hosts, so that the same move is worth the same in a small fleet and a large one; its cost is
charged against that. Every move is held against capacity and against the hosts that the vm may use at all.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.fleet import Floats, Integers

Masks = npt.NDArray[np.bool_]
# The first look: the vms of the most loaded hosts against the least loaded ones. What it misses, the full look finds.
_LOOKED_SOURCES = 6
_LOOKED_TARGETS = 24
# Cells (vms times hosts) of one evaluation: more does not stay in the processor's cache.
_CHUNK_CELLS = 60_000


@dataclass(frozen=True, slots=True)
class Shift:
    """Vm (column), from host to host (rows), and what it was worth after its cost."""

    vm: int
    source: int
    target: int
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceInput:
    """V vms on H hosts in D dimensions. Rows of hosts that take no part are left out by the caller."""

    loads: Floats
    """D x V, in units of the dimension."""
    inverse_capacity: Floats
    """D x H: loads times this are shares."""
    base: Floats
    """D x H: shares that stay, such as unmanaged domains."""
    weights: Floats
    """D."""
    home: npt.NDArray[np.intp]
    """V: the host's row."""
    needs: Integers
    """R x V: what a move claims, for each resource that is never exceeded."""
    free: Integers
    """R x H."""
    allowed: Masks
    """C x H: the hosts of each class of equal vms."""
    class_of: npt.NDArray[np.intp]
    """V."""
    cost: Floats
    """V: what a move must be worth before it counts; infinite for a vm that stays."""


class Balance:
    """The state while moves are chosen. Its arrays are its own."""

    __slots__ = ("_allowed", "_class_of", "_ones", "_twos", "free", "given", "home", "shares")

    def __init__(self, given: BalanceInput) -> None:
        self.given = given
        self.home = given.home.copy()
        self._allowed, self._class_of = given.allowed, given.class_of.copy()
        self.free = given.free.copy()
        self.shares = given.base.copy()
        for dimension, loads in enumerate(given.loads):
            per_vm = loads * given.inverse_capacity[dimension][self.home]
            self.shares[dimension] += np.bincount(self.home, weights=per_vm, minlength=self.shares.shape[1])
        self._sum()

    @property
    def host_count(self) -> int:
        return int(self.shares.shape[1])

    def spreads(self) -> Floats:
        """Return the standard deviation of each dimension."""
        spreads: Floats = self.shares.std(axis=1)
        return spreads

    def score(self) -> float:
        return float(self.given.weights @ self.spreads())

    def apply(self, shift: Shift) -> None:
        given, vm = self.given, shift.vm
        self.shares[:, shift.source] -= given.loads[:, vm] * given.inverse_capacity[:, shift.source]
        self.shares[:, shift.target] += given.loads[:, vm] * given.inverse_capacity[:, shift.target]
        self.free[:, shift.source] += given.needs[:, vm]
        self.free[:, shift.target] -= given.needs[:, vm]
        self.home[vm] = shift.target
        self._sum()

    def possible(self, vm: int) -> Masks:
        """Return the hosts that the vm may move to by what the columns know."""
        found: Masks = self._allowed[self._class_of[vm]].copy()
        found[self.home[vm]] = False
        for need, free in zip(self.given.needs, self.free, strict=True):
            found &= need[vm] <= free
        return found

    def forbid(self, vm: int, host: int) -> None:
        """Do not offer this move again until `reconsider`: a rule that the columns do not know stands against it."""
        own = self._allowed[self._class_of[vm]].copy()
        own[host] = False
        self._class_of[vm] = len(self._allowed)
        self._allowed = np.vstack([self._allowed, own[None, :]])

    def reconsider(self) -> None:
        """Offer again what was forbidden."""
        self._class_of, self._allowed = self.given.class_of.copy(), self.given.allowed

    def best(self, *, least_worth: float) -> Shift | None:
        """Return a move that is worth more than `least_worth`: the best of a short look, else the best of all; None: there is none."""
        found = self._best_of(self._hot_vms(), self._cold_hosts())
        if found is not None and found.worth > least_worth:
            return found
        found = self._best_of(np.flatnonzero(np.isfinite(self.given.cost)), np.arange(self.host_count))
        return found if found is not None and found.worth > least_worth else None

    def _sum(self) -> None:
        self._ones = self.shares.sum(axis=1)
        self._twos = np.einsum("dh,dh->d", self.shares, self.shares)

    def _pressure(self) -> Floats:
        """Return how far each host is from the middle, all dimensions weighed as in the score."""
        spreads = np.maximum(self.spreads(), 1e-12)
        deviation = self.shares - self.shares.mean(axis=1, keepdims=True)
        pressure: Floats = (self.given.weights / spreads) @ deviation
        return pressure

    def _hot_vms(self) -> npt.NDArray[np.intp]:
        hottest = np.argsort(-self._pressure(), kind="stable")[:_LOOKED_SOURCES]
        return np.flatnonzero(np.isin(self.home, hottest) & np.isfinite(self.given.cost))

    def _cold_hosts(self) -> npt.NDArray[np.intp]:
        return np.sort(np.argsort(self._pressure(), kind="stable")[:_LOOKED_TARGETS])

    def _best_of(self, vms: npt.NDArray[np.intp], hosts: npt.NDArray[np.intp]) -> Shift | None:
        best: Shift | None = None
        width = max(1, _CHUNK_CELLS // max(1, hosts.size))
        for start in range(0, vms.size, width):
            chunk = vms[start : start + width]
            worth = self._worth(chunk, hosts)
            position = int(worth.argmax())
            row, column = divmod(position, hosts.size)
            value = float(worth[row, column])
            if np.isfinite(value) and (best is None or value > best.worth):
                vm = int(chunk[row])
                best = Shift(vm, int(self.home[vm]), int(hosts[column]), value)
        return best

    def _worth(self, vms: npt.NDArray[np.intp], hosts: npt.NDArray[np.intp]) -> Floats:
        """Return vms x hosts: what each move is worth after its cost; minus infinity where it is not possible."""
        given, count, source = self.given, self.host_count, self.home[vms]
        worth = np.zeros((vms.size, hosts.size))
        for dimension, weight in enumerate(given.weights):
            load, shares = given.loads[dimension][vms], self.shares[dimension]
            inverse = given.inverse_capacity[dimension]
            left, own = load * inverse[source], shares[source]
            entered = np.multiply.outer(load, inverse[hosts])
            ones = (self._ones[dimension] - left)[:, None] + entered
            twos = entered + 2 * shares[hosts]
            twos *= entered
            twos += (self._twos[dimension] + left * (left - 2 * own))[:, None]
            ones *= ones
            ones /= count
            twos -= ones
            twos /= count
            np.maximum(twos, 0.0, out=twos)
            np.sqrt(twos, out=twos)
            twos -= _deviation(self._ones[dimension], self._twos[dimension], count)
            twos *= -weight * count
            worth += twos
        worth -= given.cost[vms][:, None]
        possible = self._allowed[self._class_of[vms]][:, hosts]
        possible &= source[:, None] != hosts
        for need, free in zip(given.needs, self.free, strict=True):
            possible &= need[vms][:, None] <= free[hosts]
        worth[~possible] = -np.inf
        return worth


def _deviation(ones: float, twos: float, count: int) -> float:
    return float(np.sqrt(max(0.0, (twos - ones * ones / count) / count)))
