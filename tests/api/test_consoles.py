"""Consoles: who gets a token, what it opens, and everything that ends a session, each with its word."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIWebSocketRoute

from tests.api.kit import Api, running_api
from tests.api.test_access import CALLERS, Caller
from tests.api.websocket_kit import Viewer
from trimtab_controller.api.security import declaration_of
from trimtab_controller.core.model import Role
from trimtab_controller.services.authorise import Scope
from trimtab_controller.store import schema
from trimtab_protos.errors import Conflict

VM = "/v1/projects/p1/vms/web1"


async def run_vm(api: Api) -> str:
    """Let web1 run on node1; return its id."""
    vm = await api.make_vm("web1")
    await api.end_operations()
    await api.set_vm(vm["id"], host_id=api.ids["node1"], observed_state="running", epoch=3)
    return str(vm["id"])


async def ticket(api: Api, caller: str = "p1-operator", **body: Any) -> dict[str, Any]:
    answer = await api.call(caller, "POST", f"{VM}:console", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def viewer(api: Api, made: dict[str, Any], **headers: str) -> Viewer:
    return Viewer(api.app, made["path"], made["subprotocol"], made["token"], **headers)


async def refusal(api: Api, made: dict[str, Any], **headers: str) -> tuple[int, str]:
    async with viewer(api, made, **headers) as refused:
        return refused.status, refused.refused.get("code", "")


async def trail(api: Api) -> list[tuple[str, str, str, str, str]]:
    rows = sorted(await api.rows(schema.audit), key=lambda row: row["seq"])
    return [(row["actor"], row["verb"], row["resource"], row["outcome"], row["cause"]) for row in rows]


@pytest.fixture
async def quick(sqlite_url: str, tmp_path: Path) -> Any:
    """An API whose sessions are looked at often, and soon idle."""
    async with running_api(sqlite_url, tmp_path, console_check_s=0.02, console_idle_s=0.3) as api:
        yield api


async def test_a_token_opens_one_session_and_both_its_ends_are_on_the_trail(api_on_each: Api) -> None:
    api = api_on_each
    vm_id = await run_vm(api)
    made = await ticket(api, kind="vnc")
    async with viewer(api, made) as seated:
        assert seated.accepted == "trimtab-console"
        await seated.type(b"hello")
        assert await seated.heard() == b"heard hello"
    assert api.desk.opened == [(api.ids["node1"], vm_id, "vnc")]
    assert api.desk.lines[0].is_closed
    assert await refusal(api, made) == (401, "console-token-used")
    assert (await trail(api))[-4:] == [
        ("p1-operator", "vm.console", "projects/p1/vms/web1:console", "accepted", ""),
        ("p1-operator", "console.open", "projects/p1/vms/web1", "accepted", ""),
        ("p1-operator", "console.close", "projects/p1/vms/web1", "accepted", ""),
        ("anonymous", "console.open", "consoles", "denied", "console-token-used"),
    ]
    row = (await api.rows(schema.console))[0]
    assert (row["cause"], row["closed_at"] is not None) == ("left", True)
    assert made["token"].partition(".")[2] not in str(row), "the secret is kept as its hash"


def test_every_websocket_is_opened_by_a_secret_that_an_operator_was_given(api_routes: list[APIWebSocketRoute]) -> None:
    declared = [declaration_of(route) for route in api_routes]
    assert [(one.role, one.scope) for one in declared if one is not None] == [(Role.OPERATOR, Scope.CONSOLE)] * len(api_routes)


@pytest.fixture
def api_routes(api: Api) -> list[APIWebSocketRoute]:
    found = [route for route in api.app.routes if isinstance(route, APIWebSocketRoute)]
    assert [route.path for route in found] == ["/v1/consoles"]
    return found


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name or "no-token")
async def test_only_an_operator_of_the_vms_project_sits_at_its_console(api: Api, caller: Caller) -> None:
    await run_vm(api)
    may = any(place in {"", "p1"} and role.includes(Role.OPERATOR) for place, role in caller.roles.items())
    answer = await api.call(caller.name, "POST", f"{VM}:console")
    assert (answer.status_code == 201) == may, answer.text
    # Whoever got none tries with the token that they have.
    token = answer.json()["token"] if may else api.secrets.get(caller.name, "")
    async with Viewer(api.app, "/v1/consoles", "trimtab-console", token) as seated:
        assert (seated.accepted == "trimtab-console") == may
    assert len(api.desk.opened) == int(may)


async def test_a_token_that_is_old_foreign_or_made_up_opens_nothing(api: Api) -> None:
    await run_vm(api)
    made = await ticket(api)
    assert await refusal(api, {**made, "token": made["token"][:-1] + "?"}) == (401, "console-token-unknown")
    assert await refusal(api, {**made, "token": "con-00000000000000000000000000.x"}) == (401, "console-token-unknown")
    assert await refusal(api, {**made, "token": ""}) == (401, "console-token-unknown")
    assert await refusal(api, made, origin="https://evil.example") == (403, "origin-refused")
    api.clock.turn(seconds=61)
    assert await refusal(api, made) == (401, "console-token-expired")
    assert api.desk.opened == []
    same = await ticket(api)
    async with viewer(api, same, origin="https://trimtab.test") as seated:
        assert seated.accepted


async def test_a_token_dies_with_the_place_of_its_vm(api: Api) -> None:
    vm_id = await run_vm(api)
    moved = await ticket(api)
    await api.set_vm(vm_id, host_id=api.ids["node2"], epoch=4)
    assert await refusal(api, moved) == (409, "vm-moved")
    again = await ticket(api)
    await api.set_vm(vm_id, epoch=5)
    assert await refusal(api, again) == (409, "vm-moved")
    await api.set_vm(vm_id, host_id="", observed_state="stopped")
    stopped = await api.call("p1-operator", "POST", f"{VM}:console")
    assert (stopped.status_code, stopped.json()["code"]) == (409, "vm-not-running")
    assert "trimtab vm start web1" in stopped.json()["detail"]
    assert api.desk.opened == []


async def test_what_the_host_refuses_is_told_before_the_session_begins(api: Api) -> None:
    await run_vm(api)
    api.desk.refusal = Conflict("console-busy", "somebody sits there")
    assert await refusal(api, await ticket(api)) == (409, "console-busy")
    assert (await trail(api))[-1][1] == "console.close"


async def test_a_repeat_of_the_request_shows_no_secret(api: Api) -> None:
    await run_vm(api)
    headers = {"Idempotency-Key": "5f2b6d0c-9a54-4b7f-a6a1-2f7c2d6a1e01"}
    first = await api.call("p1-operator", "POST", f"{VM}:console", headers=headers)
    again = await api.call("p1-operator", "POST", f"{VM}:console", headers=headers)
    assert first.json()["token"]
    assert again.json() == {**first.json(), "token": ""}


async def _revoke(api: Api, _vm_id: str) -> None:
    table = schema.token
    await api.write(lambda session: session.execute(table.update().values(revoked_at=api.clock.now())))


async def _take_role(api: Api, _vm_id: str) -> None:
    answer = await api.call("admin", "PUT", "/v1/users/p1-operator/roles/p1", json={"role": "viewer"})
    assert answer.status_code == 200, answer.text


async def _delete_user(api: Api, _vm_id: str) -> None:
    assert (await api.call("admin", "DELETE", "/v1/users/p1-operator")).status_code == 204


async def _delete_vm(api: Api, vm_id: str) -> None:
    await api.set_vm(vm_id, deleted_at=api.clock.now())


async def _move(api: Api, vm_id: str) -> None:
    await api.set_vm(vm_id, host_id=api.ids["node2"])


async def _stop(api: Api, vm_id: str) -> None:
    await api.set_vm(vm_id, desired_power="stopped", observed_state="stopped")
    api.desk.lines[-1].end()


async def _nothing(_api: Api, _vm_id: str) -> None:
    """The viewer types nothing for as long as one may."""


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_revoke, "token-ended: "),
        (_take_role, "role-missing: "),
        (_delete_user, "user-gone: "),
        (_delete_vm, "vm-deleted: vm web1 was deleted"),
        (_move, "vm-moved: vm web1 has moved"),
        (_stop, "vm-stopped: vm web1 was stopped"),
        (_nothing, "idle: "),
    ],
)
async def test_a_session_ends_with_a_clear_word(quick: Api, change: Any, word: str) -> None:
    vm_id = await run_vm(quick)
    async with viewer(quick, await ticket(quick)) as seated:
        await seated.type(b"x")
        assert await seated.heard() == b"heard x"
        await change(quick, vm_id)
        assert await seated.heard() == b""
    code, reason = seated.closed
    assert (code, reason.startswith(word)) == (4000, True), reason
    assert quick.desk.lines[0].is_closed
    assert (await quick.rows(schema.console))[0]["cause"] == word.partition(":")[0]
