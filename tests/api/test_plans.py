"""Plans, maintenance, coverage and capacity over REST."""

from typing import Any

from tests.api.kit import Api
from trimtab_controller.store import schema


async def place(api: Api, name: str, host: str, **values: Any) -> dict[str, Any]:
    """Return a vm that runs on the host, its claim booked; hosts are up, with room."""
    vm = await api.make_vm(name)
    await api.end_operations()
    host_id, now = api.ids[host], api.clock.now()
    claim = {
        "vm_id": vm["id"],
        "host_id": host_id,
        "role": "home",
        "epoch": 1,
        "vcpus": 1,
        "memory_mib": 512,
        "operation_id": "",
        "created_at": now,
    }
    table = schema.host
    limits = {"connectivity": "up", "vcpus_limit": 4, "memory_limit_mib": 4096}
    await api.write(lambda session: session.execute(table.update().values(**limits)))
    taken = {"vcpus_claimed": table.c.vcpus_claimed + 1, "memory_claimed_mib": table.c.memory_claimed_mib + 512}
    await api.write(lambda session: session.execute(table.update().where(table.c.id == host_id).values(**taken)))
    await api.write(lambda session: session.execute(schema.claim.insert().values(**claim)))
    await api.set_vm(vm["id"], host_id=host_id, observed_state="running", **values)
    return vm


async def test_a_drain_is_planned_reviewed_and_applied_once(api_on_each: Api) -> None:
    api = api_on_each
    await place(api, "web1", "node1", drain_policy="wait")
    made = await api.call("fleet-operator", "POST", "/v1/plans", json={"kind": "drain", "hosts": ["node1"]})
    assert made.status_code == 201, made.text
    plan = made.json()
    assert (plan["kind"], plan["state"], plan["hosts"]) == ("drain", "open", ["node1"])
    (blocker,) = plan["blockers"]
    assert (blocker["cause"], blocker["vm"]) == ("drain-policy", "web1")
    assert [step["kind"] for step in plan["steps"]] == ["cordon"]
    shown = await api.call("fleet-viewer", "GET", f"/v1/plans/{plan['id']}")
    assert shown.json() == plan
    applied = await api.call("fleet-operator", "POST", f"/v1/plans/{plan['id']}:apply")
    assert applied.status_code == 202, applied.text
    assert applied.json()["operation"]["kind"] == "plan.apply"
    assert len(api.nudges) >= 1
    again = await api.call("fleet-operator", "POST", f"/v1/plans/{plan['id']}:apply")
    assert (again.status_code, again.json()["code"]) == (409, "operation-in-progress")
    cancelled = await api.call("fleet-operator", "POST", f"/v1/plans/{plan['id']}:cancel")
    assert cancelled.json()["operation"]["is_cancel_requested"] is True
    listed = await api.call("fleet-viewer", "GET", "/v1/plans?filter=kind=drain")
    assert [one["id"] for one in listed.json()["items"]] == [plan["id"]]


async def test_a_plan_is_shown_and_not_kept_where_only_validation_is_asked_for(api: Api) -> None:
    answer = await api.call("fleet-operator", "POST", "/v1/plans?validate_only=true", json={"kind": "rebalance"})
    assert answer.json()["summary"].startswith("no beneficial move")
    assert await api.rows(schema.plan) == []


async def test_a_plan_that_was_not_applied_is_deleted(api: Api) -> None:
    plan = (await api.call("fleet-operator", "POST", "/v1/plans", json={"kind": "consolidate"})).json()
    assert (await api.call("fleet-operator", "DELETE", f"/v1/plans/{plan['id']}")).status_code == 204
    assert (await api.call("fleet-viewer", "GET", f"/v1/plans/{plan['id']}")).status_code == 404


async def test_plans_are_the_fleets_and_not_a_projects(api: Api) -> None:
    for caller in ("p1-admin", "nobody"):
        assert (await api.call(caller, "POST", "/v1/plans", json={"kind": "rebalance"})).status_code == 403
    assert (await api.call("fleet-viewer", "POST", "/v1/plans", json={"kind": "rebalance"})).status_code == 403


