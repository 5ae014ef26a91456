"""What the API says while the database is behind the fleet: reads go on, whatever would change something is refused."""

from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.core.behind import Evidence, Witness
from trimtab_controller.services import behind as service
from trimtab_controller.store import schema

CHANGES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("admin", "POST", "/v1/hosts/node1:cordon", {}),
    ("fleet-operator", "POST", "/v1/failover:pause", {}),
    ("admin", "DELETE", "/v1/hosts/node1", {}),
    ("p1-operator", "POST", "/v1/projects/p1/vms", {"json": {"name": "web9", "image": "debian", "memory_mib": 512}}),
    ("p1-operator", "DELETE", "/v1/projects/p1/vms/web1", {}),
    ("p1-operator", "PATCH", "/v1/projects/p1/vms/web1", {"json": {"labels": {"a": "b"}}}),
    ("admin", "POST", "/v1/projects", {"json": {"name": "shop"}}),
]


async def fall_behind(api: Api) -> None:
    evidence = Evidence(host_id=api.ids["node1"], host_name="node1", witness=Witness.SESSION, seen=41, known=37)
    await api.write(lambda session: service.notice(session, [evidence], now=api.clock.now()))


async def rows(api: Api) -> dict[str, list[Any]]:
    """Return everything but the trail of who was refused."""
    return {one.name: await api.rows(one) for one in schema.metadata.sorted_tables if one.name not in {"audit", "token"}}


@pytest.mark.parametrize(("caller", "method", "path", "options"), CHANGES, ids=[path for _caller, _method, path, _ in CHANGES])
async def test_a_change_is_refused_with_the_sentence_that_says_what_to_do(
    api_on_each: Api, caller: str, method: str, path: str, options: dict[str, Any]
) -> None:
    api = api_on_each
    await api.make_vm("web1")
    await fall_behind(api)
    before = await rows(api)
    for query in ("", "?validate_only=true"):
        refused = await api.call(caller, method, path + query, **options)
        assert (refused.status_code, refused.json()["code"]) == (409, "database-behind"), refused.text
        assert "host node1 has session 41, the database 37" in refused.text
        assert "stop every controller and run `trimtab-controller recover`" in refused.text
    assert await rows(api) == before
    assert [one["cause"] for one in await api.rows(schema.audit) if one["outcome"] == "failed"] == ["database-behind"]


async def test_what_is_read_is_read_and_says_so(api: Api) -> None:
    await api.make_vm("web1")
    await fall_behind(api)
    for path in ("/v1/hosts", "/v1/projects/p1/vms/web1", "/v1/operations", "/v1/events"):
        assert (await api.call("admin", "GET", path)).status_code == 200
    status = (await api.call("fleet-viewer", "GET", "/v1/failover")).json()
    assert status["is_active"] is False
    assert status["database_behind"].startswith("this controller's database is older than the fleet (host node1 has session 41")
    assert status["database_behind_since"]
    kinds = [one["kind"] for one in (await api.call("admin", "GET", "/v1/events")).json()["items"]]
    assert "alarm.database-behind" in kinds
    found = (await api.call("admin", "GET", "/v1/doctor")).json()
    assert "database-behind" in {one["kind"] for one in found.get("items", found.get("findings", []))}


async def test_an_administrator_ends_it_by_his_word_which_is_in_the_trail(api_on_each: Api) -> None:
    api = api_on_each
    path, body = "/v1/failover:trust-database", {"reason": "the standby lost nothing but beats"}
    early = await api.call("admin", "POST", path, json=body)
    assert (early.status_code, early.json()["code"]) == (409, "database-not-behind")
    await fall_behind(api)
    assert (await api.call("fleet-operator", "POST", path, json=body)).status_code == 403
    assert (await api.call("admin", "POST", path, json={"reason": " "})).status_code == 400
    assert (await api.call("admin", "POST", path, json=body)).status_code == 204
    assert (await api.call("fleet-viewer", "GET", "/v1/failover")).json()["database_behind"] == ""
    assert (await api.call("fleet-operator", "POST", "/v1/failover:pause")).status_code == 204
    trail = [(one["verb"], one["outcome"]) for one in await api.rows(schema.audit)]
    assert ("database.trust", "accepted") in trail
    (told,) = await api.rows(schema.event, kind="database.trusted")
    assert "host node1 has session 41, the database 37" in told["message"]
