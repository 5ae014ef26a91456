"""Addresses of a network's subnet: which is free, which is nobody's to take, which subnets meet. Pure.

The first address of a subnet is its router's: libvirt gives it to the host on networks that it makes, and on bridges it is left alone
when an address is drawn, since that is where routers are.
"""

import ipaddress
from collections.abc import Collection, Iterable

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network
LONGEST_OWN_PREFIX = 29
"""Of a subnet in which this product answers DHCP: fewer guests than that are no network."""
GUESTS_PREFIX6 = 64
"""Of an IPv6 subnet in which guests make their own addresses: its other half is the interface's."""
_EVERYBODY = ipaddress.IPv4Address("255.255.255.255")


def gateway_of(kind: str, subnet: str) -> str:
    """Return the address that the network itself has in it; '' on bridges, whose hosts and routers are the operator's."""
    if not subnet or kind not in {"nat", "isolated", "overlay"}:
        return ""
    return str(ipaddress.ip_network(subnet)[1])


def made_of_mac(mac: str, subnet6: str) -> str:
    """Return the address that a guest with this MAC makes itself in an IPv6 subnet of /64: its interface id is the modified EUI-64."""
    octets = bytes.fromhex(mac.replace(":", ""))
    interface_id = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ipaddress.IPv6Network(subnet6)[int.from_bytes(interface_id, "big")])


def subnet6_problem(subnet6: str) -> str:
    """Return what is wrong with an IPv6 subnet in which guests make their own addresses; '' where nothing is."""
    try:
        subnet = ipaddress.IPv6Network(subnet6)
    except ValueError as error:
        return f"{error}; for example fd00:20::/64"
    if subnet.prefixlen != GUESTS_PREFIX6:
        return f"guests make their addresses in a /{GUESTS_PREFIX6}, for example fd00:20::/64, not {subnet6}"
    if subnet.is_link_local or subnet.is_multicast or subnet.is_reserved:
        return f"{subnet6} has a meaning of its own; take a part of fd00::/8, or of what your provider gave you"
    return ""


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


def first_free_between(first: str, last: str, taken: Collection[str]) -> str | None:
    """Return the lowest IPv4 address of a range, both ends among it, that is not taken; None where all are."""
    low, high = int(ipaddress.IPv4Address(first)), int(ipaddress.IPv4Address(last))
    held = {int(ipaddress.IPv4Address(text)) for text in taken}
    found = next((number for number in range(low, high + 1) if number not in held), None)
    return str(ipaddress.IPv4Address(found)) if found is not None else None


def is_between(address: str, first: str, last: str) -> bool:
    return ipaddress.IPv4Address(first) <= ipaddress.IPv4Address(address) <= ipaddress.IPv4Address(last)


def outer_problem(subnet: str, gateway: str, first: str, last: str) -> tuple[str, str] | None:
    """Return (field, what is wrong) of an outer network: its gateway and the range that is ours to give, both in its subnet."""
    network = ipaddress.ip_network(subnet)
    if network.version == 6:
        return "subnet", f"an IPv4 network, for example 192.0.2.0/24, not {subnet}"
    edges = {network.network_address, network.broadcast_address}
    parsed: dict[str, ipaddress.IPv4Address] = {}
    for field, text in (("outer.gateway", gateway), ("outer.first", first), ("outer.last", last)):
        try:
            address = ipaddress.IPv4Address(text)
        except ValueError:
            return field, f"an IPv4 address of {subnet}, not {text!r}"
        if address not in network or address in edges:
            return field, f"{text} is no address that somebody can have in {subnet}"
        parsed[field] = address
    if parsed["outer.first"] > parsed["outer.last"]:
        return "outer.last", f"{last} comes before {first}; give the lower address first"
    if parsed["outer.first"] <= parsed["outer.gateway"] <= parsed["outer.last"]:
        return "outer.gateway", f"{gateway} is the gateway's and in the range {first}-{last}, which is ours to give; leave it out"
    return None


def gateway_problem(subnet: str, gateway: str) -> str:
    """Return what is wrong with the router of a LAN, which has an address of its subnet; '' where nothing is."""
    network = ipaddress.ip_network(subnet)
    example = network[1] if network.num_addresses > 2 else network[0]
    try:
        address = ipaddress.ip_address(gateway)
    except ValueError:
        return f"an address of {subnet}, not {gateway!r}; for example {example}"
    if address not in network:
        return f"{gateway} is not in the network's subnet {subnet}; for example {example}"
    if address in {network.network_address, network.broadcast_address} and network.num_addresses > 2:
        return f"{gateway} is no address that somebody can have in {subnet}; for example {example}"
    return ""


def name_server_problem(text: str) -> str:
    """Return what is wrong with the address of a DNS server, which may be of any network; '' where nothing is."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return f"an IP address, not {text!r}; for example 192.0.2.53"
    if address.is_unspecified or address.is_multicast or address.is_loopback or address == _EVERYBODY:
        return f"{text} is no server that guests reach; for example 192.0.2.53"
    return ""


def overlapping(subnet: str, others: Iterable[tuple[str, str]]) -> str | None:
    """Return the name of the first of `others` (name, subnet) that shares an address with the subnet."""
    wanted = ipaddress.ip_network(subnet)
    for name, text in others:
        other = ipaddress.ip_network(text)
        if wanted.version == other.version and wanted.overlaps(other):
            return name
    return None
