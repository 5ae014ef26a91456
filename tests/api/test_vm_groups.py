"""Vm groups at the API: made, shown with their members, refused where their rules contradict each other, kept while they have members."""

from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.store import claims, schema, vms

P1 = "/v1/projects/p1"
APART: dict[str, Any] = {"relation": "anti-affinity"}
VM: dict[str, Any] = {"name": "web9", "image": "debian", "memory_mib": 512}


async def make(api: Api, name: str = "db", *rules: dict[str, Any]) -> Any:
    return await api.call("p1-operator", "POST", f"{P1}/vm-groups", json={"name": name, "rules": list(rules or (APART,))})


async def run_on(api: Api, vm: dict[str, Any], host: str) -> None:
    def work(session: Any) -> None:
        where = {"vm_id": vm["id"], "host_id": api.ids[host], "role": "home", "epoch": 1, "operation_id": ""}
        claims.take(session, **where, vcpus=1, memory_mib=512, generation=None, now=api.clock.now())
        vms.update(session, vm["id"], host_id=api.ids[host], machine="pc-q35-7.2", cpu_model="qemu64")

    await api.write(work)


async def test_a_group_is_made_shown_with_its_members_and_kept_while_it_has_some(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    made = await make(api, "db", APART, {"relation": "affinity", "domain": "zone", "must": False})
    assert made.status_code == 201, made.text
    assert [rule["summary"] for rule in made.json()["rules"]] == ["must anti-affinity by host", "should affinity by zone"]
    vm = await api.make_vm("db1", group="db")
    assert vm["group"] == "db"
    await run_on(api, vm, "node2")
    shown = (await api.call("p1-viewer", "GET", f"{P1}/vm-groups/db")).json()
    assert shown["members"] == {"db1": "node2"}
    listed = (await api.call("p1-viewer", "GET", f"{P1}/vm-groups")).json()["items"]
    assert [one["name"] for one in listed] == ["db"]
    kept = await api.call("p1-operator", "DELETE", f"{P1}/vm-groups/db")
    assert (kept.status_code, kept.json()["code"]) == (409, "vm-group-not-empty")
    assert "db1" in kept.json()["detail"]
    await api.set_vm(vm["id"], deleted_at=api.clock.now())
    assert (await api.call("p1-operator", "DELETE", f"{P1}/vm-groups/db")).status_code == 204
    assert (await api.call("p1-viewer", "GET", f"{P1}/vm-groups/db")).json()["code"] == "vm-group-not-found"
    assert (await make(api)).status_code == 201, "the name is free again"


async def test_a_dry_run_of_a_member_says_which_rule_bars_each_host(api: Api) -> None:
    await api.equip()
    await make(api)
    for name, host in (("db1", "node1"), ("db2", "node2")):
        await run_on(api, await api.make_vm(name, group="db"), host)
    refused = await api.call("p1-operator", "POST", f"{P1}/vms?validate_only=true", json=VM | {"group": "db"})
    assert (refused.status_code, refused.json()["code"]) == (409, "no-host-fits")
    assert "node1: group db must anti-affinity by host: it has 1 of its members" in refused.json()["context"]["reasons"]
    fits = await api.call("p1-operator", "POST", f"{P1}/vms?validate_only=true", json=VM)
    assert fits.status_code == 200
    assert await api.rows(schema.vm_group_member) != []


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ([], "rules"),
        ([APART, {"relation": "affinity"}], "rules"),
        ([{"relation": "affinity", "limit": 2}], "rules[0].limit"),
        ([{"relation": "anti-affinity", "limit": 0}], "rules[0].limit"),
        ([{"relation": "near"}], "rules[0].relation"),
    ],
)
async def test_rules_that_cannot_be_kept_are_refused_by_field(api: Api, rules: list[Any], field: str) -> None:
    answer = await api.call("p1-operator", "POST", f"{P1}/vm-groups", json={"name": "db", "rules": rules})
    assert answer.status_code == 400, answer.text
    assert answer.json()["errors"][0]["field"] == field


async def test_a_rule_that_was_made_soft_bars_no_host_any_more(api: Api) -> None:
    await api.equip()
    made = await make(api)
    for name, host in (("db1", "node1"), ("db2", "node2")):
        await run_on(api, await api.make_vm(name, group="db"), host)
    soft = {"rules": [APART | {"must": False}]}
    changed = await api.call("p1-operator", "PATCH", f"{P1}/vm-groups/db", json=soft, headers={"If-Match": made.json()["etag"]})
    assert [rule["summary"] for rule in changed.json()["rules"]] == ["should anti-affinity by host"]
    stale = await api.call("p1-operator", "PATCH", f"{P1}/vm-groups/db", json=soft, headers={"If-Match": made.json()["etag"]})
    assert stale.json()["code"] == "stale-etag"
    assert [row["generation"] for row in await api.rows(schema.vm_group)] == [1], "a decision under way is made again"
    placed = await api.call("p1-operator", "POST", f"{P1}/vms?validate_only=true", json=VM | {"group": "db"})
    assert placed.status_code == 200, placed.text


async def test_a_group_is_its_projects_own(api: Api) -> None:
    await make(api)
    other = await api.call("p2-operator", "POST", "/v1/projects/p2/vms", json=VM | {"group": "db"})
    assert (other.status_code, other.json()["code"]) == (404, "vm-group-not-found")
    assert (await api.call("p2-viewer", "GET", "/v1/projects/p2/vm-groups/db")).status_code == 404
