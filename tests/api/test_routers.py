"""Routers and floating addresses at the API: what they are, whose, and what each is refused for."""

from dataclasses import replace
from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.store import floating as floating_rows
from trimtab_controller.store import overlays, vms

P1, P2 = "/v1/projects/p1", "/v1/projects/p2"
OUTER = {"gateway": "192.0.2.1", "first": "192.0.2.100", "last": "192.0.2.103"}
LAN = {"name": "lan", "kind": "bridge", "bridge": "br0", "subnet": "192.0.2.0/24", "outer": OUTER}


@pytest.fixture
async def overlay_api(api: Api) -> Api:
    """An API whose engine keeps an OVN, with the way out `lan` for all projects and overlay network `lab1` of p1."""
    runtime = api.app.state.runtime
    runtime.context = replace(runtime.context, settings=replace(runtime.context.settings, has_overlay=True))
    made = await api.call("admin", "POST", "/v1/networks", json=LAN)
    assert made.status_code == 202, made.text
    assert made.json()["network"]["outer"] == OUTER
    made = await api.call("p1-operator", "POST", f"{P1}/networks", json=lab("lab1", "10.30.0.0/24"))
    assert made.status_code == 202, made.text
    return api


def lab(name: str, subnet: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "overlay", "subnet": subnet, **more}


async def ok(api: Api, method: str, path: str, body: dict[str, Any] | None = None, *, who: str = "p1-operator") -> Any:
    answer = await api.call(who, method, path, **({"json": body} if body is not None else {}))
    assert answer.status_code in {200, 201, 202, 204}, answer.text
    return answer.json() if answer.content else None


async def refused(api: Api, method: str, path: str, body: dict[str, Any] | None = None, *, who: str = "p1-operator") -> Any:
    answer = await api.call(who, method, path, **({"json": body} if body is not None else {}))
    assert answer.status_code >= 400, answer.text
    return answer.json()


async def equipped(api: Api) -> Any:
    """Return a vm on lab1, which is behind router edge with its outer side on lan."""
    await ok(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["lab1"], "outer": "lan"})
    return await api.make_vm("web1", networks=[{"network": "lab1"}])


@pytest.mark.parametrize(
    ("outer", "field"),
    [
        ({"gateway": "192.0.3.1"}, "outer.gateway"),
        ({"gateway": "192.0.2.101"}, "outer.gateway"),
        ({"gateway": "192.0.2.300"}, "outer.gateway"),
        ({"first": "192.0.2.0"}, "outer.first"),
        ({"last": "192.0.2.255"}, "outer.last"),
        ({"last": "192.0.2.99"}, "outer.last"),
    ],
)
async def test_a_way_out_that_contradicts_itself_is_refused_by_its_field(
    overlay_api: Api, outer: dict[str, str], field: str
) -> None:
    body = LAN | {"name": "lan2", "outer": OUTER | outer}
    found = await refused(overlay_api, "POST", "/v1/networks", body, who="admin")
    assert (found["code"], found["errors"][0]["field"]) == ("outer-wrong", field)


async def test_a_way_out_is_on_a_bridge_has_a_subnet_and_takes_no_vm(overlay_api: Api) -> None:
    found = await refused(overlay_api, "POST", "/v1/networks", LAN | {"name": "l2", "subnet": ""}, who="admin")
    assert found["code"] == "subnet-missing"
    body = lab("l2", "10.50.0.0/24", outer=OUTER)
    assert (await refused(overlay_api, "POST", "/v1/networks", body, who="admin"))["code"] == "outer-not-allowed"
    vm = {"name": "web1", "image": "debian", "memory_mib": 512, "networks": [{"network": "lan"}]}
    assert (await refused(overlay_api, "POST", f"{P1}/vms", vm))["code"] == "network-outer"


async def test_without_an_ovn_there_are_neither(api: Api) -> None:
    assert (await refused(api, "POST", "/v1/networks", LAN, who="admin"))["code"] == "overlay-off"
    assert (await refused(api, "POST", f"{P1}/routers", {"name": "edge"}))["code"] == "overlay-off"