async def test_refusals_name_the_field_and_the_cure(api: Api) -> None:
    without_hosts = await api.call("fleet-operator", "POST", "/v1/plans", json={"kind": "drain"})
    assert (without_hosts.status_code, without_hosts.json()["code"]) == (400, "hosts-missing")
    unknown = await api.call("fleet-operator", "POST", "/v1/plans", json={"kind": "drain", "hosts": ["node9"]})
    assert unknown.status_code == 404
    undo = await api.call("fleet-operator", "POST", "/v1/plans", json={"kind": "undo"})
    assert undo.json()["errors"][0]["field"] == "plan" or undo.json()["code"] == "plan-field"


async def test_coverage_names_who_would_not_come_back_and_why(api: Api) -> None:
    await place(api, "web1", "node1", ha="restart")
    await place(api, "web2", "node2")
    found = (await api.call("fleet-viewer", "GET", "/v1/failover-coverage?by=host")).json()
    assert found["is_covered"] is False
    by_name = {one["name"]: one for one in found["domains"]}
    (lost,) = by_name["node1"]["uncovered"]
    assert lost["vm"] == "web1"
    assert "node2" in lost["reason"]
    assert (by_name["node2"]["is_covered"], by_name["node2"]["unprotected_count"]) == (True, 1)


async def test_coverage_tells_of_every_vm_whether_it_is_covered_against_what_and_why(api: Api) -> None:
    await place(api, "web1", "node1", ha="restart")
    await place(api, "web2", "node2")
    found = (await api.call("fleet-viewer", "GET", "/v1/failover-coverage?by=host&vms=true")).json()
    told = {one["vm"]: (one["coverage"], one["domains"], one["uncovered"]) for one in found["vms"]}
    assert told["web1"] == ("uncovered", ["host:node1"], ["host:node1"])
    assert told["web2"] == ("unprotected", ["host:node2"], [])
    reasons = {one["vm"]: one["reason"] for one in found["vms"]}
    assert "node2" in reasons["web1"]
    assert "ha is none" in reasons["web2"]
    assert (await api.call("fleet-viewer", "GET", "/v1/failover-coverage?by=host")).json()["vms"] == []


async def test_coverage_of_one_rack_is_about_that_rack_alone(api: Api) -> None:
    await place(api, "web1", "node1", ha="restart")
    for host, rack in (("node1", "r1"), ("node2", "r2")):
        changed = await api.call("admin", "PATCH", f"/v1/hosts/{host}", json={"labels": {"rack": rack}})
        assert changed.status_code == 200, changed.text
    found = (await api.call("fleet-viewer", "GET", "/v1/failover-coverage?selector=rack=r2")).json()
    assert [(one["kind"], one["name"], one["is_covered"]) for one in found["domains"]] == [("rack", "r2", True)]
    assert found["is_covered"] is True
    (lost,) = (await api.call("fleet-viewer", "GET", "/v1/failover-coverage?selector=rack=r1")).json()["domains"]
    assert (lost["name"], lost["is_covered"], [one["vm"] for one in lost["uncovered"]]) == ("r1", False, ["web1"])


async def test_capacity_by_zone_and_without_a_host(api: Api) -> None:
    await place(api, "web1", "node1")
    for host, zone in (("node1", "z1"), ("node2", "z2")):
        await api.call("admin", "PATCH", f"/v1/hosts/{host}", json={"labels": {"zone": zone}})
    items = (await api.call("fleet-viewer", "GET", "/v1/capacity?by=zone")).json()["items"]
    assert [(one["name"], one["vcpus_free"]) for one in items] == [("z1", 3), ("z2", 4)]
    ask = {"vcpus": 1, "memory_mib": 1024, "without": ["node2"]}
    left = (await api.call("fleet-viewer", "POST", "/v1/capacity:fit", json=ask)).json()
    assert (left["count"], left["by_host"]) == (3, {"node1": 3})
    assert left["largest_by_vcpus"] == {"vcpus": 3, "memory_mib": items[0]["memory_free_mib"]}
    chosen = {"vcpus": 1, "memory_mib": 1024, "host_selector": {"zone": "z2"}}
    there = (await api.call("fleet-viewer", "POST", "/v1/capacity:fit", json=chosen)).json()
    assert there["largest_by_vcpus"] == {"vcpus": 4, "memory_mib": items[1]["memory_free_mib"]}


