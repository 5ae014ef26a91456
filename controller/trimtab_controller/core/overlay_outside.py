"""The outer side of overlay networks' routers, and floating addresses, as OVN's northbound database shall hold them. Pure.

    outer network ─▶ Logical_Switch ─┬─ localnet port: the hosts' bridge that the agents gave the network's name in OVN
                                     └─ router port ═ Logical_Router_Port with an outer address, and hosts that may be its gateway
    router        ─▶ default route to the outer network's gateway ; NAT: snat for each network behind it
    floating      ─▶ NAT: dnat_and_snat to a card of a network behind the router

One host at a time carries a router's outer side, the first of its list that lives; OVN sees a dead one by itself and the next one takes
over. A floating address is answered there and not where its vm is: it follows a migration without anybody being told, and only
gateways need the outer network.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trimtab_controller.core.overlay import OverlayCard, OverlayNetwork, Row, Table, own_mac, router_key, router_row, switch_port

GATEWAYS_MAX = 5
"""Hosts of one router's list: each watches every other one, several times a second."""
_ANYWHERE = "0.0.0.0/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayHost:
    """A host that reaches an outer network."""

    chassis: str
    name: str = ""
    is_up: bool = True
    is_cordoned: bool = False
    # Proven off.
    is_off: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterNetwork:
    network_id: str
    subnet: str
    gateway: str
    vlan: int = 0
    hosts: tuple[GatewayHost, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSide:
    """That of the router of this name."""

    project_id: str
    router: str
    outer_network_id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Floating:
    floating_id: str
    outer_network_id: str
    address: str
    nic_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """All that is known of the way out."""

    networks: tuple[OuterNetwork, ...] = ()
    sides: tuple[OuterSide, ...] = ()
    floating: tuple[Floating, ...] = ()


def with_outside(
    rows: Sequence[Row], networks: Sequence[OverlayNetwork], cards: Iterable[OverlayCard], outside: Outside
) -> tuple[Row, ...]:
    """Return the rows with those of the way out among them. A router that no network is on has no row, and no outer side."""
    outer = {one.network_id: one for one in outside.networks}
    behind: dict[str, list[OverlayNetwork]] = {}
    for network in networks:
        if network.router:
            behind.setdefault(router_key(network), []).append(network)
    sides = {router_key_of(side.project_id, side.router): side for side in outside.sides if side.outer_network_id in outer}
    sides = {key: side for key, side in sides.items() if key in behind}
    inner = _inner_addresses(cards)
    more: list[Row] = []
    routers: dict[str, Row] = {}
    for network_id in sorted({side.outer_network_id for side in sides.values()}):
        more += _switch(outer[network_id])
    for key, side in sorted(sides.items()):
        nat = [*_snat(side, behind[key]), *_floating(side, behind[key], outside.floating, inner)]
        route = _route(key, outer[side.outer_network_id])
        routers[key] = router_row(key, nat=[one.key for one in nat], routes=[route.key])
        more += [*nat, route, *_outer_port(side, key, outer[side.outer_network_id])]
    changed = [routers.get(row.key, row) if row.table is Table.ROUTER else row for row in rows]
    return (*changed, *more)


def router_key_of(project_id: str, name: str) -> str:
    """Return the key of a router's row, as `overlay.router_key` of a network behind it."""
    return f"router-{project_id}-{name}"


def gateways(router: str, hosts: Sequence[GatewayHost]) -> tuple[str, ...]:
    """Return the chassis that may carry a router's outer side, the first to do so first.

    Routers are spread over hosts by lot, which falls the same way each time. One that is cordoned comes last; that one is down moves
    nothing, since OVN knows better whether it still carries packets. But one that is proven off is left out: of two, OVN lets the other
    carry nothing as long as it hears of none, since it might be the one that is cut off.
    """

    def lot(host: GatewayHost) -> str:
        return hashlib.sha256(f"{router} {host.chassis}".encode()).hexdigest()

    able = [host for host in hosts if host.chassis]
    chosen = sorted([host for host in able if not host.is_off] or able, key=lambda host: (not host.is_up, lot(host)))[
        :GATEWAYS_MAX
    ]
    return tuple(host.chassis for host in sorted(chosen, key=lambda host: (host.is_cordoned, lot(host))))


def _inner_addresses(cards: Iterable[OverlayCard]) -> Mapping[str, tuple[str, str]]:
    """Return {card: (network, IPv4 address)} of cards that have one."""
    found = {}
    for card in cards:
        own = [interface.ip for text in card.addresses if (interface := ipaddress.ip_interface(text)).version == 4]
        if own:
            found[card.nic_id] = (card.network_id, str(own[0]))
    return found


def _switch(outer: OuterNetwork) -> list[Row]:
    return [
        Row(
            table=Table.SWITCH,
            key=outer.network_id,
            columns={"name": outer.network_id},
            references={"dns_records": ()},
        ),
        switch_port(
            f"out-{outer.network_id}",
            outer.network_id,
            kind="localnet",
            addresses=("unknown",),
            vlan=outer.vlan,
            options={"network_name": outer.network_id},
        ),
    ]


def _outer_port(side: OuterSide, key: str, outer: OuterNetwork) -> list[Row]:
    port, prefix = f"ro-{key}", ipaddress.ip_network(outer.subnet).prefixlen
    chassis = gateways(key, outer.hosts)
    lists = [
        Row(
            table=Table.GATEWAY,
            key=f"gw-{key}-{name}",
            columns={"name": f"gw-{key}-{name}", "chassis_name": name, "priority": str(len(chassis) - at)},
        )
        for at, name in enumerate(chassis)
    ]
    return [
        *lists,
        Row(
            table=Table.ROUTER_PORT,
            key=port,
            columns={"name": port, "mac": own_mac(port), "networks": (f"{side.address}/{prefix}",), "ipv6_ra_configs": {}},
            references={"gateway_chassis": tuple(sorted(one.key for one in lists))},
            parent=(Table.ROUTER, key, "ports"),
        ),
        # The gateway tells the outer network where the router's addresses are as soon as it is the gateway.
        switch_port(
            f"or-{key}",
            outer.network_id,
            kind="router",
            addresses=("router",),
            options={"router-port": port, "nat-addresses": "router"},
        ),
    ]


def _route(key: str, outer: OuterNetwork) -> Row:
    return Row(table=Table.ROUTE, key=f"way-{key}", columns={"ip_prefix": _ANYWHERE, "nexthop": outer.gateway})


def _snat(side: OuterSide, networks: Sequence[OverlayNetwork]) -> list[Row]:
    return [
        _nat(f"snat-{network.network_id}", "snat", side.address, network.subnet)
        for network in sorted(networks, key=lambda one: one.network_id)
    ]


def _floating(
    side: OuterSide, networks: Sequence[OverlayNetwork], floating: Sequence[Floating], inner: Mapping[str, tuple[str, str]]
) -> list[Row]:
    behind = {network.network_id for network in networks}
    rows = []
    for one in sorted(floating, key=lambda each: each.floating_id):
        network_id, address = inner.get(one.nic_id, ("", ""))
        if one.outer_network_id == side.outer_network_id and network_id in behind:
            rows.append(_nat(f"nat-{one.floating_id}", "dnat_and_snat", one.address, address))
    return rows


def _nat(key: str, kind: str, outer: str, inner: str) -> Row:
    return Row(table=Table.NAT, key=key, columns={"type": kind, "external_ip": outer, "logical_ip": inner})