async def test_a_router_has_networks_behind_it_and_an_address_outside(overlay_api: Api) -> None:
    api = overlay_api
    made = await ok(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["lab1"], "outer": "lan"})
    assert (made["networks"], made["outer"], made["outer_address"]) == (["lab1"], "lan", "192.0.2.100")
    assert (await ok(api, "GET", f"{P1}/networks/lab1"))["router"] == "edge"
    await ok(api, "POST", f"{P1}/networks", lab("lab2", "10.31.0.0/24", router="edge"))
    assert (await ok(api, "GET", f"{P1}/routers/edge"))["networks"] == ["lab1", "lab2"]
    used = await refused(api, "DELETE", f"{P1}/routers/edge")
    assert used["code"] == "router-in-use"
    assert "trimtab router detach edge --network lab1" in used["detail"]
    for name in ("lab1", "lab2"):
        await ok(api, "POST", f"{P1}/routers/edge:detach", {"network": name})
    assert (await refused(api, "POST", f"{P1}/routers/edge:detach", {"network": "lab1"}))["code"] == "network-not-behind"
    in_use = await refused(api, "DELETE", "/v1/networks/lan", who="admin")
    assert "router edge (192.0.2.100)" in in_use["detail"]
    await ok(api, "DELETE", f"{P1}/routers/edge")
    free = await refused(api, "DELETE", "/v1/networks/lan", who="admin")
    assert free["code"] == "operation-in-progress", "only its making is in the way now"


async def test_a_router_that_a_network_names_is_there_and_can_be_given_an_outer_side(overlay_api: Api) -> None:
    api = overlay_api
    await ok(api, "POST", f"{P1}/networks", lab("lab2", "10.31.0.0/24", router="inner"))
    shown = await ok(api, "GET", f"{P1}/routers/inner")
    assert (shown["networks"], shown["outer"], shown["gateways"]) == (["lab2"], "", [])
    changed = await ok(api, "PATCH", f"{P1}/routers/inner", {"outer": "lan", "outer_address": "192.0.2.102/24"})
    assert changed["outer_address"] == "192.0.2.102"
    same = await ok(api, "PATCH", f"{P1}/routers/inner", {"outer": "lan"})
    assert same["outer_address"] == "192.0.2.102", "what it has it keeps"
    assert (await ok(api, "PATCH", f"{P1}/routers/inner", {}))["outer"] == ""
    assert (await refused(api, "PATCH", f"{P1}/routers/inner", {"outer_address": "192.0.2.102"}))["code"] == "outer-missing"
    other = await refused(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["lab2"]})
    assert other["code"] == "network-has-router"
    assert "trimtab router detach inner --network lab2" in other["detail"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"outer": "lab1"}, "network-not-outer"),
        ({"outer": "lan", "outer_address": "192.0.2.99"}, "address-outside"),
        ({"outer": "lan", "outer_address": "192.0.3.100"}, "address-outside"),
        ({"outer": "lan", "outer_address": "192.0.2.1"}, "address-gateway"),
        ({"outer": "lan", "outer_address": "192.0.2.100/28"}, "address-wrong"),
        ({"networks": ["default"]}, "network-not-overlay"),
        ({"networks": ["absent"]}, "network-not-found"),
    ],
)
async def test_what_a_router_cannot_have_is_refused_and_nothing_is_made(
    overlay_api: Api, body: dict[str, Any], code: str
) -> None:
    assert (await refused(overlay_api, "POST", f"{P1}/routers", {"name": "edge", **body}))["code"] == code
    assert (await ok(overlay_api, "GET", f"{P1}/routers"))["items"] == []


async def test_an_address_is_given_once_whoever_has_it_and_back_when_it_is_deleted(overlay_api: Api) -> None:
    api = overlay_api
    await ok(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["lab1"], "outer": "lan"})
    place = f"{P1}/floating-addresses"
    taken = await refused(api, "POST", place, {"network": "lan", "address": "192.0.2.100"})
    assert (taken["code"], "router edge" in taken["detail"]) == ("address-taken", True)
    first = await ok(api, "POST", place, {"network": "lan"})
    assert first["name"] == "192.0.2.101"
    theirs = await refused(api, "POST", f"{P2}/floating-addresses", {"network": "lan", "address": "192.0.2.101"}, who="p2-admin")
    assert (theirs["code"], "another project" in theirs["detail"]) == ("address-taken", True)
    assert (await refused(api, "GET", f"{P2}/floating-addresses/192.0.2.101", who="p2-admin"))["code"] == "floating-not-found"
    for _ in range(2):
        await ok(api, "POST", place, {"network": "lan"})
    full = await refused(api, "POST", place, {"network": "lan"})
    assert (full["code"], "192.0.2.100-192.0.2.103" in full["detail"]) == ("addresses-taken", True)
    await ok(api, "DELETE", f"{place}/192.0.2.102")
    assert (await ok(api, "POST", place, {"network": "lan"}))["name"] == "192.0.2.102"


