"""Networks whose bridges differ in MTU from host to host (large packets vanish after a move), or that a host does not reach."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity

HOSTS_SHOWN = 8


def mismatched(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for network in fleet.networks:
        sizes = sorted((mtu, name) for name, mtu in network.mtus.items())
        if not sizes or (sizes[0][0] >= network.mtu and sizes[0][0] == sizes[-1][0]):
            continue
        told = ", ".join(f"{name} {mtu}" for mtu, name in sizes[:HOSTS_SHOWN])
        wanted = max(network.mtu, sizes[-1][0])
        found.append(
            Finding(
                severity=Severity.WARNING,
                kind="mtu-mismatch",
                subject=f"network {network.name}",
                message=f"its MTU is {network.mtu}, that of its bridges differs from it or from host to host: {told}",
                cure=f"on {sizes[0][1]}: ip link set dev {network.bridge or 'BRIDGE'} mtu {wanted}",
            )
        )
    return tuple(found)


def unreachable(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            severity=Severity.WARNING,
            kind="network-unusable",
            subject=f"network {network.name}",
            message=f"host {host} does not reach it: {problem}",
            cure=f"trimtab network get {network.name}",
        )
        for network in fleet.networks
        for host, problem in network.problems.items()
    )
