"""Security groups and addresses at the API: what is given, what is refused and why."""

from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.store import schema

P1 = "/v1/projects/p1"


async def make(api: Api, name: str = "web", *rules: str) -> Any:
    return await api.call("p1-operator", "POST", f"{P1}/secgroups", json={"name": name, "rules": list(rules or ("tcp/443",))})


async def make_network(api: Api, name: str, *, caller: str = "p1-operator", **fields: Any) -> Any:
    body = {"name": name, "kind": "isolated", "subnet": "10.77.0.0/29", "dhcp": True, **fields}
    return await api.call(caller, "POST", f"/v1/projects/{caller.partition('-')[0]}/networks", json=body)


async def test_a_group_is_made_given_to_a_vm_and_kept_while_it_has_one(api_on_each: Api) -> None:
    api = api_on_each
    made = await make(api, "web", "tcp/22@10.0.0.0/8", "tcp/443", "tcp/443")
    assert made.status_code == 201, made.text
    assert made.json()["rules"] == ["tcp/22@10.0.0.0/8", "tcp/443"], "each once"
    vm = await api.make_vm("web1", secgroups=["web"])
    assert vm["secgroups"] == ["web"]
    assert (await api.rows(schema.vm_firewall, vm_id=vm["id"]))[0]["generation"] == 1
    changed = await api.call("p1-operator", "PATCH", f"{P1}/secgroups/web", json={"rules": ["icmp"]})
    assert changed.status_code == 202, changed.text
    assert changed.json()["operation"]["kind"] == "firewall.apply"
    assert (changed.json()["secgroup"]["rules"], changed.json()["secgroup"]["vms"]) == (["icmp"], ["web1"])
    assert (await api.rows(schema.vm_firewall, vm_id=vm["id"]))[0]["generation"] == 2, "hosts have to follow"
    kept = await api.call("p1-operator", "DELETE", f"{P1}/secgroups/web")
    assert (kept.status_code, kept.json()["code"]) == (409, "secgroup-in-use")
    assert "web1" in kept.json()["detail"]
    await api.set_vm(vm["id"], deleted_at=api.clock.now())
    assert (await api.call("p1-operator", "DELETE", f"{P1}/secgroups/web")).status_code == 409, "it can still be brought back"
    await api.set_vm(vm["id"], deleted_at=None)
    taken = await api.call("p1-operator", "POST", f"{P1}/vms/web1:secgroups", json={"secgroups": []})
    assert taken.status_code == 202, taken.text
    shown = (await api.call("p1-viewer", "GET", f"{P1}/vms/web1")).json()
    assert shown["secgroups"] == []
    assert (await api.call("p1-operator", "DELETE", f"{P1}/secgroups/web")).status_code == 204


@pytest.mark.parametrize(
    "rule", ["tcp/0", "tcp/99999", "udp/20-10", "icmp/8", "sctp/1", "tcp/22@10.0.0.1/8", "tcp/22@host", "tcp", "any@0.0.0.0/0"]
)
async def test_a_rule_that_is_none_is_refused_by_its_place(api: Api, rule: str) -> None:
    answer = await make(api, "web", "tcp/443", rule)
    if rule in {"tcp", "any@0.0.0.0/0"}:
        assert answer.status_code == 201, answer.text
        return
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, "rules[1]"), answer.text


async def test_a_group_is_its_projects_own(api: Api) -> None:
    await make(api)
    body = {"name": "web9", "image": "debian", "memory_mib": 512, "secgroups": ["web"]}
    other = await api.call("p2-operator", "POST", "/v1/projects/p2/vms", json=body)
    assert (other.status_code, other.json()["code"]) == (404, "secgroup-not-found")


