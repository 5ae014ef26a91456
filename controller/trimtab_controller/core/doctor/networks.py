"""Networks whose bridges differ in MTU from host to host (large packets vanish after a migration), or that a host cannot reach."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity
from trimtab_controller.core.model import Network

KINDS = ("mtu-mismatch", "network-failed")


def check(facts: FleetFacts) -> Iterator[Finding]:
    by_network: defaultdict[str, dict[str, int]] = defaultdict(dict)
    networks = {network.id: network for network in facts.networks}
    for reach in facts.network_reach:
        network, host = networks.get(reach.subject_id), facts.host_by_id.get(reach.host_id)
        if network is None or host is None:
            continue
        if reach.state == "failed":
            yield Finding(
                severity=Severity.WARNING,
                kind="network-failed",
                subject=f"network {network.name}",
                what=f"host {host.name} does not reach it: {reach.problem or 'no reason was given'}",
                cure=f"trimtab network get {network.name}",
            )
        for bridge in host.inventory.bridges if host.inventory is not None else ():
            if bridge.name == (reach.bridge or network.bridge):
                by_network[network.id][host.name] = bridge.mtu
    for network_id, mtus in by_network.items():
        yield from _of_network(networks[network_id], mtus)


def _of_network(network: Network, mtus: Mapping[str, int]) -> Iterator[Finding]:
    small = {name: mtu for name, mtu in mtus.items() if mtu < network.mtu}
    if not small and len(set(mtus.values())) < 2:
        return
    told = ", ".join(f"{name} {mtu}" for name, mtu in sorted(mtus.items(), key=lambda one: (one[1], one[0]))[:8])
    host = min(mtus, key=lambda name: (mtus[name], name))
    wanted = max(network.mtu, *mtus.values())
    yield Finding(
        severity=Severity.WARNING,
        kind="mtu-mismatch",
        subject=f"network {network.name}",
        what=f"its MTU is {network.mtu}, its bridges' differ from it or from each other: {told}",
        cure=f"on {host}: ip link set dev {network.bridge or 'BRIDGE'} mtu {wanted}",
    )
