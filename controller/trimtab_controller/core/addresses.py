"""Addresses of a network's subnet: which is free, which is nobody's to take, which subnets meet. Pure.

The first address of a subnet is its router's: libvirt gives it to the host on networks that it makes, and on bridges it is left alone
when an address is drawn, since that is where routers are.
"""

import ipaddress
from collections.abc import Collection, Iterable

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
LONGEST_OWN_PREFIX = 29
"""Of a subnet in which this product answers DHCP: fewer guests than that are no network."""


def gateway_of(kind: str, subnet: str) -> str:
    """Return the address that the network itself has in it; '' on bridges, whose hosts and routers are the operator's."""
    if not subnet or kind not in {"nat", "isolated", "overlay"}:
        return ""
    return str(ipaddress.ip_network(subnet)[1])


def first_free(subnet: str, taken: Collection[str]) -> str | None:
    """Return the lowest address that a guest can be given: neither taken nor the first; None where all are, or of IPv6."""
    network = ipaddress.ip_network(subnet)
    if network.version == 6 or network.num_addresses < 4:
        return None  # an IPv6 guest makes its own
    first, last = int(network.network_address) + 2, int(network.broadcast_address) - 1
    held = {int(ipaddress.ip_address(text)) for text in taken if ":" not in text}
    # As many steps as there are addresses taken, whatever the size of the subnet.
    found = next((number for number in range(first, last + 1) if number not in held), None)
    return str(ipaddress.IPv4Address(found)) if found is not None else None


def overlapping(subnet: str, others: Iterable[tuple[str, str]]) -> str | None:
    """Return the name of the first of `others` (name, subnet) that shares an address with the subnet."""
    wanted = ipaddress.ip_network(subnet)
    for name, text in others:
        other = ipaddress.ip_network(text)
        if wanted.version == other.version and wanted.overlaps(other):
            return name
    return None
