"""Moves of volumes, draining and the kinds of pools over HTTP: what is accepted, what is refused by which name, what is shown."""

from typing import Any

import pytest

from tests.api.kit import Api
from tests.api.test_snapshots import kept_vm
from trimtab_controller.store import schema

VOLUMES = "/v1/projects/p1/volumes"


async def add_pool(api: Api, name: str, *, available_bytes: int = 1 << 40) -> str:
    """Put a local pool beside the one that there is, ready on every host."""
    (known,) = [one for one in await api.rows(schema.pool) if not one["is_shared"]]
    pool_id = f"pool-{name}"

    def work(session: Any) -> None:
        session.execute(
            schema.pool.insert().values(
                id=pool_id,
                name=name,
                kind="dir",
                path=f"/srv/{name}",
                is_shared=False,
                settings={},
                created_at=known["created_at"],
            )
        )
        for host in session.execute(schema.host.select()).all():
            session.execute(schema.pool_host.insert().values(pool_id=pool_id, host_id=host.id, state="ready"))
            session.execute(
                schema.pool_space.insert().values(
                    pool_id=pool_id,
                    host_id=host.id,
                    capacity_bytes=1 << 40,
                    available_bytes=available_bytes,
                    observed_at=known["created_at"],
                )
            )

    await api.write(work)
    return pool_id


async def test_a_move_claims_the_new_pool_and_shows_where_the_volume_goes(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    vm = await kept_vm(api)
    pool_id = await add_pool(api, "fast")
    name = vm["volumes"][0]["name"]
    answer = await api.call("p1-operator", "POST", f"{VOLUMES}/{name}:move", json={"to_pool": "fast", "bandwidth_mib_s": 20})
    assert (answer.status_code, answer.json()["operation"]["kind"]) == (202, "volume.move"), answer.text
    (claim,) = [one for one in await api.rows(schema.disk_claim) if one["pool_id"] == pool_id]
    assert claim["volume_id"] == vm["volumes"][0]["id"]
    shown = (await api.call("p1-viewer", "GET", f"{VOLUMES}/{name}")).json()
    assert (shown["moving_to"], shown["leaving"]) == ("fast", "")
    (pool,) = (await api.call("admin", "GET", "/v1/pools/fast")).json()["vms"]
    assert pool["name"] == "web1", "a pool that a volume goes to names its vm"
    refused = await api.call("admin", "DELETE", "/v1/pools/fast")
    assert (refused.status_code, refused.json()["code"]) == (409, "pool-not-empty")


async def test_a_move_that_cannot_be_is_refused_by_name(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    vm = await kept_vm(api)
    await add_pool(api, "full", available_bytes=0)
    volume = vm["volumes"][0]
    for to_pool, status, code in (
        ("full", 409, "pool-full"),
        (volume["pool"], 400, "pool-same"),
        ("none", 404, "pool-not-found"),
    ):
        answer = await api.call("p1-operator", "POST", f"{VOLUMES}/{volume['name']}:move", json={"to_pool": to_pool})
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    (row,) = await api.rows(schema.volume)
    assert row["move_state"] == "", "nothing was changed"


async def test_a_pool_is_drained_by_a_plan_that_is_reviewed_first(api_on_each: Api) -> None:
    api = api_on_each
    await api.equip()
    vm = await kept_vm(api)
    await add_pool(api, "fast")
    own = vm["volumes"][0]["pool"]
    made = await api.call("admin", "POST", "/v1/plans", json={"kind": "drain-pool", "pool": own})
    assert made.status_code == 201, made.text
    plan = made.json()
    (step,) = plan["steps"]
    assert (step["kind"], step["volume"], step["pool"]) == ("move-volume", vm["volumes"][0]["name"], own)
    assert plan["summary"].startswith(f"drain pool {own}: 1 volume")
    without = await api.call("admin", "POST", "/v1/plans", json={"kind": "drain-pool"})
    assert (without.status_code, without.json()["code"]) == (400, "pool-field")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"kind": "nfs", "path": "/vms"}, "server-missing"),
        ({"kind": "dir", "path": "/srv/x", "server": "nas"}, "server-not-taken"),
        ({"kind": "nfs", "path": "/vms", "server": "nas,exec"}, "request-invalid"),
        ({"kind": "nfs", "path": "/vms", "server": "nas", "nfs_version": "2"}, "request-invalid"),
        ({"kind": "dir", "path": "/srv/x", "reserve_permille": 950}, "request-invalid"),
    ],
)
async def test_a_pool_that_says_too_little_or_too_much_is_refused(api_on_each: Api, body: dict[str, Any], code: str) -> None:
    answer = await api_on_each.call("admin", "POST", "/v1/pools", json={"name": "share", **body})
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text


async def test_an_export_is_one_pool_mounted_where_the_agents_mount(api_on_each: Api) -> None:
    body = {"name": "share", "kind": "nfs", "server": "nas", "path": "/vms", "is_soft": True, "reserve_permille": 100}
    made = await api_on_each.call("admin", "POST", "/v1/pools", json=body)
    assert made.status_code == 202, made.text
    pool = made.json()["pool"]
    assert (pool["source"], pool["is_shared"], pool["reserve_permille"]) == ("nas:/vms", True, 100)
    assert pool["path"] == f"/srv/trimtab-mounts/{pool['id']}"
    again = await api_on_each.call("admin", "POST", "/v1/pools", json={**body, "name": "second"})
    assert (again.status_code, again.json()["code"]) == (409, "pool-path-taken")
