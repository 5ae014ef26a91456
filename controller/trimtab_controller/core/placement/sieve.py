"""All filters over all hosts: who fits, how many each filter refused, and the reasons for the hosts that are asked about.

What depends on the fleet alone is sieved once for all requests of the same wishes; what names hosts, or depends on the books, anew.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters import FILTERS, Filter, Reads
from trimtab_controller.core.placement.fleet import ALL, Mask
from trimtab_controller.core.placement.verdict import HostVerdict, Refusal

_OF_FLEET = tuple(each for each in FILTERS if each.reads is Reads.FLEET)
_OTHERS = tuple(each for each in FILTERS if each.reads is not Reads.FLEET)
_ORDER = {each.name: position for position, each in enumerate(FILTERS)}

Passed = tuple[tuple[Filter, Mask], ...]


@dataclass(frozen=True, slots=True)
class Sieve:
    """The outcome of every filter. Valid until the books change."""

    fits: Mask
    fit_count: int
    refused_by: Mapping[str, int]
    """Hosts that each filter refused; filters that refused none are left out."""
    passed: Passed
    """Those filters, and who passed them."""

    @classmethod
    def of(cls, trial: Trial) -> "Sieve":
        lasting = lasting_sieve(trial)
        passed, refused_by = [*lasting.passed], {**lasting.refused_by}
        fits = lasting.fits.copy()
        size = fits.size
        for each in _OTHERS:
            mask = each.fitting(trial, ALL)
            if mask is None:
                continue
            count = int(np.count_nonzero(mask))
            if count < size:
                passed.append((each, mask))
                refused_by[each.name] = size - count
                fits &= mask
        return cls(fits, int(np.count_nonzero(fits)), refused_by, tuple(passed))

    def refused_verdicts(self, trial: Trial, *, count: int) -> tuple[HostVerdict, ...]:
        """Return the verdicts on up to `count` hosts that do not fit: the one that was asked for by name, then those with the fewest
        filters against them."""
        misses = np.zeros(self.fits.size, dtype=np.int64)
        for _, mask in self.passed:
            misses += ~mask
        refused = np.flatnonzero(misses)
        named = trial.fleet.row_of.get(trial.request.required_host_id)
        if named is not None and misses[named]:
            misses[named] = 0
        rows = refused[np.argsort(misses[refused], kind="stable")[:count]]
        reasons: dict[int, list[Refusal]] = {row: [] for row in rows.tolist()}
        for each, mask in sorted(self.passed, key=lambda passed: _ORDER[passed[0].name]):
            for row in rows[~mask[rows]].tolist():
                reasons[row] += each.refusals(trial, row)
        return tuple(_verdict(trial, row, tuple(refusals)) for row, refusals in reasons.items())


def lasting_sieve(trial: Trial) -> Sieve:
    """Return the outcome of the filters that read the fleet alone: the same object for the same wishes, whatever is booked."""
    return trial.fleet.remembered(("sieve", _wishes(trial)), lambda: _sieved(trial))


def _sieved(trial: Trial) -> Sieve:
    size = len(trial.fleet)
    passed: list[tuple[Filter, Mask]] = []
    refused_by: dict[str, int] = {}
    fits = np.ones(size, dtype=np.bool_)
    for each in _OF_FLEET:
        mask = each.fitting(trial, ALL)
        if mask is None:
            continue
        count = int(np.count_nonzero(mask))
        if count < size:
            passed.append((each, mask))
            refused_by[each.name] = size - count
            fits &= mask
    fits.setflags(write=False)
    return Sieve(fits, int(np.count_nonzero(fits)), refused_by, tuple(passed))


def _wishes(trial: Trial) -> Hashable:
    """Return everything that a filter of the fleet reads from a request: a new one belongs here too (a property test sees to it)."""
    request = trial.request
    return (
        project_that_matters(trial),
        request.arch,
        request.cpu_model,
        request.cpu_features,
        request.machine,
        request.firmware,
        request.capabilities,
        request.accelerator,
        request.qemu_series,
        request.host_class,
        frozenset(request.host_selector.items()),
        tuple([(one.key, one.value) for one in request.tolerations]),
        frozenset(disk.pool_id for disk in request.disks),
        frozenset(trial.space.shared_bytes),
        # As tuples: the hash and the comparison of dataclasses run in Python, once for each of them.
        tuple([(one.network_id, one.mtu) for one in request.networks]),
    )


def project_that_matters(trial: Trial) -> str:
    """Return the project of the request where hosts are kept for it; of all others '', since they are treated alike."""
    fleet = trial.fleet
    owners = fleet.remembered("owners", lambda: {host.exclusive_project_id for host in fleet.hosts} | {""})
    return trial.request.project_id if trial.request.project_id in owners else ""


def refused_verdict(trial: Trial, row: int) -> HostVerdict | None:
    """Return the verdict on one host with every reason against it; None where it fits."""
    refusals = tuple(refusal for each in FILTERS for refusal in each.refusals(trial, row))
    return _verdict(trial, row, refusals) if refusals else None


def _verdict(trial: Trial, row: int, refusals: tuple[Refusal, ...]) -> HostVerdict:
    host = trial.fleet.hosts[row]
    return HostVerdict(host.host_id, host.name, refusals)
