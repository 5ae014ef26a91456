"""Addresses of a network's subnets."""

import pytest

from trimtab_controller.core.addresses import made_of_mac, subnet6_problem


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
