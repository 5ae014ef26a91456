"""Overlay networks at the API: off without an OVN, and what they are with one."""

from dataclasses import replace
from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.store import overlays

P1 = "/v1/projects/p1"


@pytest.fixture
def overlay_api(api: Api) -> Api:
    """An API whose engine keeps an OVN."""
    runtime = api.app.state.runtime
    runtime.context = replace(runtime.context, settings=replace(runtime.context.settings, has_overlay=True))
    return api


async def make(api: Api, **fields: Any) -> Any:
    body = {"name": "app", "kind": "overlay", "subnet": "10.30.0.0/24", **fields}
    return await api.call("p1-operator", "POST", f"{P1}/networks", json=body)


async def test_without_an_ovn_there_are_no_overlays_and_the_setting_is_named(api: Api) -> None:
    refused = await make(api)
    assert (refused.status_code, refused.json()["code"]) == (400, "overlay-off")
    assert "ovn_northbound" in refused.json()["detail"]


async def test_an_operator_of_a_project_makes_one_whose_packets_fit_into_tunnels(overlay_api: Api) -> None:
    made = await make(overlay_api, dhcp=True)
    assert made.status_code == 202, made.text
    shown = made.json()["network"]
    assert (shown["kind"], shown["mtu"], shown["dhcp"]) == ("overlay", 1442, True)
    jumbo = await make(overlay_api, name="jumbo", subnet="10.31.0.0/24", mtu=8942, router="inner")
    assert jumbo.json()["network"]["router"] == "inner"
    assert jumbo.json()["network"]["mtu"] == 8942, "what is asked for is what hosts are asked for"


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"mtu": 65500}, "mtu-too-large", "mtu"),
        ({"kind": "nat", "router": "inner"}, "router-not-allowed", "router"),
        ({"subnet": "", "router": "inner"}, "subnet-missing", "subnet"),
        ({"vlan": 5}, "vlan-not-allowed", "vlan"),
        ({"bridge": "br0"}, "bridge-not-allowed", "bridge"),
        ({"subnet": "", "dhcp": True}, "subnet-missing", "subnet"),
        ({"subnet": "2001:db8::/64"}, "subnet-wrong", "subnet"),
        ({"subnet": "10.30.0.0/30"}, "subnet-wrong", "subnet"),
    ],
)
async def test_what_an_overlay_cannot_be_is_refused_by_its_field(
    overlay_api: Api, fields: dict[str, Any], code: str, field: str
) -> None:
    refused = await make(overlay_api, **fields)
    assert refused.status_code == 400, refused.text
    assert (refused.json()["code"], refused.json()["errors"][0]["field"]) == (code, field)


async def test_a_card_on_it_has_an_address_that_is_not_the_networks_own(overlay_api: Api) -> None:
    await make(overlay_api, subnet="10.30.0.0/29", dhcp=True)
    vm = await overlay_api.make_vm("web1", networks=[{"network": "app"}])
    assert vm["nics"][0]["addresses"] == ["10.30.0.2/29"]
    own = {"name": "web2", "image": "debian", "memory_mib": 512, "networks": [{"network": "app", "addresses": ["10.30.0.1/29"]}]}
    refused = await overlay_api.call("p1-operator", "POST", f"{P1}/vms", json=own)
    assert refused.status_code in {400, 409}, refused.text
    await make(overlay_api, name="data", subnet="10.31.0.0/24", router="inner")
    networks, cards = await overlay_api.db.read(overlays.read)
    assert sorted((one.subnet, one.mtu, one.has_dhcp, one.router) for one in networks) == [
        ("10.30.0.0/29", 1442, True, ""), ("10.31.0.0/24", 1442, False, "inner")
    ]  # fmt: skip
    assert [(one.addresses, one.vm_name, one.mac) for one in cards] == [(("10.30.0.2/29",), "web1", vm["nics"][0]["mac"])]
