"""The router and the DNS servers of an operator's LAN: what is refused, and what the seeds of guests on it say."""

from typing import Any

import pytest
import yaml

from tests.api.kit import Api
from trimtab_controller.store import schema

NETWORKS, VMS = "/v1/networks", "/v1/projects/p1/vms"
LAN = {
    "name": "lan",
    "kind": "bridge",
    "bridge": "br0",
    "subnet": "192.0.2.0/29",
    "gateway": "192.0.2.2",
    "dns": ["192.0.2.4", "2001:db8::53"],
}
OTHER = LAN | {"name": "other", "subnet": "198.51.100.0/24", "gateway": "198.51.100.254", "dns": []}
SIX = LAN | {"name": "six", "subnet": "2001:db8:0:6::/64", "gateway": "2001:db8:0:6:0::1", "dns": []}
OUTER = {"gateway": "192.0.2.1", "first": "192.0.2.3", "last": "192.0.2.4"}
DNS_OF_LAN = {"addresses": ["192.0.2.4", "2001:db8::53"]}


async def make(api: Api, body: dict[str, Any]) -> Any:
    answer = await api.call("admin", "POST", NETWORKS, json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["network"]


async def refused(api: Api, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
    answer = await api.call("admin", "POST", path, json=body)
    found = answer.json()
    return answer.status_code, found["code"], found["errors"][0]["field"]


async def told(api: Api, name: str) -> list[dict[str, Any]]:
    """Return what the vm's seed says of each of its cards, but for their MACs."""
    (row,) = await api.rows(schema.vm, name=name)
    cards = yaml.safe_load(row["seed"]["network_yaml"])["ethernets"]
    return [{key: value for key, value in cards[f"nic{i}"].items() if key != "match"} for i in range(len(cards))]


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"gateway": "192.0.3.1"}, "gateway-wrong", "gateway"),
        ({"gateway": "192.0.2.0"}, "gateway-wrong", "gateway"),
        ({"gateway": "192.0.2.7"}, "gateway-wrong", "gateway"),
        ({"gateway": "2001:db8::1"}, "gateway-wrong", "gateway"),
        ({"gateway": "192.0.2.300"}, "gateway-wrong", "gateway"),
        ({"gateway": "router"}, "request-invalid", "gateway"),
        ({"dns": ["192.0.2.4", "127.0.0.1"]}, "dns-wrong", "dns[1]"),
        ({"dns": ["192.0.2.4", "ns1.example.org"]}, "request-invalid", "dns[1]"),
        ({"dns": ["192.0.2.4"] * 4}, "request-invalid", "dns"),
        ({"subnet": ""}, "subnet-missing", "subnet"),
        ({"subnet": "", "gateway": ""}, "subnet-missing", "subnet"),
        ({"kind": "nat", "bridge": ""}, "gateway-not-allowed", "gateway"),
        ({"kind": "isolated", "bridge": "", "gateway": ""}, "dns-not-allowed", "dns"),
        ({"outer": OUTER}, "gateway-not-allowed", "gateway"),
        ({"outer": OUTER, "gateway": ""}, "dns-not-allowed", "dns"),
    ],
)
async def test_what_guests_could_not_reach_is_refused_by_its_field(
    api: Api, changes: dict[str, Any], code: str, field: str
) -> None:
    assert await refused(api, NETWORKS, LAN | changes) == (400, code, field)
    assert await api.rows(schema.network, name="lan") == []


async def test_a_network_shows_its_lans_router_and_dns_servers_in_one_spelling(api: Api) -> None:
    made = await make(api, LAN)
    assert (made["gateway"], made["dns"]) == ("192.0.2.2", ["192.0.2.4", "2001:db8::53"])
    assert (await make(api, SIX))["gateway"] == "2001:db8:0:6::1"
    shown = (await api.call("p1-viewer", "GET", f"{NETWORKS}/lan")).json()
    assert (shown["gateway"], shown["dns"], shown["outer"]) == ("192.0.2.2", ["192.0.2.4", "2001:db8::53"], None)
    plain = (await api.call("p1-viewer", "GET", f"{NETWORKS}/default")).json()
    assert (plain["gateway"], plain["dns"]) == ("", [])


async def test_a_card_is_never_given_the_routers_address_and_a_dns_servers_only_by_hand(api_on_each: Api) -> None:
    api = api_on_each
    await make(api, LAN)
    first = await api.make_vm("web1", networks=[{"network": "lan"}, {"network": "lan"}])
    assert [nic["addresses"] for nic in first["nics"]] == [["192.0.2.3/29"], ["192.0.2.5/29"]]
    vm = {"name": "ns", "image": "debian", "memory_mib": 512}
    found = await refused(api, VMS, vm | {"networks": [{"network": "lan", "ip": "192.0.2.2"}]})
    assert found == (400, "address-gateway", "networks[0].ip")
    server = await api.make_vm("ns", networks=[{"network": "lan", "ip": "192.0.2.4"}])
    assert server["nics"][0]["addresses"] == ["192.0.2.4/29"]
    await make(api, SIX)
    found = await refused(api, VMS, vm | {"name": "six", "networks": [{"network": "six", "ip": "2001:db8:0:6:0:0:0:1"}]})
    assert found == (400, "address-gateway", "networks[0].ip")


async def test_a_seed_says_the_way_out_of_the_first_lan_of_each_family_and_the_dns_servers_of_each(api_on_each: Api) -> None:
    api = api_on_each
    for body in (LAN, OTHER, SIX):
        await make(api, body)
    cards = [{"network": "default"}, {"network": "other"}, {"network": "lan"}, {"network": "six", "ip": "2001:db8:0:6::9"}]
    await api.make_vm("web1", networks=cards)
    assert await told(api, "web1") == [
        {"dhcp4": True},
        {"addresses": ["198.51.100.2/24"], "routes": [{"to": "0.0.0.0/0", "via": "198.51.100.254"}]},
        {"addresses": ["192.0.2.3/29"], "nameservers": DNS_OF_LAN},
        {
            "addresses": ["2001:db8:0:6::9/64"],
            "routes": [{"to": "::/1", "via": "2001:db8:0:6::1"}, {"to": "8000::/1", "via": "2001:db8:0:6::1"}],
        },
    ]


async def test_a_card_without_an_address_of_its_own_is_told_nothing_of_its_lan(api: Api) -> None:
    """An IPv6 guest makes its address of what its router says, and its way out too."""
    await make(api, LAN)
    await make(api, SIX)
    await api.make_vm("web1", networks=[{"network": "six"}, {"network": "lan"}])
    lans = {"addresses": ["192.0.2.3/29"], "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.2"}], "nameservers": DNS_OF_LAN}
    assert await told(api, "web1") == [{"dhcp4": True}, lans]
