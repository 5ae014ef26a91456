"""Declares and enforces who may call a route. A route without a declaration stops the application from starting."""

from dataclasses import dataclass

from fastapi import Depends, Request, WebSocket
from fastapi.params import Depends as DependsMarker
from fastapi.routing import APIRoute, APIWebSocketRoute
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute

from trimtab_controller.api.paths import GrantPath, ProjectPath
from trimtab_controller.api.runtime import READ_COST, Runtime
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import authorise as policy
from trimtab_controller.services.authorise import ANONYMOUS, Access, PathSubjects, Scope, Unauthenticated
from trimtab_controller.services.mutations import Mutation, record
from trimtab_protos.errors import ErrorKind, TrimtabError

READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Requires:
    """The declaration of one route; calling it authenticates, authorises, and writes denials to the trail."""

    role: Role
    scope: Scope

    async def __call__(self, request: Request) -> Access:
        runtime: Runtime = request.app.state.runtime
        if self.scope is Scope.PUBLIC:
            return Access(actor=ANONYMOUS)
        access = await self.enter(request, runtime)
        runtime.user_rate.take(access.actor.user_id, cost=READ_COST if request.method in READ_METHODS else 1.0)
        if access.is_use_to_be_noted:
            runtime.note_token_use(access.token_id)
        return access

    async def enter(self, request: Request, runtime: Runtime) -> Access:
        """Return the access, or raise after the denial is on record. Also asked again by long streams."""
        context, address = runtime.context, client_address(request)
        authorization = request.headers.get("authorization", "")
        path = PathSubjects(project=request.path_params.get("project", ""), user=request.path_params.get("user", ""))
        actors: list[Actor] = []
        try:

            def work(session: Session) -> Access:
                access = policy.authenticate(session, authorization, request_id=request.state.request_id, now=context.clock.now())
                actors.append(access.actor)
                return policy.authorise(session, access, role=self.role, scope=self.scope, path=path)

            return await context.db.read(work)
        except TrimtabError as error:
            if isinstance(error, Unauthenticated):
                # Only failures count and only they are slowed: whoever shares the address and has a token is not locked out.
                runtime.login_rate.take(address)
            if error.kind is not ErrorKind.UNAVAILABLE:
                await _record_denial(runtime, request, actors[-1] if actors else ANONYMOUS, error)
            raise


class RequiresInProject(Requires):
    """As Requires, and documents the project in the path, which routes themselves never read."""

    async def __call__(self, request: Request, project: ProjectPath) -> Access:  # type: ignore[override]
        del project
        return await super().__call__(request)


class RequiresGrant(Requires):
    """As RequiresInProject, with `*` for the fleet."""

    async def __call__(self, request: Request, project: GrantPath) -> Access:  # type: ignore[override]
        del project
        return await super().__call__(request)


class RequiresConsoleToken(Requires):
    """The declaration of a websocket: the endpoint itself uses the session's secret up, since a refusal of a socket is its own thing."""

    async def __call__(self, websocket: WebSocket) -> Access:  # type: ignore[override]
        del websocket
        return Access(actor=ANONYMOUS)


def requires(role: Role, scope: Scope) -> DependsMarker:
    """Declare a route's right: `access: Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]`."""
    kinds: dict[Scope, type[Requires]] = {
        Scope.PROJECT: RequiresInProject,
        Scope.GRANT: RequiresGrant,
        Scope.CONSOLE: RequiresConsoleToken,
    }
    declared = kinds.get(scope, Requires)
    marker = Depends(declared(role, scope))
    assert isinstance(marker, DependsMarker)
    return marker


def declaration_of(route: APIRoute | APIWebSocketRoute) -> Requires | None:
    """Return what the route declared; None where it declared nothing, or more than once."""
    found = [one.call for one in route.dependant.dependencies if isinstance(one.call, Requires)]
    return found[0] if len(found) == 1 and isinstance(found[0], Requires) else None


def check_declarations(routes: list[BaseRoute]) -> None:
    """Refuse to serve a route that nobody thought about."""
    for route in routes:
        declared = declaration_of(route) if isinstance(route, (APIRoute, APIWebSocketRoute)) else None
        # Only a websocket is opened by a console's secret, and by nothing else.
        if declared is None or isinstance(route, APIWebSocketRoute) != (declared.scope is Scope.CONSOLE):
            raise TypeError(f"route {getattr(route, 'path', route)!r} declares no `requires(role, scope)`")


def client_address(request: HTTPConnection) -> str:
    return request.client.host if request.client else ""


async def _record_denial(runtime: Runtime, request: Request, actor: Actor, error: TrimtabError) -> None:
    """Append to the trail, without an fsync: a flood of denials must not become a flood of them."""
    context = runtime.context
    denial = Mutation(
        actor=Actor(name=actor.name, user_id=actor.user_id, request_id=request.state.request_id),
        verb=request.method.lower(),
        resource=resource_of(request),
        project_id="",
        fingerprint="",
        is_dry_run=False,
        now=context.clock.now(),
    )
    await context.db.write(lambda session: record(session, denial, outcome="denied", error=error), durable=False)


def resource_of(request: Request) -> str:
    """Return the path as the trail shows it, without the version and without characters that a terminal would obey."""
    path = request.url.path.removeprefix("/v1/")
    return "".join(character if character.isprintable() else "?" for character in path)[:200]
