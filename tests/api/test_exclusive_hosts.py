"""Hosts kept for one project, and what a class accepts: from the API to where a dry run would place a vm."""

from typing import Any

from tests.api.kit import Api

VM: dict[str, Any] = {"name": "web1", "image": "debian", "memory_mib": 512}


async def place(api: Api, project: str, **fields: Any) -> Any:
    return await api.call(f"{project}-operator", "POST", f"/v1/projects/{project}/vms?validate_only=true", json=VM | fields)


async def test_only_its_projects_vms_are_placed_on_an_exclusive_host(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    kept = await api.call("admin", "PATCH", "/v1/hosts/node1", json={"exclusive_project": "p2"})
    assert (kept.status_code, kept.json()["exclusive_project"]) == (200, "p2")
    assert (await place(api, "p1")).json()["would_be_placed_on"] == "node2"
    assert (await place(api, "p2")).json()["would_be_placed_on"] == "node1"
    await api.call("admin", "PATCH", "/v1/hosts/node2", json={"exclusive_project": "p2"})
    refused = await place(api, "p1")
    assert refused.json()["code"] == "no-host-fits"
    assert "it is kept for another project's vms" in refused.json()["context"]["reasons"]
    assert "p2" not in refused.text, "whose it is, is not the asking project's business"
    await api.call("admin", "PATCH", "/v1/hosts/node2", json={"exclusive_project": ""})
    assert (await place(api, "p1")).json()["would_be_placed_on"] == "node2"
    unknown = await api.call("admin", "PATCH", "/v1/hosts/node2", json={"exclusive_project": "p9"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "project-not-found")
    denied = await api.call("fleet-operator", "PATCH", "/v1/hosts/node2", json={"exclusive_project": "p1"})
    assert denied.status_code == 403


async def test_a_dry_run_of_what_fits_nowhere_says_the_smallest_change_that_would_fit(api: Api) -> None:
    await api.equip("node1", memory_mib=4096)
    refused = await place(api, "p1", memory_mib=8192)
    assert (refused.status_code, refused.json()["code"]) == (409, "no-host-fits")
    detail = refused.json()["detail"]
    assert "But it would fit on node1 with " in detail
    smaller = int(detail.split("it would fit on node1 with ")[1].split(" MiB")[0])
    assert (await place(api, "p1", memory_mib=smaller)).json()["would_be_placed_on"] == "node1"
    assert (await place(api, "p1", memory_mib=smaller + 1024)).status_code == 409


async def test_a_dry_run_is_refused_where_the_loss_of_a_host_could_not_be_survived(api: Api) -> None:
    await api.equip()
    changed = await api.call("admin", "PATCH", "/v1/host-classes/default", json={"admission": "one-host-loss"})
    assert changed.json()["admission"] == "one-host-loss", changed.text
    # The only pool is local to each host: its disk is lost with it.
    refused = await place(api, "p1", ha="restart")
    assert (refused.status_code, refused.json()["code"], refused.json()["kind"]) == (409, "admission-refused", "no_capacity")
    assert "could not be restarted if host node1 were lost" in refused.json()["detail"]
    assert (await place(api, "p1", ha="none")).status_code == 200
