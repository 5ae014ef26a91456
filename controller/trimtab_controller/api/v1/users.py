"""Users, service accounts, their roles and tokens."""

from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Name
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import UserPath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.identity import (
    NewTokenResource,
    TokenResource,
    UserResource,
    WhoamiResource,
    render_token,
    render_user,
)
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role, Token
from trimtab_controller.services import identity, tokens
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.store import identity as identity_store

router = APIRouter(tags=["users"])
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]
OneUser = Annotated[Access, requires(Role.VIEWER, Scope.USER)]
GrantAdmin = Annotated[Access, requires(Role.ADMIN, Scope.GRANT)]
TokenPath = Annotated[str, Path(pattern=r"^tok-[0-9a-z]{26}$", examples=["tok-01hf7y2m3n4p5q6r7s8t9v0wxy"])]


class UserBody(Body):
    name: Name
    kind: Literal["user", "service"] = "user"


class RoleBody(Body):
    role: Role


class TokenBody(Body):
    name: Name = "token"
    expires_in_days: Annotated[int, Field(strict=True, ge=1, le=tokens.MAX_LIFETIME_DAYS, examples=[90])] = 90


@router.get("/v1/whoami", response_model=WhoamiResource)
async def whoami(runtime: InRuntime, access: Annotated[Access, requires(Role.VIEWER, Scope.SELF)]) -> Response:
    """Tell the caller who they are and what they may do."""
    now = runtime.context.clock.now()

    def read(session: Session) -> tuple[identity.UserView, Token | None]:
        credential = identity_store.find_credential(session, access.token_id)
        return identity.get(session, access.actor.user_id), credential.token if credential else None

    view, token = await runtime.context.db.read(read)
    resource = WhoamiResource(name=access.actor.name, user=render_user(view), token=render_token(token, now) if token else None)
    return json_response(dump(resource))


@router.get("/v1/users", response_model=ListOf[UserResource])
async def list_users(runtime: InRuntime, _access: FleetAdmin, query: Listing) -> Response:
    found, after = await runtime.context.db.read(lambda session: identity.page(session, query.page))
    return json_response(dump_list(UserResource, [render_user(one) for one in found], query.next_token(after)))


@router.post("/v1/users", status_code=201, response_model=UserResource)
async def create_user(request: Request, access: FleetAdmin, body: UserBody, asked: Asked) -> Response:
    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = identity.create(session, name=body.name, kind=body.kind, actor=actor, now=now)
        return answered(render_user(view), status=201, version=view.user.version)

    order = Order(request=request, access=access, wish=asked, verb="user.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/users/{user}", response_model=UserResource)
async def get_user(runtime: InRuntime, _access: OneUser, user: UserPath) -> Response:
    view = await runtime.context.db.read(lambda session: identity.get(session, user))
    return json_response(dump(render_user(view)), etag=etag_of(view.user.version))


@router.delete("/v1/users/{user}", status_code=204, response_class=Response)
async def delete_user(request: Request, access: FleetAdmin, user: UserPath, asked: Asked) -> Response:
    """Delete a user; their tokens end at once."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        identity.delete(session, user, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="user.delete"), work)


@router.put("/v1/users/{user}/roles/{project}", response_model=UserResource)
async def set_role(request: Request, access: GrantAdmin, user: UserPath, body: RoleBody, asked: Asked) -> Response:
    """Give a user a role in a project, in place of the one they had there; `*` is the fleet and every project."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = identity.set_role(session, user, project_id=access.project_id, role=body.role, actor=actor, now=now)
        return answered(render_user(view), version=view.user.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="role.set", body=body), work)


@router.delete("/v1/users/{user}/roles/{project}", response_model=UserResource)
async def remove_role(request: Request, access: GrantAdmin, user: UserPath, asked: Asked) -> Response:
    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = identity.remove_role(session, user, project_id=access.project_id, actor=actor, now=now)
        return answered(render_user(view), version=view.user.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="role.remove"), work)


@router.get("/v1/users/{user}/tokens", response_model=ListOf[TokenResource])
async def list_tokens(runtime: InRuntime, _access: OneUser, user: UserPath) -> Response:
    """List a user's tokens, expired ones too, without their secrets; they are few and come in one page."""
    now = runtime.context.clock.now()
    found = await runtime.context.db.read(lambda session: identity_store.tokens_of(session, identity.find(session, user).id))
    return json_response(dump_list(TokenResource, [render_token(one, now) for one in found], ""))


@router.post("/v1/users/{user}/tokens", status_code=201, response_model=NewTokenResource)
async def create_token(request: Request, access: OneUser, user: UserPath, body: TokenBody, asked: Asked) -> Response:
    """Make a token; its secret is in this answer and nowhere else."""

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        lifetime = timedelta(days=body.expires_in_days)
        made = tokens.create(session, identity.find(session, user), name=body.name, lifetime=lifetime, now=now)
        shown = render_token(made.token, now)
        return answered(
            NewTokenResource(token=shown, secret=made.secret), status=201, stored=NewTokenResource(token=shown, secret="")
        )

    return await mutate(Order(request=request, access=access, wish=asked, verb="token.create", body=body), work)


@router.delete("/v1/users/{user}/tokens/{token}", status_code=204, response_class=Response)
async def delete_token(request: Request, access: OneUser, user: UserPath, token: TokenPath, asked: Asked) -> Response:
    """End a token at once."""

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        tokens.revoke(session, identity.find(session, user), token, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="token.delete"), work)
