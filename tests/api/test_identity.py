"""Users, roles and tokens."""

from typing import Any

import pytest

from tests.api.kit import Api
from trimtab_controller.services.authorise import secret_hash
from trimtab_controller.store import schema


async def whoami(api: Api, secret: str) -> Any:
    return await api.call("", "GET", "/v1/whoami", headers={"Authorization": f"Bearer {secret}"})


async def test_a_secret_is_shown_once_and_stored_hashed(api: Api) -> None:
    headers = {"Idempotency-Key": "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"}
    made = await api.call("nobody", "POST", "/v1/users/nobody/tokens", json={"name": "ci"}, headers=headers)
    assert made.status_code == 201, made.text
    secret, token = made.json()["secret"], made.json()["token"]
    assert secret.startswith(f"tt-{token['id'].removeprefix('tok-')}.")
    assert (await whoami(api, secret)).json()["token"]["id"] == token["id"]
    (row,) = await api.rows(schema.token, id=token["id"])
    assert row["secret_sha256"] == secret_hash(secret.partition(".")[2])
    again = await api.call("nobody", "POST", "/v1/users/nobody/tokens", json={"name": "ci"}, headers=headers)
    assert (again.json()["token"]["id"], again.json()["secret"]) == (token["id"], "")
    for table in (schema.idempotency, schema.audit, schema.event):
        assert secret.partition(".")[2] not in str(await api.rows(table))
    listed = await api.call("nobody", "GET", "/v1/users/nobody/tokens")
    assert "secret" not in listed.text


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer x", "Basic YTpi", "Bearer tt-.", "Bearer tt-x.y", "Bearer tt-" + "0" * 26 + ".y"],
)
async def test_what_is_no_token_is_refused_alike(api: Api, authorization: str) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    answer = await api.call("", "GET", "/v1/whoami", headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_known_id_with_another_secret_is_refused_as_an_unknown_one(api: Api) -> None:
    identifier = api.secrets["nobody"].partition(".")[0]
    answer = await whoami(api, f"{identifier}.wrong")
    assert (answer.status_code, answer.json()["code"]) == (401, "token-unknown")


async def test_expired_revoked_and_deleted_end_a_token_at_once(api: Api) -> None:
    secret = api.secrets["nobody"]
    made = (await api.call("nobody", "POST", "/v1/users/nobody/tokens", json={"expires_in_days": 60})).json()
    api.clock.turn(days=31)
    expired = await whoami(api, secret)
    assert expired.json()["code"] == "token-expired"
    assert (await whoami(api, made["secret"])).status_code == 200
    await api.call("admin", "DELETE", f"/v1/users/nobody/tokens/{made['token']['id']}")
    assert (await whoami(api, made["secret"])).json()["code"] == "token-revoked"
    other = (await api.call("admin", "POST", "/v1/users/nobody/tokens", json={})).json()
    assert (await api.call("admin", "DELETE", "/v1/users/nobody")).status_code == 204
    assert (await whoami(api, other["secret"])).json()["code"] == "token-unknown"


async def test_the_last_use_is_noted_at_most_once_a_minute(api: Api) -> None:
    async def last_used() -> Any:
        (token,) = (await api.call("admin", "GET", "/v1/users/nobody/tokens")).json()["items"]
        return token["last_used_at"]

    assert await last_used() is None
    await whoami(api, api.secrets["nobody"])
    noted: Any = None
    for _ in range(200):  # it is written beside the request
        noted = await last_used()
        if noted is not None:
            break
    assert noted is not None
    api.clock.turn(seconds=30)
    await whoami(api, api.secrets["nobody"])
    assert await last_used() == noted
    api.clock.turn(seconds=31)
    await whoami(api, api.secrets["nobody"])
    later = noted
    for _ in range(200):
        later = await last_used()
        if later != noted:
            break
    assert later > noted


async def test_a_role_counts_from_the_next_request_on(api: Api) -> None:
    path = "/v1/projects/p1/vms"
    assert (await api.call("nobody", "GET", path)).status_code == 404
    await api.call("admin", "PUT", "/v1/users/nobody/roles/p1", json={"role": "viewer"})
    assert (await api.call("nobody", "GET", path)).status_code == 200
    taken = await api.call("admin", "DELETE", "/v1/users/nobody/roles/p1")
    assert taken.json()["roles"] == {}
    assert (await api.call("nobody", "GET", path)).status_code == 404
    missing = await api.call("admin", "DELETE", "/v1/users/nobody/roles/p1")
    assert missing.json()["code"] == "role-not-found"


async def test_the_last_administrator_stays(api: Api) -> None:
    for method, path, body in (
        ("DELETE", "/v1/users/admin", None),
        ("DELETE", "/v1/users/admin/roles/*", None),
        ("PUT", "/v1/users/admin/roles/*", {"role": "viewer"}),
    ):
        answer = await api.call("admin", method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "last-administrator"), path
    await api.call("admin", "PUT", "/v1/users/nobody/roles/*", json={"role": "admin"})
    assert (await api.call("admin", "DELETE", "/v1/users/admin/roles/*")).status_code == 200


async def test_users_and_service_accounts(api: Api) -> None:
    made = await api.call("admin", "POST", "/v1/users", json={"name": "ci", "kind": "service"})
    assert (made.status_code, made.json()["kind"]) == (201, "service")
    taken = await api.call("admin", "POST", "/v1/users", json={"name": "ci"})
    assert taken.json()["code"] == "user-exists"
    services = await api.call("admin", "GET", "/v1/users", params={"filter": "kind=service"})
    assert [one["name"] for one in services.json()["items"]] == ["ci"]
    me = (await api.call("p1-operator", "GET", "/v1/whoami")).json()
    assert me["user"]["roles"] == {"p1": "operator"}


async def test_a_project_with_contents_is_not_deleted(api: Api) -> None:
    await api.make_vm("web1")
    full = await api.call("admin", "DELETE", "/v1/projects/p1")
    assert (full.status_code, full.json()["code"]) == (409, "project-not-empty")
    assert "vms web1" in full.json()["detail"]
    await api.call("admin", "POST", "/v1/projects", json={"name": "p3", "quotas": {"vms": 5}})
    shown = (await api.call("admin", "GET", "/v1/projects/p3")).json()
    assert shown["quotas"]["vms"] == {"quota": 5, "used": 0}
    assert shown["quotas"]["vcpus"] == {"quota": None, "used": 0}
    assert (await api.call("admin", "DELETE", "/v1/projects/p3")).status_code == 204
    assert (await api.call("admin", "GET", "/v1/projects/p3")).status_code == 404
    assert (await api.call("admin", "POST", "/v1/projects", json={"name": "p3"})).status_code == 201
