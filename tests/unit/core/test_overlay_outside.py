"""The way out of overlay networks, and floating addresses, as OVN's northbound database shall hold them."""

from dataclasses import replace

import pytest

from tests.unit.core.test_overlay import APP, WEB, keys, row
from trimtab_controller.core import addresses
from trimtab_controller.core.overlay import Row, Table, desired
from trimtab_controller.core.overlay_outside import (
    GATEWAYS_MAX,
    Floating,
    GatewayHost,
    OuterNetwork,
    OuterSide,
    Outside,
    gateways,
    router_key_of,
    with_outside,
)

INNER = replace(APP, router="edge", project_id="proj-1")
LAN = OuterNetwork(
    network_id="net-lan",
    subnet="192.0.2.0/24",
    gateway="192.0.2.1",
    vlan=20,
    hosts=(GatewayHost(chassis="node1"), GatewayHost(chassis="node2")),
)
SIDE = OuterSide(project_id="proj-1", router="edge", outer_network_id="net-lan", address="192.0.2.10")
FLOATING = Floating(floating_id="fip-1", outer_network_id="net-lan", address="192.0.2.100", nic_id="nic-1")
ALL = Outside(networks=(LAN,), sides=(SIDE,), floating=(FLOATING,))
KEY = router_key_of("proj-1", "edge")


def made(outside: Outside = ALL, *, network: object = INNER, card: object = WEB) -> tuple[Row, ...]:
    networks, cards = [network], [card]
    return with_outside(desired(networks, cards), networks, cards, outside)  # type: ignore[arg-type]


def test_networks_behind_a_router_leave_by_its_one_address() -> None:
    rows = made()
    assert row(rows, Table.NAT, "snat-net-app").columns == {
        "type": "snat", "external_ip": "192.0.2.10", "logical_ip": "10.30.0.0/24"
    }  # fmt: skip
    assert row(rows, Table.ROUTE, f"way-{KEY}").columns == {"ip_prefix": "0.0.0.0/0", "nexthop": "192.0.2.1"}
    router = row(rows, Table.ROUTER, KEY)
    assert router.references == {"nat": ("nat-fip-1", "snat-net-app"), "static_routes": (f"way-{KEY}",)}
    assert row(rows, Table.ROUTER_PORT, f"ro-{KEY}").columns["networks"] == ("192.0.2.10/24",)
    localnet = row(rows, Table.PORT, "out-net-lan").columns
    assert (localnet["type"], localnet["tag"], localnet["options"]) == ("localnet", ("20",), {"network_name": "net-lan"})
    assert row(rows, Table.PORT, f"or-{KEY}").columns["options"] == {"router-port": f"ro-{KEY}", "nat-addresses": "router"}
    assert len([one for one in rows if one.table is Table.ROUTER]) == 1, "in place of the one without an outer side"


def test_a_floating_address_leads_to_the_cards_own_one_and_nowhere_without_a_way() -> None:
    assert row(made(), Table.NAT, "nat-fip-1").columns == {
        "type": "dnat_and_snat", "external_ip": "192.0.2.100", "logical_ip": "10.30.0.5"
    }  # fmt: skip
    elsewhere = replace(FLOATING, outer_network_id="net-other")
    unknown = replace(FLOATING, nic_id="nic-9")
    for outside in (replace(ALL, floating=(elsewhere,)), replace(ALL, floating=(unknown,)), replace(ALL, floating=())):
        assert "nat-fip-1" not in keys(made(outside))
    for card in (replace(WEB, addresses=()), replace(WEB, addresses=("2001:db8::5/64",)), replace(WEB, network_id="net-b")):
        assert "nat-fip-1" not in keys(made(card=card))


@pytest.mark.parametrize(
    ("outside", "network"),
    [
        (Outside(), INNER),
        (ALL, replace(INNER, router="other")),
        (ALL, replace(INNER, router="")),
        (ALL, replace(INNER, project_id="proj-2")),
        (replace(ALL, networks=()), INNER),
    ],
)
def test_without_a_network_behind_it_or_one_outside_there_is_no_way_out(outside: Outside, network: object) -> None:
    assert made(outside, network=network) == desired([network], [WEB])  # type: ignore[list-item]


def test_routers_are_spread_over_hosts_and_each_list_stays_as_it_is() -> None:
    hosts = [GatewayHost(chassis=f"node{i}") for i in range(1, 9)]
    firsts = {gateways(f"router-p-{i}", hosts)[0] for i in range(64)}
    assert len(firsts) >= 6, "by lot, so nearly all have some"
    chosen = gateways(KEY, hosts)
    assert (len(chosen), gateways(KEY, hosts[::-1])) == (GATEWAYS_MAX, chosen)
    first = chosen[0]
    cordoned = [replace(host, is_cordoned=host.chassis == first) for host in hosts]
    assert gateways(KEY, cordoned) == (*chosen[1:], first), "a cordoned one comes last"
    down = [replace(host, is_up=host.chassis != first) for host in hosts[:5]]
    assert gateways(KEY, down)[0] == gateways(KEY, hosts[:5])[0], "OVN sees for itself whether one lives"
    assert first not in gateways(KEY, [replace(host, is_up=host.chassis != first) for host in hosts]), "but others go before it"
    off = [replace(host, is_off=host.chassis == first) for host in hosts[:2] + [one for one in hosts if one.chassis == first]]
    assert first not in gateways(KEY, off), "one that is proven off keeps nobody waiting"
    assert gateways(KEY, [replace(host, is_off=True) for host in hosts]), "and somebody has to be named"
    assert gateways(KEY, [GatewayHost(chassis="")]) == ()
    port = row(made(), Table.ROUTER_PORT, f"ro-{KEY}")
    listed = [row(made(), Table.GATEWAY, key).columns for key in port.references["gateway_chassis"]]
    by_priority = sorted(listed, key=lambda one: -int(str(one["priority"])))
    assert [one["chassis_name"] for one in by_priority] == list(gateways(KEY, LAN.hosts))


def test_a_range_is_given_from_its_lower_end_and_to_its_last() -> None:
    assert addresses.first_free_between("192.0.2.9", "192.0.2.11", ["192.0.2.9", "192.0.2.11"]) == "192.0.2.10"
    assert addresses.first_free_between("192.0.2.9", "192.0.2.9", ["192.0.2.9"]) is None
    assert addresses.is_between("192.0.2.9", "192.0.2.9", "192.0.2.9")
    assert not addresses.is_between("192.0.2.10", "192.0.2.2", "192.0.2.9")


@pytest.mark.parametrize(
    ("subnet", "gateway", "first", "last", "field"),
    [
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.2", "192.0.2.9", None),
        ("192.0.2.0/24", "192.0.2.99", "192.0.2.2", "192.0.2.9", None),
        ("192.0.2.0/24", "192.0.3.1", "192.0.2.2", "192.0.2.9", "outer.gateway"),
        ("192.0.2.0/24", "no", "192.0.2.2", "192.0.2.9", "outer.gateway"),
        ("192.0.2.0/24", "192.0.2.5", "192.0.2.2", "192.0.2.9", "outer.gateway"),
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.9", "192.0.2.2", "outer.last"),
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.0", "192.0.2.2", "outer.first"),
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.2", "192.0.2.255", "outer.last"),
        ("2001:db8::/64", "192.0.2.1", "192.0.2.2", "192.0.2.9", "subnet"),
    ],
)
def test_a_way_out_is_told_what_contradicts(subnet: str, gateway: str, first: str, last: str, field: str | None) -> None:
    problem = addresses.outer_problem(subnet, gateway, first, last)
    assert (problem[0] if problem else None) == field
