"""Can this host get at the vm's disks and networks."""

from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads, of_fleet
from trimtab_controller.core.placement.fleet import FleetSnapshot, Mask, NetworkReach
from trimtab_controller.core.placement.request import NetworkNeed
from trimtab_controller.core.placement.verdict import Refusal


def _pool_ids(trial: Trial) -> list[str]:
    return sorted({disk.pool_id for disk in trial.request.disks})


def _unproven_pool_ids(trial: Trial) -> list[str]:
    """Return shared pools that must not take this request's new disks yet."""
    pools = trial.fleet.pools
    return [pool_id for pool_id in sorted(trial.space.shared_bytes) if not pools[pool_id].is_sharing_proven]


def _reaches_pools(trial: Trial) -> Mask | None:
    fits = None
    for pool_id in _pool_ids(trial):
        if pool_id not in trial.fleet.pools:
            return trial.fleet.only(())
        mask = trial.fleet.where_contains("pools", (pool_id, True))
        fits = mask if fits is None else fits & mask
    return trial.fleet.only(()) if _unproven_pool_ids(trial) else fits


def _does_not_reach_pools(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host, pools = trial.fleet.hosts[row], trial.fleet.pools
    found = []
    for pool_id in _pool_ids(trial):
        if pool_id not in pools:
            found.append(Refusal("pools", "pool-unknown", f"pool {pool_id} does not exist", {"pool_id": pool_id}))
        elif pool_id not in host.pools:
            message = f"pool {pools[pool_id].name} is not set up on it"
            found.append(Refusal("pools", "pool-not-on-host", message, {"pool_id": pool_id}))
        elif not host.pools[pool_id]:
            message = f"pool {pools[pool_id].name} is not ready on it; see `trimtab pool get {pools[pool_id].name}`"
            found.append(Refusal("pools", "pool-not-ready", message, {"pool_id": pool_id}))
    for pool_id in _unproven_pool_ids(trial):
        message = f"pool {pools[pool_id].name} is not yet proven to be shared: each host must read what another wrote"
        found.append(Refusal("pools", "pool-sharing-unproven", message, {"pool_id": pool_id}))
    return tuple(found)


def _has_disks(trial: Trial) -> Mask | None:
    owners = {disk.host_id for disk in trial.space.bound}
    if not owners:
        return None
    return trial.fleet.only(owners if len(owners) == 1 else ())  # disks on two hosts fit nowhere


def _has_not_disks(trial: Trial, row: int) -> tuple[Refusal, ...]:
    fleet = trial.fleet
    found = []
    for disk in trial.space.bound:
        if disk.host_id == fleet.hosts[row].host_id:
            continue
        home = fleet.row_of.get(disk.host_id)
        owner = f"{fleet.hosts[home].name}'s" if home is not None else f"absent host {disk.host_id}'s"
        message = f"disk {disk.name} is on {owner} local pool"
        found.append(Refusal("disks", "disk-elsewhere", message, {"disk": disk.name, "host_id": disk.host_id}))
    return tuple(found)


def _network_refusal(need: NetworkNeed, reach: NetworkReach | None) -> Refusal | None:
    """Return what stands against using the network through this reach; None: not set up."""
    context = {"network_id": need.network_id}
    if reach is None:
        return Refusal("networks", "network-not-on-host", f"network {need.name} is not set up on it", context)
    if not reach.is_ready:
        message = f"network {need.name} is not ready on it; see `trimtab network get {need.name}`"
        return Refusal("networks", "network-not-ready", message, context)
    if reach.lost_bridge:
        message = f"network {need.name} goes nowhere from it: its bridge {reach.lost_bridge} has lost its carrier"
        return Refusal("networks", "network-without-carrier", message, {**context, "bridge": reach.lost_bridge})
    if 0 < reach.mtu < need.mtu:
        message = f"network {need.name} needs MTU {need.mtu}, its bridge has {reach.mtu}"
        return Refusal("networks", "network-mtu-too-small", message, {**context, "needed": need.mtu, "found": reach.mtu})
    return None


def _reaching(need: NetworkNeed, fleet: FleetSnapshot) -> Mask:
    def is_reached(own: frozenset[tuple[str, NetworkReach]]) -> bool:
        return _network_refusal(need, dict(own).get(need.network_id)) is None

    return fleet.where("networks", (need.network_id, need.mtu), is_reached)


def _reaches_networks(trial: Trial) -> Mask | None:
    fits = None
    for need in trial.request.networks:
        mask = _reaching(need, trial.fleet)
        fits = mask if fits is None else fits & mask
    return fits


def _does_not_reach_networks(trial: Trial, row: int) -> tuple[Refusal, ...]:
    own = trial.fleet.hosts[row].networks
    found = (_network_refusal(need, own.get(need.network_id)) for need in trial.request.networks)
    return tuple(refusal for refusal in found if refusal is not None)


FILTERS = (
    of_fleet("disks", _has_disks, _has_not_disks, reads=Reads.NAMES),
    of_fleet("pools", _reaches_pools, _does_not_reach_pools),
    of_fleet("networks", _reaches_networks, _does_not_reach_networks),
)