async def test_a_nic_is_given_the_lowest_free_address_and_the_last_one_ends_the_subnet(api_on_each: Api) -> None:
    api = api_on_each
    assert (await make_network(api, "lab1")).status_code == 202
    first = await api.make_vm("web1", networks=[{"network": "lab1"}, {"network": "lab1"}])
    assert [nic["addresses"] for nic in first["nics"]] == [["10.77.0.2/29"], ["10.77.0.3/29"]]
    second = await api.make_vm("web2", networks=[{"network": "lab1", "ip": "10.77.0.5"}, {"network": "lab1"}])
    assert [nic["addresses"] for nic in second["nics"]] == [["10.77.0.5/29"], ["10.77.0.4/29"]]
    await api.make_vm("web3", networks=[{"network": "lab1"}])
    body = {"name": "web4", "image": "debian", "memory_mib": 512, "networks": [{"network": "lab1"}]}
    full = await api.call("p1-operator", "POST", f"{P1}/vms", json=body)
    assert (full.status_code, full.json()["code"]) == (409, "addresses-taken")
    (row,) = await api.rows(schema.vm, name="web1")
    assert row["seed"] == {}, "DHCP says the address"


@pytest.mark.parametrize(
    ("ip", "code"),
    [
        ("10.78.0.2", "address-outside"),
        ("10.77.0.1", "address-gateway"),
        ("10.77.0.0", "address-reserved"),
        ("10.77.0.7", "address-reserved"),
        ("10.77.0.2", "address-taken"),
    ],
)
async def test_an_address_that_is_not_the_guests_to_have_is_refused(api: Api, ip: str, code: str) -> None:
    await make_network(api, "lab1")
    await api.make_vm("web1", networks=[{"network": "lab1"}])
    body = {"name": "web2", "image": "debian", "memory_mib": 512, "networks": [{"network": "lab1", "ip": ip}]}
    refused = await api.call("p1-operator", "POST", f"{P1}/vms", json=body)
    assert refused.json()["code"] == code, refused.text


async def test_subnets_that_overlap_are_refused_by_the_name_of_the_other(api_on_each: Api) -> None:
    api = api_on_each
    await make_network(api, "lab1")
    refused = await make_network(api, "lab2", subnet="10.77.0.0/16")
    assert (refused.status_code, refused.json()["code"]) == (409, "subnet-overlaps")
    assert "lab1 (10.77.0.0/29)" in refused.json()["detail"]
    assert "trimtab network list" in refused.json()["detail"]
    hidden = await make_network(api, "lab2", caller="p2-operator", subnet="10.77.0.0/16")
    assert hidden.json()["code"] == "subnet-overlaps"
    assert "lab1" not in hidden.text, "whose it is is the other project's"
    assert (await make_network(api, "lab2", subnet="10.78.0.0/29")).status_code == 202
    for wrong in ("10.79.0.0/30", "fd00:1::/64"):
        assert (await make_network(api, "lab3", subnet=wrong)).json()["code"] == "subnet-wrong"


async def test_only_an_administrator_of_the_fleet_lets_a_card_send_as_others(api: Api) -> None:
    body = {
        "name": "router",
        "image": "debian",
        "memory_mib": 512,
        "networks": [{"network": "default", "allow_spoofing": True}],
    }
    for caller in ("p1-operator", "p1-admin"):
        refused = await api.call(caller, "POST", f"{P1}/vms", json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "role-missing")
    given = await api.call("admin", "POST", f"{P1}/vms", json=body)
    assert given.status_code == 202, given.text
    assert given.json()["vm"]["nics"][0]["allow_spoofing"] is True


async def test_a_template_keeps_the_groups_of_the_vm_that_it_was_made_of(api: Api) -> None:
    await make(api)
    vm = await api.make_vm("web1", secgroups=["web"])
    await api.set_vm(vm["id"], observed_state="stopped", desired_power="stopped", host_id=api.ids["node1"])
    await api.write(lambda session: session.execute(schema.volume.update().values(observed_state="present")))
    await api.end_operations()
    made = await api.call("p1-operator", "POST", f"{P1}/templates", json={"name": "gold", "from_vm": "web1"})
    assert made.status_code == 202, made.text
    (row,) = await api.rows(schema.template, name="gold")
    assert row["settings"]["secgroups"] == ["web"]
