"""Overlay networks as OVN's northbound database shall hold them."""

from dataclasses import replace

from trimtab_controller.core import overlay
from trimtab_controller.core.overlay import Changes, OverlayCard, OverlayNetwork, Row, Table, desired, differ

APP = OverlayNetwork(network_id="net-app", subnet="10.30.0.0/24", mtu=1442, has_dhcp=True)
WEB = OverlayCard(
    nic_id="nic-1", network_id="net-app", mac="52:54:00:00:00:01", addresses=("10.30.0.5/24",), vm_name="Web1", chassis="node1"
)


def row(rows: tuple[Row, ...], table: Table, key: str) -> Row:
    return next(each for each in rows if (each.table, each.key) == (table, key))


def keys(rows: tuple[Row, ...]) -> list[str]:
    return sorted(each.key for each in rows)


def test_a_card_may_send_as_itself_only_and_is_where_its_vm_is() -> None:
    port = row(desired([APP], [WEB]), Table.PORT, "nic-1")
    assert port.columns["port_security"] == ("52:54:00:00:00:01 10.30.0.5",)
    assert port.columns["addresses"] == ("52:54:00:00:00:01 10.30.0.5",)
    assert port.columns["options"] == {"requested-chassis": "node1"}
    assert port.references == {"dhcpv4_options": ("dhcp-net-app",), "dhcpv6_options": ()}
    assert port.parent == (Table.SWITCH, "net-app", "ports")


def test_one_that_may_send_as_others_gets_what_nobody_else_has() -> None:
    port = row(desired([APP], [replace(WEB, allows_spoofing=True)]), Table.PORT, "nic-1")
    assert port.columns["port_security"] == ()
    assert "unknown" in port.columns["addresses"]


def test_without_a_known_host_or_address_a_card_is_left_to_whoever_has_it() -> None:
    port = row(desired([APP], [replace(WEB, chassis="", addresses=())]), Table.PORT, "nic-1")
    assert port.columns["options"] == {}
    assert port.columns["port_security"] == ("52:54:00:00:00:01",)
    assert port.references == {"dhcpv4_options": (), "dhcpv6_options": ()}, "OVN gives no address that was not declared"


def test_dhcp_and_names_are_answered_at_the_networks_own_address() -> None:
    rows = desired([APP], [WEB])
    own = row(rows, Table.PORT, "own-net-app")
    mac = overlay.own_mac("net-app")
    assert (own.columns["type"], own.columns["addresses"]) == ("localport", (f"{mac} 10.30.0.1",))
    assert int(mac[:2], 16) & 3 == 2, "locally administered, and of one station"
    options = row(rows, Table.DHCP, "dhcp-net-app").columns["options"]
    assert isinstance(options, dict)
    assert (options["server_id"], options["server_mac"], options["mtu"]) == ("10.30.0.1", mac, "1442")
    assert "router" not in options, "there is no way out"
    assert row(rows, Table.DNS, "dns-net-app").columns["records"] == {"web1": "10.30.0.5"}
    assert row(rows, Table.SWITCH, "net-app").references == {"dns_records": ("dns-net-app",)}


def test_networks_of_one_project_that_name_a_router_have_their_own_addresses_on_it() -> None:
    app = replace(APP, router="inner", project_id="proj-1")
    rows = desired([app, replace(app, network_id="net-b", project_id="proj-2")], [WEB])
    assert [each.key for each in rows if each.table is Table.ROUTER] == ["router-proj-1-inner", "router-proj-2-inner"]
    port = row(rows, Table.ROUTER_PORT, "rp-net-app")
    assert port.columns["networks"] == ("10.30.0.1/24",)
    assert port.parent == (Table.ROUTER, "router-proj-1-inner", "ports")
    assert row(rows, Table.PORT, "own-net-app").columns["options"] == {"router-port": "rp-net-app"}
    options = row(rows, Table.DHCP, "dhcp-net-app").columns["options"]
    assert isinstance(options, dict)
    assert options["router"] == "10.30.0.1"


def test_a_network_without_dhcp_or_cards_has_no_rows_for_them() -> None:
    assert keys(desired([replace(APP, has_dhcp=False, subnet="")], [])) == ["net-app"]
    assert keys(desired([], [WEB])) == []


