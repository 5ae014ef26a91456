"""Know before you act: a dry run says where a vm would go or why nowhere; every host can be asked about."""

from typing import Any

from tests.api.kit import GIB, Api
from trimtab_controller.clock import mint
from trimtab_controller.core.placement.engine import explain
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.store import claims, placements, schema, vms

VMS = "/v1/projects/p1/vms"
VM = {"name": "web1", "image": "debian", "memory_mib": 1024}


async def dry_run(api: Api, **fields: Any) -> Any:
    return await api.call("p1-operator", "POST", f"{VMS}?validate_only=true", json=VM | fields)


async def test_a_dry_run_tells_the_host_and_the_reason_and_claims_nothing(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    answer = await dry_run(api)
    assert answer.status_code == 200, answer.text
    assert answer.json()["would_be_placed_on"] == "node1"
    assert "2 of 2 hosts fit" in answer.json()["placement_summary"]
    for table in (schema.vm, schema.claim, schema.disk_claim, schema.decision, schema.placement_request):
        assert await api.rows(table) == []


async def test_a_dry_run_that_no_host_fits_gives_each_hosts_reason(api: Api) -> None:
    await api.equip("node1", memory_mib=2048)
    answer = await dry_run(api, memory_mib=4096)
    assert (answer.status_code, answer.json()["code"], answer.json()["kind"]) == (409, "no-host-fits", "no_capacity")
    node1, node2 = answer.json()["context"]["reasons"].splitlines()
    assert node1.startswith("node1: ")
    assert "MiB" in node1
    assert node2.startswith("node2: ")
    assert await api.rows(schema.vm) == []


async def test_a_dry_run_holds_to_the_host_that_was_named(api: Api) -> None:
    await api.equip()
    answer = await api.call("admin", "POST", f"{VMS}?validate_only=true", json=VM | {"to_host": "node2"})
    assert answer.json()["would_be_placed_on"] == "node2"
    await api.call("admin", "POST", "/v1/hosts/node2:cordon")
    refused = await api.call("admin", "POST", f"{VMS}?validate_only=true", json=VM | {"to_host": "node2"})
    assert refused.json()["code"] == "no-host-fits"
    assert "cordon" in refused.json()["detail"]


async def test_that_the_named_host_is_down_has_a_code_of_its_own(api: Api) -> None:
    await api.equip()
    (host, *_) = await api.rows(schema.host, name="node2")
    await api.write(
        lambda session: session.execute(schema.host.update().values(connectivity="lost").where(schema.host.c.id == host["id"]))
    )
    refused = await api.call("admin", "POST", f"{VMS}?validate_only=true", json=VM | {"to_host": "node2", "memory_mib": 1 << 20})
    assert refused.json()["code"] == "host-not-up"
    assert refused.json()["context"]["reasons"].startswith("node2: it is lost, not up; see `trimtab host get node2`")
    elsewhere = await api.call(
        "admin", "POST", f"{VMS}?validate_only=true", json=VM | {"to_host": "node1", "memory_mib": 1 << 20}
    )
    assert elsewhere.json()["code"] == "no-host-fits"


async def test_a_dry_run_refuses_where_no_machine_type_is_known_as_the_leader_would(api: Api) -> None:
    await api.equip()
    table = schema.host
    documents = await api.rows(table)
    bare = {**documents[0]["inventory"], "machines": []}
    await api.write(lambda session: session.execute(table.update().values(inventory=bare, inventory_digest="bare")))
    answer = await dry_run(api)
    assert answer.json()["code"] == "no-host-fits"


async def decide_without_hosts(api: Api, vm: Any) -> None:
    """Leave a decision that lists no host, as one of a large fleet lists only some."""
    request = PlacementRequest(
        request_id="op", vm_id=vm["id"], vm_name="web1", project_id="p", kind=PlacementKind.CREATE, vcpus=1, memory_mib=512
    )
    made = explain(FleetSnapshot.of([], []), request)
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
            now=api.clock.now(),
        )
    )


async def why_not(api: Api, host: str) -> str:
    answer = await api.call("p1-viewer", "GET", f"{VMS}/web1:explain", params={"why_not": host})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["why_not"])


async def test_any_host_can_be_asked_about_though_the_decision_does_not_list_it(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    vm = await api.make_vm("web1")
    await decide_without_hosts(api, vm)
    assert (await why_not(api, "node1")).startswith("node1: fits, score ")
    await api.call("admin", "POST", "/v1/hosts/node2:cordon")
    assert "cordon" in await why_not(api, "node2")


async def test_a_vm_is_not_in_its_own_way_on_its_own_host(api: Api) -> None:
    await api.equip(memory_mib=2048)
    vm = await api.make_vm("web1", memory_mib=1024)
    await decide_without_hosts(api, vm)

    def run_there(session: Any) -> None:
        claims.take(
            session,
            vm_id=vm["id"],
            host_id=api.ids["node1"],
            role="home",
            epoch=1,
            vcpus=1,
            memory_mib=1024,
            operation_id="",
            generation=None,
            now=api.clock.now(),
        )
        vms.update(session, vm["id"], host_id=api.ids["node1"], machine="pc-q35-7.2", cpu_model="qemu64")

    await api.write(run_there)
    assert (await why_not(api, "node1")).startswith("node1: fits, score ")
    assert (await why_not(api, "node2")).startswith("node2: fits, score ")


async def test_a_boot_disk_larger_than_any_pool_is_refused_before_anything_is_made(api: Api) -> None:
    await api.equip()
    answer = await dry_run(api, disk_bytes=4096 * GIB)
    assert answer.json()["code"] == "no-host-fits"
    assert "local" in answer.json()["context"]["reasons"]
