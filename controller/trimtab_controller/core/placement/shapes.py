"""Which requests may share an answer that is kept along: those of one shape all of it, those of one family all but their sizes."""

from collections.abc import Hashable
from typing import NamedTuple

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.filters.capacity import lacks_shared_space
from trimtab_controller.core.placement.policies import Policy, knows_lifetimes
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.sieve import project_that_matters


class Asked(NamedTuple):
    """One request, held against the books, with what its answer may be kept by."""

    trial: Trial
    policy: Policy
    family: Hashable
    """All of it that an answer depends on, but for its sizes."""
    shape: Hashable
    """Its sizes as well; the rest only names it, or is looked at for each decision."""

    @classmethod
    def of(cls, books: Books, request: PlacementRequest, policy: Policy) -> "Asked | None":
        """Return the request; None where only a scan can tell: hosts are named, the group has wishes, a shared pool is full."""
        trial = Trial.of(books, request)
        if _is_singular(trial, policy):
            return None
        family = _family(trial, policy)
        return cls(trial, policy, family, (family, *_sizes(request)))


def _is_singular(trial: Trial, policy: Policy) -> bool:
    request, books = trial.request, trial.books
    if request.group is not None and not all(rule.is_must for rule in request.group.rules):
        return True
    if request.required_host_id or request.preferred_host_id or request.excluded_host_ids:
        return True
    if books.occupancy is not None and knows_lifetimes(policy):
        return True  # that a host is in use for so long changes with time, whatever is claimed
    return bool(trial.space.bound) or lacks_shared_space(trial)


def _sizes(request: PlacementRequest) -> tuple[Hashable, ...]:
    scarce = tuple(request.devices.values()), tuple(request.resources.values())
    return request.vcpus, request.memory_mib, request.cell_count, tuple([disk.size_bytes for disk in request.disks]), scarce


def _family(trial: Trial, policy: Policy) -> Hashable:
    request = trial.request
    return (
        policy.name,
        request.kind,
        project_that_matters(trial),
        # As tuples: the hash and the comparison of dataclasses run in Python, once for each of them.
        tuple([(disk.pool_id, disk.host_id, disk.is_claimed) for disk in request.disks]),
        tuple([(one.network_id, one.mtu) for one in request.networks]),
        tuple([(one.key, one.value) for one in request.tolerations]),
        request.arch,
        request.cpu_model,
        request.cpu_features,
        request.machine,
        request.firmware,
        request.capabilities,
        request.accelerator,
        request.qemu_series,
        request.host_class,
        request.is_dedicated,
        request.page_kib,
        request.image_ids,
        request.restarts_elsewhere,
        tuple(request.devices),
        tuple(request.resources),
        frozenset(request.host_selector.items()),
    )