def test_of_two_vms_with_one_name_the_first_card_keeps_it() -> None:
    other = replace(WEB, nic_id="nic-2", addresses=("10.30.0.6/24",), vm_name="web1")
    for order in ([WEB, other], [other, WEB]):
        assert row(desired([APP], order), Table.DNS, "dns-net-app").columns["records"] == {"web1": "10.30.0.5"}


def test_only_what_differs_is_changed() -> None:
    before = desired([APP], [WEB, replace(WEB, nic_id="nic-2", addresses=("10.30.0.6/24",), vm_name="db")])
    assert not differ(before, before)
    moved = desired([APP], [replace(WEB, chassis="node2")])
    changes = differ(moved, before)
    assert [each.key for each in changes.create] == []
    assert keys(changes.update) == ["dns-net-app", "nic-1"]
    assert changes.delete == ((Table.PORT, "nic-2"),)
    assert differ((), before) == Changes(delete=tuple(sorted((each.table, each.key) for each in before)))
    assert len(differ(before, ()).create) == len(before)


SIX = replace(APP, subnet6="fd00:30::/64")
BOTH = replace(WEB, addresses=("10.30.0.5/24", "fd00:30::5054:ff:fe00:1/64"))


def test_an_ipv6_subnet_is_told_to_guests_by_a_router_of_the_networks_own_or_the_one_that_it_names() -> None:
    alone = desired([SIX], [BOTH])
    assert [each.key for each in alone if each.table is Table.ROUTER] == ["lone-net-app"]
    port = row(alone, Table.ROUTER_PORT, "rp-net-app")
    assert port.parent == (Table.ROUTER, "lone-net-app", "ports")
    assert port.columns["networks"] == ("10.30.0.1/24", "fd00:30::1/64")
    told = port.columns["ipv6_ra_configs"]
    assert isinstance(told, dict)
    assert (told["address_mode"], told["rdnss"], told["mtu"], told["router_preference"]) == ("slaac", "fd00:30::1", "1442", "LOW")
    dhcp = row(alone, Table.DHCP, "dhcp-net-app").columns["options"]
    assert isinstance(dhcp, dict)
    assert "router" not in dhcp, "there is no way out for IPv4 still"
    inner = row(desired([replace(SIX, router="inner")], [BOTH]), Table.ROUTER_PORT, "rp-net-app")
    assert inner.parent == (Table.ROUTER, "router-shared-inner", "ports")
    assert row(desired([replace(APP, router="inner")], []), Table.ROUTER_PORT, "rp-net-app").columns["ipv6_ra_configs"] == {}


def test_a_card_may_send_with_its_ipv6_address_too_and_is_found_by_it() -> None:
    rows = desired([SIX], [BOTH])
    port = row(rows, Table.PORT, "nic-1")
    assert port.columns["port_security"] == ("52:54:00:00:00:01 10.30.0.5 fd00:30::5054:ff:fe00:1",)
    assert row(rows, Table.DNS, "dns-net-app").columns["records"] == {"web1": "10.30.0.5 fd00:30::5054:ff:fe00:1"}
    assert port.references["dhcpv6_options"] == (), "guests make their addresses themselves"


def test_guests_are_given_their_ipv6_addresses_where_the_network_says_so() -> None:
    rows = desired([replace(SIX, has_dhcp=False, has_dhcp6=True)], [BOTH, replace(WEB, nic_id="nic-2")])
    assert row(rows, Table.PORT, "nic-1").references == {"dhcpv4_options": (), "dhcpv6_options": ("dhcp6-net-app",)}
    assert row(rows, Table.PORT, "nic-2").references["dhcpv6_options"] == (), "one without an IPv6 address is given none"
    options = row(rows, Table.DHCP, "dhcp6-net-app")
    assert options.columns == {
        "cidr": "fd00:30::/64",
        "options": {"server_id": overlay.own_mac("net-app"), "dns_server": "fd00:30::1"},
    }
    told = row(rows, Table.ROUTER_PORT, "rp-net-app").columns["ipv6_ra_configs"]
    assert isinstance(told, dict)
    assert told["address_mode"] == "dhcpv6_stateful"
