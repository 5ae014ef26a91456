"""Every route × every kind of caller × own and other project: generated from the routes, so that none is forgotten."""

from dataclasses import dataclass

import pytest
from fastapi import APIRouter, WebSocket
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.responses import Response

from tests.api.kit import Api
from trimtab_controller.api.security import Requires, check_declarations, declaration_of
from trimtab_controller.core.model import Role
from trimtab_controller.services.authorise import Scope


@dataclass(frozen=True)
class Caller:
    name: str
    # Role by project name; '' is the fleet.
    roles: dict[str, Role]


CALLERS = (
    Caller("", {}),
    Caller("nobody", {}),
    *(Caller(f"{project}-{role.value}", {project: role}) for project in ("p1", "p2") for role in Role),
    Caller("fleet-viewer", {"": Role.VIEWER}),
    Caller("fleet-operator", {"": Role.OPERATOR}),
    Caller("admin", {"": Role.ADMIN}),
)


def routes_of(api: Api) -> list[tuple[APIRoute, str, Requires]]:
    found = []
    for route in api.app.routes:
        if isinstance(route, APIWebSocketRoute):
            continue  # opened by the secret of one session: see test_consoles.py, which asks every caller for it
        assert isinstance(route, APIRoute)
        declared = declaration_of(route)
        assert declared is not None
        found += [(route, method, declared) for method in sorted(route.methods or ())]
    return found


def expected(caller: Caller, declared: Requires, project: str) -> set[str]:
    """Return which outcomes are right: `401`, `403`, `hidden` (404 of the project or operation) or `allowed`."""
    if declared.scope is Scope.PUBLIC:
        return {"allowed"}
    if not caller.name:
        return {"401"}
    if declared.scope is Scope.SELF:
        return {"allowed"}
    held = [role for place, role in caller.roles.items() if place == ""]
    if declared.scope in {Scope.PROJECT, Scope.GRANT, Scope.OBJECT}:
        held += [role for place, role in caller.roles.items() if place == project]
        if not held:
            return {"hidden"}
    if declared.scope is Scope.USER:  # the matrix asks about another user
        return {"allowed"} if caller.name == "admin" else {"403"}
    return {"allowed"} if any(role.includes(declared.role) for role in held) else {"403"}


def outcome(answer: Response) -> str:
    if answer.status_code in {401, 403}:
        return str(answer.status_code)
    if answer.status_code == 404 and answer.json()["code"] in {"project-not-found", "operation-not-found"}:  # type: ignore[attr-defined]
        return "hidden"
    return "allowed" if answer.status_code < 500 else f"defect {answer.status_code}"


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name or "no-token")
async def test_matrix(api: Api, caller: Caller) -> None:
    operations = {"p1": (await api.make_vm("web1"))["operation"]["id"]}
    operations["p2"] = (await api.make_vm("web2", caller="p2-operator"))["operation"]["id"]
    wrong = []
    async with api.as_(caller.name) as client:
        for route, method, declared in routes_of(api):
            in_project = declared.scope in {Scope.PROJECT, Scope.GRANT, Scope.OBJECT}
            for project in ("p1", "p2") if in_project else ("p1",):
                path = route.path_format.format(
                    project=project,
                    name="absent",
                    snapshot="absent",
                    template="absent",
                    plan="plan-00000000000000000000000000",
                    failover="fo-00000000000000000000000000",
                    user="fleet-viewer" if caller.name != "fleet-viewer" else "nobody",
                    token="tok-00000000000000000000000000",
                    operation=operations[project],
                ).replace("/host-tokens/tok-", "/host-tokens/join-")
                answer = await client.request(method, path, params={"timeout_s": 0})  # for `:wait`; others ignore it
                seen = outcome(answer)  # type: ignore[arg-type]
                # Changing a project takes the fleet's administrator, who sees every project.
                if seen not in expected(caller, declared, project):
                    wrong.append((method, path, seen, expected(caller, declared, project), answer.text[:200]))
    assert wrong == []


async def test_a_role_on_the_fleet_is_given_only_by_its_administrator(api: Api) -> None:
    for caller in ("p1-admin", "fleet-operator"):
        answer = await api.call(caller, "PUT", "/v1/users/nobody/roles/*", json={"role": "viewer"})
        assert (answer.status_code, answer.json()["code"]) == (403, "role-missing"), caller
    granted = await api.call("p1-admin", "PUT", "/v1/users/nobody/roles/p1", json={"role": "viewer"})
    assert granted.json()["roles"] == {"p1": "viewer"}
    elsewhere = await api.call("p1-admin", "PUT", "/v1/users/nobody/roles/p2", json={"role": "viewer"})
    assert elsewhere.json()["code"] == "project-not-found"


async def test_a_star_is_no_project(api: Api) -> None:
    answer = await api.call("admin", "GET", "/v1/projects/*/vms")
    assert answer.status_code in {400, 404}


async def test_users_reach_their_own_tokens_and_nobody_elses(api: Api) -> None:
    own = await api.call("nobody", "GET", "/v1/users/nobody/tokens")
    assert own.status_code == 200
    other = await api.call("nobody", "GET", "/v1/users/admin/tokens")
    assert other.status_code == 403


async def test_lists_show_only_what_the_caller_may_see(api: Api) -> None:
    await api.make_vm("web1")
    await api.make_vm("web2", caller="p2-operator")
    seen = await api.call("p2-viewer", "GET", "/v1/operations")
    assert [one["subject"]["name"] for one in seen.json()["items"]] == ["web2"]
    everything = await api.call("fleet-viewer", "GET", "/v1/operations")
    assert {one["subject"]["name"] for one in everything.json()["items"]} == {"web1", "web2"}
    assert (await api.call("nobody", "GET", "/v1/operations")).json()["items"] == []
    assert (await api.call("nobody", "GET", "/v1/events")).json()["items"] == []
    mine = await api.call("p2-viewer", "GET", "/v1/projects")
    assert [one["name"] for one in mine.json()["items"]] == ["p2"]
    found = await api.call("p1-viewer", "GET", "/v1/events", params={"subject": "web2"})
    assert found.status_code == 404


async def test_by_id_another_tenants_objects_are_not_found(api: Api) -> None:
    vm = await api.make_vm("web2", caller="p2-operator")
    by_id = await api.call("p1-admin", "GET", f"/v1/projects/p1/vms/{vm['id']}")
    assert (by_id.status_code, by_id.json()["code"]) == (404, "vm-not-found")
    image = await api.call("p1-admin", "GET", f"/v1/projects/p1/images/{api.ids['p2-image']}")
    assert image.status_code == 404


async def test_shared_things_are_removed_only_by_the_fleets_administrator(api: Api) -> None:
    for path in ("images/debian", "networks/default"):
        answer = await api.call("p1-admin", "DELETE", f"/v1/projects/p1/{path}")
        assert (answer.status_code, answer.json()["code"]) == (403, "role-missing"), path


def test_a_route_without_a_declaration_stops_the_application() -> None:
    router = APIRouter()

    @router.get("/v1/forgotten")
    async def forgotten() -> Response:
        return Response()

    with pytest.raises(TypeError, match=r"/v1/forgotten.*declares no"):
        check_declarations(list(router.routes))


def test_a_websocket_without_a_declaration_of_its_own_stops_the_application() -> None:
    router = APIRouter()

    @router.websocket("/v1/forgotten")
    async def forgotten(socket: WebSocket) -> None:
        await socket.accept()

    with pytest.raises(TypeError, match=r"/v1/forgotten.*declares no"):
        check_declarations(list(router.routes))