async def test_addresses_count_in_a_quota_until_they_are_given_back(overlay_api: Api) -> None:
    api, place = overlay_api, f"{P1}/floating-addresses"
    await ok(api, "PATCH", P1, {"quotas": {"floating": 1}}, who="admin")
    await ok(api, "POST", place, {"network": "lan"})
    over = await refused(api, "POST", place, {"network": "lan"})
    assert (over["code"], over["context"]["resource"]) == ("quota-exceeded", "floating")
    assert (await ok(api, "GET", P1, who="admin"))["quotas"]["floating"] == {"quota": 1, "used": 1}
    await ok(api, "DELETE", f"{place}/192.0.2.100")
    await ok(api, "POST", place, {"network": "lan"})


async def test_an_address_leads_to_a_vm_and_goes_with_its_card(overlay_api: Api) -> None:
    api, place = overlay_api, f"{P1}/floating-addresses"
    vm = await equipped(api)
    for _ in range(2):
        await ok(api, "POST", place, {"network": "lan"})
    led = await ok(api, "POST", f"{place}/192.0.2.101:attach", {"vm": "web1"})
    assert (led["vm"], led["nic"], led["address"]) == ("web1", vm["nics"][0]["id"], "10.30.0.2")
    again = await refused(api, "POST", f"{place}/192.0.2.101:attach", {"vm": "web1"})
    assert (again["code"], "trimtab floating detach 192.0.2.101" in again["detail"]) == ("floating-attached", True)
    second = await refused(api, "POST", f"{place}/192.0.2.102:attach", {"vm": "web1", "nic": "0"})
    assert (second["code"], "192.0.2.101" in second["detail"]) == ("nic-has-floating", True)
    assert (await refused(api, "DELETE", f"{place}/192.0.2.101"))["code"] == "floating-attached"
    for verb, path, body in (
        ("POST", "routers/edge:detach", {"network": "lab1"}),
        ("PATCH", "routers/edge", {"outer": ""}),
    ):
        kept = await refused(api, verb, f"{P1}/{path}", body)
        assert (kept["code"], "192.0.2.101" in kept["detail"]) == ("router-in-use", True)
    seen = await api.db.read(overlays.read_outside)
    assert [(one.address, one.nic_id) for one in seen.floating] == [("192.0.2.101", vm["nics"][0]["id"])]
    await api.db.write(lambda session: vms.delete_nic(session, vm["nics"][0]["id"]))
    left = await ok(api, "GET", f"{place}/192.0.2.101")
    assert (left["vm"], left["nic"]) == ("", "")
    await ok(api, "POST", f"{place}/192.0.2.101:detach")


async def test_who_holds_which_address_is_shown_at_the_router_and_at_the_vm(overlay_api: Api) -> None:
    api, place = overlay_api, f"{P1}/floating-addresses"
    await ok(api, "POST", f"{P1}/secgroups", {"name": "web", "rules": ["tcp/443"]})
    await ok(api, "POST", f"{P1}/networks", lab("lab2", "10.31.0.0/24"))
    await ok(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["lab1"], "outer": "lan"})
    await ok(api, "POST", f"{P1}/routers", {"name": "inner", "networks": ["lab2"]})
    await api.make_vm("web1", networks=[{"network": "lab1"}, {"network": "lab2"}], secgroups=["web"])
    await ok(api, "POST", place, {"network": "lan"})
    own = [("192.0.2.100", "lan", "", ""), ("10.30.0.1", "lab1", "", "")]

    async def held(name: str) -> list[tuple[Any, ...]]:
        shown = (await ok(api, "GET", f"{P1}/routers/{name}"))["addresses"]
        return [(one["address"], one["network"], one["vm"], one["inner"]) for one in shown]

    assert await held("edge") == own, "an address that leads to nobody comes in by no router"
    await ok(api, "POST", f"{place}/192.0.2.101:attach", {"vm": "web1"})
    assert await held("edge") == [*own, ("192.0.2.101", "lan", "web1", "10.30.0.2")]
    assert await held("inner") == [("10.31.0.1", "lab2", "", "")]
    shown = await ok(api, "GET", f"{P1}/vms/web1")
    assert [(nic["network"], nic["network_kind"], nic["addresses"], nic["floating"]) for nic in shown["nics"]] == [
        ("lab1", "overlay", ["10.30.0.2/24"], "192.0.2.101"), ("lab2", "overlay", ["10.31.0.2/24"], "")
    ]  # fmt: skip
    assert shown["secgroups"] == ["web"]
    await api.db.write(lambda session: vms.update(session, shown["id"], deleted_at=api.clock.now()))
    last = (await ok(api, "GET", f"{P1}/routers/edge"))["addresses"][-1]
    assert (last["vm"], last["is_vm_deleted"]) == ("web1", True)


