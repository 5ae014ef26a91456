"""Health, joining, discovery, documentation and the explanation of placements."""

import re
from datetime import timedelta
from typing import Any

from tests.api.kit import Api
from trimtab_controller.clock import mint
from trimtab_controller.core.placement.engine import place as decide_all
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.store import placements, schema


async def test_health_tells_which_part_is_not_heard_of(api: Api) -> None:
    first = (await api.call("", "GET", "/v1/health")).json()
    assert (first["status"], first["components"]["engine"]) == ("degraded", "never seen")
    leases = [("engine", 0), ("gateway/a", 100), ("gateway/b", 1)]

    def hold(session: Any) -> None:
        for name, age_s in leases:
            renewed_at = api.clock.now() - timedelta(seconds=age_s)
            values = {"owner": "x", "term": 1, "beat": 1, "ttl_ms": 5000, "context": {}, "renewed_at": renewed_at}
            session.execute(schema.lease.insert().values(name=name, **values))

    await api.write(hold)
    healthy = (await api.call("", "GET", "/v1/health")).json()
    assert healthy["status"] == "ok"
    assert healthy["components"] == {
        "database": "ok",
        "engine": "ok",
        "gateway": "ok",
        "worker": "unknown",
        "redis": "unknown",
    }
    api.clock.turn(seconds=60)
    late = (await api.call("", "GET", "/v1/health")).json()
    assert late["components"]["engine"].startswith("not heard of since")


async def test_what_a_machine_needs_to_join_takes_no_token(api: Api) -> None:
    shown = (await api.call("", "GET", "/v1/join")).json()
    assert shown["ca_bundle_pem"].startswith("-----BEGIN CERTIFICATE-----")
    assert shown["join_addresses"] == ["192.0.2.1:8445"]
    assert (await api.call("", "GET", "/v1/version")).json()["api"] == "v1"


async def test_prometheus_finds_every_agent(api: Api) -> None:
    groups = (await api.call("fleet-viewer", "GET", "/v1/service-discovery/prometheus")).json()
    assert [group["targets"] for group in groups] == [["192.0.2.11:9107"], ["192.0.2.12:9107"]]
    assert groups[0]["labels"]["host"] == "node1"


async def test_the_documentation_needs_nothing_from_elsewhere(api: Api) -> None:
    page = (await api.call("", "GET", "/docs")).text
    assert "/v1/projects/{project}/vms/{name}:migrate" in page
    assert "operator on project" in page
    assert re.findall(r"(?:src|href)=\"?(?:https?:)?//", page) == []
    document = (await api.call("", "GET", "/v1/openapi.json")).json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("security") or "x-trimtab-role" not in operation, (method, path)
            assert "422" not in operation["responses"]
            assert "4XX" in operation["responses"]


def place(vm: dict[str, Any], api: Api) -> Decision:
    """Let the scheduler decide between one host with room and one without."""

    def host(name: str, memory_mib: int) -> HostSnapshot:
        return HostSnapshot(
            host_id=api.ids[name],
            name=name,
            vcpus_limit=8,
            memory_limit_mib=memory_mib,
            arch="x86_64",
            accelerator="kvm",
            usable_cpu_models=frozenset({"EPYC"}),
            machines=frozenset({"pc-q35-7.2"}),
            class_cpu_model="EPYC",
            class_machine="pc-q35-7.2",
        )

    fleet = FleetSnapshot.of([host("node1", 8192), host("node2", 0)], [])
    request = PlacementRequest(
        request_id="op", vm_id=vm["id"], vm_name=vm["name"], project_id="p", kind=PlacementKind.CREATE, vcpus=1, memory_mib=512
    )
    (decision,) = decide_all(fleet, [request])
    return decision


async def test_a_placement_is_explained_host_by_host(api: Api) -> None:
    vm = await api.make_vm("web1")
    path = "/v1/projects/p1/vms/web1:explain"
    early = await api.call("p1-viewer", "GET", path)
    assert early.json()["code"] == "decision-not-found"
    made = place(vm, api)
    await api.write(
        lambda session: placements.record_decision(
            session,
            decision_id=mint("dec"),
            vm_id=vm["id"],
            operation_id=vm["operation"]["id"],
            kind="create",
            chosen_host_id=api.ids["node1"],
            policy="best-fit",
            verdicts=made.as_json(),
            fleet_revision=41,
            now=api.clock.now(),
        )
    )
    shown = (await api.call("p1-viewer", "GET", path)).json()
    assert (shown["vm"], shown["host"], shown["policy"]) == ("web1", "node1", "best-fit")
    assert [(one["host"], one["fits"]) for one in shown["verdicts"]] == [("node1", True), ("node2", False)]
    assert "memory" in shown["verdicts"][1]["reasons"][0]["code"]
    assert "1 of 2 hosts fit" in shown["summary"]
    assert shown["fleet_revision"] == 41
    why = (await api.call("p1-viewer", "GET", path, params={"why_not": "node2"})).json()["why_not"]
    assert why.startswith("node2: ")
    assert "MiB" in why
    none = await api.call("p1-viewer", "GET", path, params={"why_not": "node9"})
    assert none.json()["code"] == "host-not-found"
    operation = (await api.call("p1-viewer", "GET", f"/v1/operations/{vm['operation']['id']}:explain")).json()
    assert (operation["placement"]["host"], operation["placement"]["fleet_revision"]) == ("node1", 41)
    assert operation["operation"]["kind"] == "vm.create"
