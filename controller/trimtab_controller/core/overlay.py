"""Overlay networks as OVN's northbound database shall hold them. Pure.

    network  ─▶ Logical_Switch ─┬─ port for each card (MAC and addresses that it may send with, the chassis that its vm is on)
                                ├─ port of the network's own address, where DNS and DHCP are answered
                                ├─ DHCP_Options, one for the network, and one for its IPv6 subnet
                                └─ DNS: names of vms
    router of several networks ─▶ Logical_Router, with a port that has the own address of each; its outer side: `overlay_outside`
    IPv6 subnet                ─▶ on that port, which tells guests of it; a network behind no router gets one of its own for that
    security group             ─▶ Port_Group with its ACLs: `overlay_groups`

Rows are compared by a key of ours in `external_ids`; rows without one, and those of another fleet, are somebody else's.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

TUNNEL_OVERHEAD = 58
"""Bytes of Geneve with OVN's option, UDP, IPv4 and Ethernet in front of a guest's packet."""
DEFAULT_MTU = 1500 - TUNNEL_OVERHEAD
LEASE_S = 3600

Value = str | tuple[str, ...] | Mapping[str, str]


class Table(StrEnum):
    SWITCH = "Logical_Switch"
    PORT = "Logical_Switch_Port"
    DHCP = "DHCP_Options"
    DNS = "DNS"
    ROUTER = "Logical_Router"
    ROUTER_PORT = "Logical_Router_Port"
    NAT = "NAT"
    ROUTE = "Logical_Router_Static_Route"
    GATEWAY = "Gateway_Chassis"
    GROUP = "Port_Group"
    RULE = "ACL"


COLUMNS: Mapping[Table, tuple[str, ...]] = {
    Table.SWITCH: ("name",),
    Table.PORT: ("name", "type", "addresses", "port_security", "options", "tag"),
    Table.DHCP: ("cidr", "options"),
    Table.DNS: ("records",),
    Table.ROUTER: ("name",),
    Table.ROUTER_PORT: ("name", "mac", "networks", "ipv6_ra_configs"),
    Table.NAT: ("type", "external_ip", "logical_ip"),
    Table.ROUTE: ("ip_prefix", "nexthop"),
    Table.GATEWAY: ("name", "chassis_name", "priority"),
    Table.GROUP: ("name",),
    Table.RULE: ("direction", "priority", "match", "action"),
}
"""What is ours to say in each table; every other column is left as it is."""
NUMBERS = frozenset({"priority", "tag"})
"""Columns that hold integers; here they are text as all others."""
REFERENCES: Mapping[Table, Mapping[str, Table]] = {
    Table.SWITCH: {"dns_records": Table.DNS},
    Table.PORT: {"dhcpv4_options": Table.DHCP, "dhcpv6_options": Table.DHCP},
    Table.DHCP: {},
    Table.DNS: {},
    Table.ROUTER: {"nat": Table.NAT, "static_routes": Table.ROUTE},
    Table.ROUTER_PORT: {"gateway_chassis": Table.GATEWAY},
    Table.NAT: {},
    Table.ROUTE: {},
    Table.GATEWAY: {},
    Table.GROUP: {"ports": Table.PORT, "acls": Table.RULE},
    Table.RULE: {},
}
HOLDERS: Mapping[Table, Table] = {Table.PORT: Table.SWITCH, Table.ROUTER_PORT: Table.ROUTER}
"""Whose `ports` a row stands in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayNetwork:
    network_id: str
    subnet: str
    mtu: int
    has_dhcp: bool
    project_id: str = ""
    router: str = ""
    """Networks of one project that name the same reach each other; '' for none."""
    subnet6: str = ""
    has_dhcp6: bool = False
    """Guests are given their IPv6 addresses; otherwise they make the same ones of their MACs."""

    @property
    def is_routed(self) -> bool:
        """Whether its own addresses are a router's: without one nobody tells guests of an IPv6 subnet."""
        return bool(self.router or self.subnet6)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayCard:
    nic_id: str
    network_id: str
    mac: str
    addresses: tuple[str, ...]
    """With prefix length, as in 10.30.0.5/24."""
    vm_name: str
    vm_id: str = ""
    """Whose it is, where security groups matter."""
    chassis: str = ""
    """OVN's name of the host that the vm is on; '' where it is on none that told one."""
    allows_spoofing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row that is ours. `parent`: table, key and column of the row that holds it."""

    table: Table
    key: str
    columns: Mapping[str, Value]
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> keys, in order."""
    parent: tuple[Table, str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What has to happen so that the database is as it shall be. Rows go by being let go of, in any order."""

    create: tuple[Row, ...] = ()
    update: tuple[Row, ...] = ()
    delete: tuple[tuple[Table, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.create or self.update or self.delete)


def desired(networks: Sequence[OverlayNetwork], cards: Iterable[OverlayCard]) -> tuple[Row, ...]:
    """Return the rows of networks, cards and of what is between them, in an order that depends on nothing but the ids."""
    by_network: dict[str, list[OverlayCard]] = {}
    for card in sorted(cards, key=lambda one: one.nic_id):
        by_network.setdefault(card.network_id, []).append(card)
    found = [router_row(key) for key in sorted({router_key(network) for network in networks if network.is_routed})]
    for network in sorted(networks, key=lambda one: one.network_id):
        found += _network_rows(network, by_network.get(network.network_id, []))
    return tuple(found)


def differ(wanted: Sequence[Row], found: Sequence[Row]) -> Changes:
    """Return what turns `found`, the rows of this fleet that are there, into `wanted`."""
    there = {(row.table, row.key): row for row in found}
    keys = {(row.table, row.key) for row in wanted}
    return Changes(
        create=tuple(row for row in wanted if (row.table, row.key) not in there),
        update=tuple(row for row in wanted if (row.table, row.key) in there and _differs(row, there[row.table, row.key])),
        delete=tuple(sorted(key for key in there if key not in keys)),
    )


def own_address(subnet: str) -> str:
    """Return the address that the network itself has: the first one."""
    return str(ipaddress.ip_network(subnet)[1])


def router_key(network: OverlayNetwork) -> str:
    if not network.router:
        return f"lone-{network.network_id}"
    return f"router-{network.project_id or 'shared'}-{network.router}"


def own_mac(network_id: str) -> str:
    """Return the MAC of the network's own address: locally administered, and the same on every host."""
    digest = hashlib.sha256(network_id.encode()).hexdigest()
    return "0a:" + ":".join(digest[at : at + 2] for at in range(0, 10, 2))


def router_row(key: str, *, nat: Sequence[str] = (), routes: Sequence[str] = ()) -> Row:
    """Return a router; `nat` and `routes`: keys of what its outer side has."""
    return Row(
        table=Table.ROUTER,
        key=key,
        columns={"name": key},
        references={"nat": tuple(sorted(nat)), "static_routes": tuple(sorted(routes))},
    )


def switch_port(
    key: str,
    switch_id: str,
    *,
    kind: str = "",
    addresses: Sequence[str],
    security: Sequence[str] = (),
    dhcp: str = "",
    dhcp6: str = "",
    vlan: int = 0,
    options: Mapping[str, str],
) -> Row:
    """Return a port of a network's switch. `kind`: OVN's, '' of a card; `vlan`: of one to a bridge of the hosts."""
    return Row(
        table=Table.PORT,
        key=key,
        columns={
            "name": key,
            "type": kind,
            "addresses": tuple(addresses),
            "port_security": tuple(security),
            "options": dict(options),
            "tag": (str(vlan),) if vlan else (),
        },
        references={"dhcpv4_options": (dhcp,) if dhcp else (), "dhcpv6_options": (dhcp6,) if dhcp6 else ()},
        parent=(Table.SWITCH, switch_id, "ports"),
    )


def _differs(row: Row, other: Row) -> bool:
    return dict(row.columns) != dict(other.columns) or dict(row.references) != dict(other.references)


def _network_rows(network: OverlayNetwork, cards: Sequence[OverlayCard]) -> list[Row]:
    dns_key = f"dns-{network.network_id}"
    names = _names(cards)
    rows = [
        Row(
            table=Table.SWITCH,
            key=network.network_id,
            columns={"name": network.network_id},
            references={"dns_records": (dns_key,) if names else ()},
        ),
        *(_card_port(card, network) for card in cards),
    ]
    if names:
        rows.append(Row(table=Table.DNS, key=dns_key, columns={"records": names}))
    if network.is_routed:
        rows += _cable(network)
    elif network.subnet:
        # On every host at once: nothing of it ever leaves one.
        own = f"{own_mac(network.network_id)} {own_address(network.subnet)}"
        rows.append(switch_port(f"own-{network.network_id}", network.network_id, kind="localport", addresses=(own,), options={}))
    if network.has_dhcp:
        columns: dict[str, Value] = {"cidr": network.subnet, "options": _dhcp_options(network)}
        rows.append(Row(table=Table.DHCP, key=_dhcp_key(network), columns=columns))
    if network.has_dhcp6:
        columns = {"cidr": network.subnet6, "options": _dhcp6_options(network)}
        rows.append(Row(table=Table.DHCP, key=_dhcp6_key(network), columns=columns))
    return rows


def _cable(network: OverlayNetwork) -> list[Row]:
    """Return both ends of the cable between a network and its router, which has the network's own address."""
    key = f"rp-{network.network_id}"
    own: dict[str, Value] = {
        "name": key,
        "mac": own_mac(network.network_id),
        "networks": tuple(
            f"{own_address(subnet)}/{ipaddress.ip_network(subnet).prefixlen}"
            for subnet in (network.subnet, network.subnet6)
            if subnet
        ),
        "ipv6_ra_configs": _advertised(network),
    }
    return [
        Row(
            table=Table.ROUTER_PORT,
            key=key,
            columns=own,
            references={"gateway_chassis": ()},
            parent=(Table.ROUTER, router_key(network), "ports"),
        ),
        switch_port(
            f"own-{network.network_id}", network.network_id, kind="router", addresses=("router",), options={"router-port": key}
        ),
    ]


def _advertised(network: OverlayNetwork) -> dict[str, str]:
    """Return what the router tells guests about their IPv6 subnet; nothing where there is none."""
    if not network.subnet6:
        return {}
    return {
        "address_mode": "dhcpv6_stateful" if network.has_dhcp6 else "slaac",
        "send_periodic": "true",
        "mtu": str(network.mtu),
        "rdnss": own_address(network.subnet6),
        # OVN always calls itself a way out; where there is none, a guest that has another one takes that.
        "router_preference": "MEDIUM" if network.router else "LOW",
    }


def _dhcp_key(network: OverlayNetwork) -> str:
    return f"dhcp-{network.network_id}"


def _dhcp6_key(network: OverlayNetwork) -> str:
    return f"dhcp6-{network.network_id}"


def _card_port(card: OverlayCard, network: OverlayNetwork) -> Row:
    interfaces = [ipaddress.ip_interface(text) for text in card.addresses]
    addresses, versions = [str(one.ip) for one in interfaces], {one.version for one in interfaces}
    who = " ".join([card.mac, *addresses])
    return switch_port(
        card.nic_id,
        card.network_id,
        addresses=(who, "unknown") if card.allows_spoofing else (who,),
        security=() if card.allows_spoofing else (who,),
        dhcp=_dhcp_key(network) if network.has_dhcp and 4 in versions else "",
        dhcp6=_dhcp6_key(network) if network.has_dhcp6 and 6 in versions else "",
        options={"requested-chassis": card.chassis} if card.chassis else {},
    )


def _names(cards: Sequence[OverlayCard]) -> dict[str, str]:
    """Return {name: addresses}; of two vms with one name, which two projects may have, the older card's keeps it."""
    found: dict[str, str] = {}
    for card in cards:
        addresses = [str(ipaddress.ip_interface(text).ip) for text in card.addresses]
        if addresses:
            found.setdefault(card.vm_name.lower(), " ".join(addresses))
    return found


def _dhcp_options(network: OverlayNetwork) -> dict[str, str]:
    own = own_address(network.subnet)
    return {
        **({"router": own} if network.router else {}),
        "server_id": own,
        "server_mac": own_mac(network.network_id),
        "lease_time": str(LEASE_S),
        "mtu": str(network.mtu),
        "dns_server": own,
    }


def _dhcp6_options(network: OverlayNetwork) -> dict[str, str]:
    return {"server_id": own_mac(network.network_id), "dns_server": own_address(network.subnet6)}