async def test_an_address_that_has_no_way_to_a_vm_says_what_makes_one(overlay_api: Api) -> None:
    api, place = overlay_api, f"{P1}/floating-addresses"
    await api.make_vm("plain")
    await api.make_vm("web1", networks=[{"network": "default"}, {"network": "lab1"}])
    await ok(api, "POST", place, {"network": "lan"})

    async def why(vm: str, nic: str = "") -> str:
        found = await refused(api, "POST", f"{place}/192.0.2.100:attach", {"vm": vm, "nic": nic})
        assert found["code"] == "floating-no-way"
        return str(found["detail"])

    assert "trimtab vm attach plain --network NAME" in await why("plain")
    assert "trimtab router create edge --network lab1 --outer lan" in await why("web1")
    assert "default is no overlay network" in await why("web1", "0")
    await ok(api, "POST", f"{P1}/routers", {"name": "inner", "networks": ["lab1"]})
    assert "trimtab router update inner --outer lan" in await why("web1")
    assert (await refused(api, "POST", f"{place}/192.0.2.100:attach", {"vm": "web1", "nic": "7"}))["code"] == "nic-not-found"
    await ok(api, "PATCH", f"{P1}/routers/inner", {"outer": "lan"})
    led = await ok(api, "POST", f"{place}/192.0.2.100:attach", {"vm": "web1"})
    assert led["address"] == "10.30.0.2", "the card that a router leads to, not the first one"


async def test_a_shared_overlay_network_has_no_way_out(overlay_api: Api) -> None:
    api = overlay_api
    await ok(api, "POST", "/v1/networks", lab("common", "10.32.0.0/24"), who="admin")
    assert (await refused(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["common"]}))[
        "code"
    ] == "network-not-overlay"
    await api.make_vm("web1", networks=[{"network": "common"}])
    await ok(api, "POST", f"{P1}/floating-addresses", {"network": "lan"})
    found = await refused(api, "POST", f"{P1}/floating-addresses/192.0.2.100:attach", {"vm": "web1"})
    assert "is shared" in found["detail"]


async def test_a_deleted_vms_address_leads_nowhere_and_comes_back_with_it(overlay_api: Api) -> None:
    api, place = overlay_api, f"{P1}/floating-addresses"
    vm = await equipped(api)
    await ok(api, "POST", place, {"network": "lan"})
    await ok(api, "POST", f"{place}/192.0.2.101:attach", {"vm": "web1"})
    await api.db.write(lambda session: vms.update(session, vm["id"], deleted_at=api.clock.now()))
    shown = await ok(api, "GET", f"{place}/192.0.2.101")
    assert (shown["vm"], shown["is_vm_deleted"]) == ("web1", True)
    assert (await api.db.read(overlays.read_outside)).floating == ()
    await api.db.write(lambda session: vms.update(session, vm["id"], deleted_at=None))
    assert len((await api.db.read(overlays.read_outside)).floating) == 1
    await api.db.write(lambda session: vms.delete_nics(session, vm["id"]))
    assert (await ok(api, "GET", f"{place}/192.0.2.101"))["vm"] == ""
    assert await api.db.read(lambda session: floating_rows.led_to(session, [])) == {}