async def test_coverage_tells_what_a_vm_on_local_disks_would_lose_with_its_host(api: Api) -> None:
    vm = await place(api, "db", "node1", ha="restart")
    await api.write(lambda session: session.execute(schema.pool.update().values(is_shared=False)))
    (lost,) = (await api.call("fleet-viewer", "GET", "/v1/failover-coverage")).json()["local_vms"]
    assert (lost["vm"], lost["vm_id"], lost["host"]) == ("db", vm["id"], "node1")
    assert (lost["comes_back"], lost["backup"], lost["loss_window_s"]) == (False, None, None)
    assert "--recover-lost" in lost["why"]
    await api.write(lambda session: session.execute(schema.pool.update().values(is_shared=True)))
    assert (await api.call("fleet-viewer", "GET", "/v1/failover-coverage")).json()["local_vms"] == []


async def test_capacity_counts_what_is_free_and_what_fits(api: Api) -> None:
    await place(api, "web1", "node1")
    (fleet,) = (await api.call("fleet-viewer", "GET", "/v1/capacity")).json()["items"]
    assert (fleet["vcpus_limit"], fleet["vcpus_claimed"], fleet["vcpus_free"], fleet["vm_count"]) == (8, 1, 7, 1)
    ask = {"vcpus": 1, "memory_mib": 1024}
    fit = (await api.call("fleet-viewer", "POST", "/v1/capacity:fit", json=ask)).json()
    assert (fit["count"], fit["by_host"]) == (7, {"node1": 3, "node2": 4})
    kept = (await api.call("fleet-viewer", "POST", "/v1/capacity:fit", json={**ask, "keep_free_hosts": 1})).json()
    assert kept["count"] == 3
    more = (await api.call("fleet-viewer", "POST", "/v1/capacity:fit", json={**ask, "add": ["2x4c/4GiB"]})).json()
    assert more["count"] > fit["count"]


async def test_maintenance_holds_a_host_until_it_is_ended(api: Api) -> None:
    await place(api, "web1", "node2")
    started = await api.call("fleet-operator", "POST", "/v1/hosts/node1:start-maintenance")
    assert started.status_code == 202, started.text
    assert (await api.call("fleet-operator", "POST", "/v1/hosts/node1:start-maintenance")).status_code == 409
    held = {one["name"]: one["maintenance"] for one in (await api.call("fleet-viewer", "GET", "/v1/hosts")).json()["items"]}
    assert held["node1"] | {"since": ""} == {"plan": "", "by": "fleet-operator", "since": ""}
    assert held["node2"] is None
    refused = await api.call("fleet-operator", "POST", "/v1/hosts/node1:uncordon")
    assert refused.json()["code"] == "host-in-maintenance"
    assert (await api.call("fleet-operator", "POST", "/v1/hosts/node1:end-maintenance")).status_code == 204
    assert (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()["is_cordoned"] is False
    assert (await api.call("fleet-viewer", "GET", "/v1/hosts/node1")).json()["maintenance"] is None


async def test_a_vm_says_what_a_drain_may_do_with_it(api: Api) -> None:
    vm = await api.make_vm("web1")
    changed = await api.call("p1-operator", "PATCH", "/v1/projects/p1/vms/web1", json={"drain_policy": "restart"})
    assert changed.json()["drain_policy"] == "restart"
    assert vm["drain_policy"] == "migrate"
