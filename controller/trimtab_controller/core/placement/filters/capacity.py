"""Is there room: vcpus, memory, and space on pools, after everything that is claimed or used by domains that are not ours."""

from collections.abc import Sequence

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Filter, Reads
from trimtab_controller.core.placement.fleet import ALL, MEMORY, VCPUS, Mask, Rows, local_space
from trimtab_controller.core.placement.verdict import Context, Refusal


def _has_vcpus(trial: Trial, rows: Rows = ALL) -> Mask | None:
    needed = trial.amounts.get(VCPUS)
    return None if needed is None else trial.has(VCPUS, needed, rows)


def _vcpus(trial: Trial) -> Sequence[str]:
    return (VCPUS,) if VCPUS in trial.amounts else ()


def _lacks_vcpus(trial: Trial, row: int) -> tuple[Refusal, ...]:
    needed, free = trial.amounts.get(VCPUS), trial.free(VCPUS, row)
    if needed is None or free >= needed:
        return ()
    host = trial.fleet.hosts[row]
    aside = f" ({host.unmanaged_vcpus} used by unmanaged domains)" if host.unmanaged_vcpus else ""
    message = f"needs {needed} vcpus, {max(0, free)} free of {host.vcpus_limit}{aside}"
    return (Refusal("vcpus", "vcpus-short", message, {"needed": needed, "free": free, "limit": host.vcpus_limit}),)


def _has_memory(trial: Trial, rows: Rows = ALL) -> Mask | None:
    needed = trial.amounts.get(MEMORY)
    return None if needed is None else trial.has(MEMORY, needed, rows)


def _memory(trial: Trial) -> Sequence[str]:
    return (MEMORY,) if MEMORY in trial.amounts else ()


def _lacks_memory(trial: Trial, row: int) -> tuple[Refusal, ...]:
    needed, free = trial.amounts.get(MEMORY), trial.free(MEMORY, row)
    if needed is None or free >= needed:
        return ()
    host = trial.fleet.hosts[row]
    asides = [f"reserve {host.memory_reserve_mib}"] if host.memory_reserve_mib else []
    asides += [f"{host.unmanaged_memory_mib} used by unmanaged domains"] if host.unmanaged_memory_mib else []
    aside = f" ({', '.join(asides)})" if asides else ""
    message = f"needs {needed} MiB, {max(0, free)} MiB free of {host.memory_limit_mib}{aside}"
    return (Refusal("memory", "memory-short", message, {"needed": needed, "free": free, "limit": host.memory_limit_mib}),)


def lacks_shared_space(trial: Trial) -> bool:
    """Return whether a shared pool is too full: then no host fits, whatever else is free."""
    free = trial.books.shared_free_bytes
    return any(size_bytes > free[pool_id] for pool_id, size_bytes in trial.space.shared_bytes.items())


def _has_space(trial: Trial, rows: Rows = ALL) -> Mask | None:
    if lacks_shared_space(trial):
        return trial.fleet.only(())[rows]
    fits = None
    for pool_id, size_bytes in trial.space.local_bytes.items():
        mask = trial.has(local_space(pool_id), size_bytes, rows)
        fits = mask if fits is None else fits & mask
    return fits


def _local_spaces(trial: Trial) -> Sequence[str]:
    """Of shared pools there is enough for all hosts or for none: who keeps figures of hosts asks `lacks_shared_space` before."""
    return [local_space(pool_id) for pool_id in trial.space.local_bytes]


def _lacks_space(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host_id = trial.fleet.hosts[row].host_id
    found = []
    for pool_id, needed in trial.space.shared_bytes.items():
        free = trial.books.shared_free_bytes[pool_id]
        found += _short_of_space(trial, pool_id, "", needed=needed, free=free)
    for pool_id, needed in trial.space.local_bytes.items():
        free = trial.free(local_space(pool_id), row)
        found += _short_of_space(trial, pool_id, host_id, needed=needed, free=free)
    return tuple(found)


def _short_of_space(trial: Trial, pool_id: str, host_id: str, *, needed: int, free: int) -> list[Refusal]:
    if free >= needed:
        return []
    pool = trial.fleet.pools[pool_id]
    place = pool.places.get(host_id)
    context: Context = {"pool_id": pool_id, "needed": needed, "free": free}
    if place is None or place.capacity_bytes == 0:
        message = f"needs {_size(needed)} on pool {pool.name}, whose space is not reported yet"
        return [Refusal("space", "pool-space-unknown", message, context)]
    message = f"needs {_size(needed)} on pool {pool.name}, {_size(max(0, free))} free of {_size(place.capacity_bytes)}"
    return [Refusal("space", "pool-space-short", message, context)]


def _size(size_bytes: int) -> str:
    """Return a size as people read it; bytes below one MiB, so that a near miss does not print two equal figures."""
    for unit, exponent in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size_bytes >= 1 << exponent:
            return f"{size_bytes / (1 << exponent):.1f} {unit}"
    return f"{size_bytes} bytes"


FILTERS = (
    Filter("vcpus", _has_vcpus, _lacks_vcpus, Reads.ROW, _vcpus),
    Filter("memory", _has_memory, _lacks_memory, Reads.ROW, _memory),
    Filter("space", _has_space, _lacks_space, Reads.ROW, _local_spaces),
)