async def test_a_project_with_a_router_or_an_address_is_not_empty(overlay_api: Api) -> None:
    await ok(overlay_api, "POST", f"{P1}/floating-addresses", {"network": "lan"})
    kept = await refused(overlay_api, "DELETE", P1, who="admin")
    assert "floating addresses 192.0.2.100" in kept["detail"]


SIX = "fd00:30::/64"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"subnet": SIX}, "subnet-wrong", "subnet"),
        ({"subnet6": "fd00:30::/48"}, "subnet6-wrong", "subnet6"),
        ({"subnet6": "10.33.0.0/24"}, "subnet6-wrong", "subnet6"),
        ({"subnet6": "fe80::/64"}, "subnet6-wrong", "subnet6"),
        ({"subnet6": SIX, "subnet": ""}, "subnet-missing", "subnet"),
        ({"subnet6": SIX, "kind": "isolated"}, "subnet6-not-allowed", "subnet6"),
        ({"ipv6": "dhcp"}, "subnet6-missing", "ipv6"),
        ({"subnet6": "fd00:99::/64"}, "subnet-overlaps", "subnet6"),
    ],
)
async def test_an_ipv6_subnet_that_guests_cannot_use_is_refused_by_its_field(
    overlay_api: Api, body: dict[str, str], code: str, field: str
) -> None:
    await ok(overlay_api, "POST", f"{P1}/networks", lab("lab9", "10.39.0.0/24", subnet6="fd00:99::/64"))
    found = await refused(overlay_api, "POST", f"{P1}/networks", lab("six", "10.33.0.0/24") | body)
    assert (found["code"], found["errors"][0]["field"] if found.get("errors") else found["context"]["field"]) == (code, field)


async def test_a_card_has_an_address_of_each_subnet_and_the_user_the_choice_of_one(overlay_api: Api) -> None:
    api = overlay_api
    made = await ok(api, "POST", f"{P1}/networks", lab("six", "10.33.0.0/24", subnet6=SIX, dhcp=True))
    assert (made["network"]["subnet6"], made["network"]["ipv6"]) == (SIX, "slaac")
    card = {"network": "six", "mac": "52:54:00:12:34:56"}
    vm = await api.make_vm("web1", networks=[card])
    assert vm["nics"][0]["addresses"] == ["10.33.0.2/24", "fd00:30::5054:ff:fe12:3456/64"]
    named = await api.make_vm("web2", networks=[{"network": "six", "ip": "fd00:30::9"}])
    assert named["nics"][0]["addresses"] == ["10.33.0.3/24", "fd00:30::9/64"]
    other = await api.make_vm("web3", networks=[{"network": "six", "ip": "10.33.0.9", "mac": "52:54:00:00:00:03"}])
    assert other["nics"][0]["addresses"] == ["10.33.0.9/24", "fd00:30::5054:ff:fe00:3/64"]
    body = {"name": "web4", "image": "debian", "memory_mib": 512}
    for ip, code in (
        ("fd00:30::9", "address-taken"),
        ("fd00:30::5054:ff:fe12:3456", "address-taken"),
        ("fd00:30::1", "address-gateway"),
        ("fd00:31::9", "address-outside"),
    ):
        found = await refused(api, "POST", f"{P1}/vms", body | {"networks": [{"network": "six", "ip": ip}]})
        assert found["code"] == code, ip
    await ok(api, "POST", f"{P1}/routers", {"name": "edge", "networks": ["six"], "outer": "lan"})
    shown = (await ok(api, "GET", f"{P1}/routers/edge"))["addresses"]
    assert [one["address"] for one in shown] == ["192.0.2.100", "10.33.0.1", "fd00:30::1"]
    await ok(api, "POST", f"{P1}/floating-addresses", {"network": "lan"})
    led = await ok(api, "POST", f"{P1}/floating-addresses/192.0.2.101:attach", {"vm": "web2"})
    assert led["address"] == "10.33.0.3", "the IPv4 one"
    networks, cards = await api.db.read(overlays.read)
    six = next(one for one in networks if one.subnet6)
    assert (six.subnet6, six.has_dhcp6) == (SIX, False)
    assert ("10.33.0.2/24", "fd00:30::5054:ff:fe12:3456/64") in [one.addresses for one in cards]
