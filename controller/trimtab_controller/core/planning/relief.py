"""Memory that is really used, in a rebalance: which hosts have nearly none left, and which vm leaves for where.

What counts is what hosts and guests were measured to hold (rollups), not what is claimed: guests hold less than they claim until they
have touched it all, and others use a host, too. What a vm holds goes where it goes, so that the state after each move is predicted from
the same figures, and a host that was relieved is seen as relieved at once.

What keeps it calm: a host is short above one mark and relieved down to a lower one, and no move takes another beyond that one. So what
is used beyond the lower mark only ever falls, and a host that goes up and down between the marks moves nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab_controller.core.placement.fleet import Floats, Integers
from trimtab_controller.core.planning.balance import Balance, Shift
from trimtab_controller.core.planning.estate import Estate, Power, VmSnapshot
from trimtab_controller.core.planning.load import HostUse

_UNKNOWN = HostUse()
_UNBOUNDED = 1 << 60
# The emptiest hosts that are asked for each vm: where none of these takes it, rules stand against it and not room.
_LOOKED_TARGETS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Columns of V vms and H hosts, in MiB."""

    capacity_mib: Integers
    """H; 0 where nobody says what of it is used: such a host is neither relieved nor kept from filling."""
    others_mib: Integers
    """H: used by others than vms."""
    waiting: Floats
    """H: the share of the time in which tasks wait for memory."""
    used_mib: Integers
    """V; 0 where nothing was measured."""
    needed_mib: Integers
    """V: what a host is taken to give it: what it was measured to hold, else all that it claims."""

    @classmethod
    def of(cls, estate: Estate, host_ids: Sequence[str], vms: Sequence[VmSnapshot]) -> "MemoryUse":
        uses = [estate.use.get(host_id, _UNKNOWN) for host_id in host_ids]
        return cls(
            capacity_mib=np.array([use.memory_mib for use in uses], dtype=np.int64),
            others_mib=np.array([use.memory_others_mib for use in uses], dtype=np.int64),
            waiting=np.array([use.memory_pressure for use in uses], dtype=np.float64),
            used_mib=np.array([0 if vm.power is Power.STOPPED else vm.used_mib for vm in vms], dtype=np.int64),
            needed_mib=np.array([_needed_mib(vm) for vm in vms], dtype=np.int64),
        )

    @property
    def is_known(self) -> bool:
        return bool(self.capacity_mib.any())

    def shares(self, home: npt.NDArray[np.intp]) -> Floats:
        """Return what share of each host's memory is used with the vms there; 0 where it is not known."""
        used: Floats = (self.others_mib + _sums(home, self.used_mib, self.capacity_mib.size)) / np.maximum(self.capacity_mib, 1)
        return np.where(self.capacity_mib > 0, used, 0.0)

    def room_mib(self, home: npt.NDArray[np.intp], *, ceiling: float, waiting_max: float) -> Integers:
        """Return what moves may still bring to each host; nothing where tasks wait for memory as it is."""
        taken = self.others_mib + _sums(home, self.needed_mib, self.capacity_mib.size)
        room = np.where(self.capacity_mib > 0, np.floor(self.capacity_mib * ceiling).astype(np.int64) - taken, _UNBOUNDED)
        found: Integers = np.where(self.waiting > waiting_max, np.minimum(room, 0), room)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """Takes vms off hosts that are short."""

    balance: Balance
    memory: MemoryUse
    full: float
    """A host that is predicted to use more than this share of its memory is short."""
    relieved: float
    """It is relieved until it uses no more than this."""
    may_move: Callable[[int], bool]
    """Whether the budget has a move for this vm."""
    move: Callable[[Shift], bool]
    """Makes a move, unless a rule stands against it."""

    def short(self) -> list[int]:
        """Return the hosts that are short, the fullest first."""
        shares = self.memory.shares(self.balance.home)
        return [int(row) for row in np.argsort(-shares, kind="stable") if shares[row] > self.full]

    def relieve(self) -> None:
        """Make the moves that relieve them, as far as there is a place for their vms."""
        for host in self.short():
            while self._excess_mib(host) > 0 and self._relieve_once(host):
                pass

    def _excess_mib(self, host: int) -> int:
        share, capacity_mib = self.memory.shares(self.balance.home)[host], int(self.memory.capacity_mib[host])
        return max(0, int(np.ceil((share - self.relieved) * capacity_mib)))

    def _relieve_once(self, host: int) -> bool:
        """Move the vm that is enough and holds the least, else the one that holds the most; to where most is left."""
        balance, used_mib, excess_mib = self.balance, self.memory.used_mib, self._excess_mib(host)
        here = np.flatnonzero((balance.home == host) & np.isfinite(balance.given.cost) & (used_mib > 0)).tolist()
        enough = sorted((vm for vm in here if used_mib[vm] >= excess_mib), key=lambda vm: int(used_mib[vm]))
        less = sorted((vm for vm in here if used_mib[vm] < excess_mib), key=lambda vm: -int(used_mib[vm]))
        coolest = np.argsort(self.memory.shares(balance.home), kind="stable")
        for vm in [*enough, *less]:
            if not self.may_move(vm):
                continue
            possible = balance.possible(vm)
            targets = [int(row) for row in coolest if possible[row]][:_LOOKED_TARGETS]
            if any(self.move(Shift(vm, host, target, 0.0)) for target in targets):
                return True
        return False


def _needed_mib(vm: VmSnapshot) -> int:
    if vm.power is Power.STOPPED:
        return 0
    claimed_mib = 0 if vm.request.page_kib else vm.request.memory_mib  # huge pages are taken from the host already
    return max(1, vm.used_mib or claimed_mib)


def _sums(home: npt.NDArray[np.intp], values: Integers, count: int) -> Integers:
    sums: Integers = np.bincount(home, weights=values, minlength=count).astype(np.int64)
    return sums
