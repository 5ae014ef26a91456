"""What one would write first: all rules and the score for one host after the other. Keeps no reasons."""

from collections import Counter
from collections.abc import Sequence

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import GroupSnapshot, HostSnapshot, PlacementRequest, PoolSnapshot, TaintEffect


class PlainLoop:
    """Two pools: a local one first, then a shared one. Groups: anti-affinity alone."""

    def __init__(self, hosts: Sequence[HostSnapshot], pools: Sequence[PoolSnapshot], groups: Sequence[GroupSnapshot]) -> None:
        self.hosts = sorted(hosts, key=lambda host: host.name)
        self.labels = {host.host_id: {"host": host.host_id, **host.labels} for host in hosts}
        self.vcpus = {host.host_id: host.vcpus_limit - host.vcpus_claimed - host.unmanaged_vcpus for host in hosts}
        self.memory_mib = {host.host_id: host.memory_limit_mib - host.memory_claimed_mib for host in hosts}
        self.devices = {host.host_id: {kind: one.limit - one.claimed for kind, one in host.devices.items()} for host in hosts}
        self.counted = {host.host_id: {name: one.limit - one.claimed for name, one in host.resources.items()} for host in hosts}
        self.local = {host.host_id: pools[0].free_bytes(host.host_id) for host in hosts}
        self.shared = pools[1].free_bytes()
        self.members = {group.group_id: dict(group.members) for group in groups}

    def place(self, request: PlacementRequest) -> str | None:
        local, shared = request.disks[0].size_bytes, request.disks[1].size_bytes
        taken = self._taken(request)
        best, best_score = None, -1.0
        for host in self.hosts:
            host_id = host.host_id
            if not self._fits(request, host) or self.local[host_id] < local or self.shared < shared:
                continue
            if any(counts[self.labels[host_id][domain]] >= limit for domain, limit, counts in taken):
                continue
            vcpus = (self.vcpus[host_id] - request.vcpus) / host.vcpus_limit
            memory = (self.memory_mib[host_id] - request.memory_mib) / host.memory_limit_mib
            score = 1.0 - 0.5 * (vcpus * vcpus + memory * memory)
            if score > best_score:
                best, best_score = host_id, score
        if best is not None:
            self._claim(request, best)
        return best

    def _taken(self, request: PlacementRequest) -> list[tuple[str, int, Counter[str]]]:
        if request.group is None:
            return []
        at = self.members[request.group.group_id].values()
        rules = [rule for rule in request.group.rules if rule.is_must]
        return [(rule.domain, rule.limit, Counter(self.labels[host_id][rule.domain] for host_id in at)) for rule in rules]

    def _claim(self, request: PlacementRequest, host_id: str) -> None:
        self.vcpus[host_id] -= request.vcpus
        self.memory_mib[host_id] -= request.memory_mib
        self.local[host_id] -= request.disks[0].size_bytes
        self.shared -= request.disks[1].size_bytes
        for kind, count in request.devices.items():
            self.devices[host_id][kind] -= count
        for name, amount in request.resources.items():
            self.counted[host_id][name] -= amount
        if request.group is not None:
            self.members[request.group.group_id][request.vm_id] = host_id

    def _fits(self, request: PlacementRequest, host: HostSnapshot) -> bool:
        return (
            host.connectivity is HostConnectivity.UP
            and not host.is_cordoned
            and self.vcpus[host.host_id] >= request.vcpus
            and self.memory_mib[host.host_id] >= request.memory_mib
            and host.host_class == request.host_class
            and host.arch == request.arch
            and host.exclusive_project_id in ("", request.project_id)
            and all(host.labels.get(key) == value for key, value in request.host_selector.items())
            and request.cpu_model in host.usable_cpu_models
            and request.machine in host.machines
            and all(feature in host.cpu_features for feature in request.cpu_features)
            and all(host.pools.get(disk.pool_id, False) for disk in request.disks)
            and all(self.devices[host.host_id].get(kind, 0) >= count for kind, count in request.devices.items())
            and all(self.counted[host.host_id].get(name, 0) >= amount for name, amount in request.resources.items())
            and all(
                taint.effect is TaintEffect.AVOID or any(one.covers(taint) for one in request.tolerations)
                for taint in host.taints
            )
            and all(
                (reach := host.networks.get(need.network_id)) is not None and reach.is_ready and reach.mtu >= need.mtu
                for need in request.networks
            )
        )
