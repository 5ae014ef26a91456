"""Addresses of a network's subnets."""

import pytest

from trimtab_controller.core.addresses import gateway_problem, made_of_mac, name_server_problem, subnet6_problem


@pytest.mark.parametrize(
    ("mac", "address"),
    [("52:54:00:12:34:56", "fd00:20::5054:ff:fe12:3456"), ("00:1b:21:aa:bb:cc", "fd00:20::21b:21ff:feaa:bbcc")],
)
def test_a_guest_makes_the_address_of_its_mac(mac: str, address: str) -> None:
    assert made_of_mac(mac, "fd00:20::/64") == address


@pytest.mark.parametrize(
    ("subnet", "said"),
    [
        ("fd00:20::/64", ""),
        ("2001:db8::/64", ""),
        ("fd00:20::/48", "/64"),
        ("fd00:20::1/64", "host bits"),
        ("10.20.0.0/24", "fd00:20::/64"),
        ("fe80::/64", "meaning of its own"),
        ("ff05::/64", "meaning of its own"),
        ("::/64", "meaning of its own"),
    ],
)
def test_an_ipv6_subnet_is_one_that_guests_can_make_addresses_in(subnet: str, said: str) -> None:
    found = subnet6_problem(subnet)
    assert said in found
    assert bool(found) is bool(said)


@pytest.mark.parametrize(
    ("subnet", "gateway", "said"),
    [
        ("192.0.2.0/24", "192.0.2.1", ""),
        ("192.0.2.0/24", "192.0.2.254", ""),
        ("192.0.2.4/31", "192.0.2.4", ""),
        ("2001:db8::/64", "2001:db8::1", ""),
        ("192.0.2.0/24", "192.0.3.1", "not in the network's subnet 192.0.2.0/24; for example 192.0.2.1"),
        ("192.0.2.0/24", "192.0.2.0", "no address that somebody can have"),
        ("192.0.2.0/24", "192.0.2.255", "no address that somebody can have"),
        ("192.0.2.0/24", "2001:db8::1", "not in the network's subnet 192.0.2.0/24; for example 192.0.2.1"),
        ("2001:db8::/64", "192.0.2.1", "not in the network's subnet 2001:db8::/64; for example 2001:db8::1"),
        ("192.0.2.0/24", "192.0.2.1/24", "an address of 192.0.2.0/24, not '192.0.2.1/24'; for example 192.0.2.1"),
    ],
)
def test_the_router_of_a_lan_has_an_address_of_its_subnet(subnet: str, gateway: str, said: str) -> None:
    found = gateway_problem(subnet, gateway)
    assert said in found
    assert bool(found) is bool(said)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("192.0.2.53", True), ("2001:db8::53", True), ("0.0.0.0", False), ("127.0.0.53", False), ("224.0.0.251", False),
        ("255.255.255.255", False), ("::1", False), ("ff02::fb", False), ("192.0.2.300", False),
    ],
)  # fmt: skip
def test_a_dns_server_is_one_that_guests_reach(text: str, is_one: bool) -> None:
    assert (name_server_problem(text) == "") is is_one
