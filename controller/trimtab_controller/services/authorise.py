"""Who is asking, and may they: the one place that decides, for every route and every object.

Deny by default. A project in which the caller has no role at all does not exist for them (404); one in which their role is too
low refuses (403). What belongs to the fleet is no secret, so it refuses.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy.orm import Session

from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Actor, Project, Role
from trimtab_controller.store import identity
from trimtab_protos.errors import NotFound, PermissionDenied

# `last_used_at` is for people; a write per request would be a commit per read.
NOTE_USE_EVERY = timedelta(minutes=1)
TOKEN_PREFIX = "tt-"  # noqa: S105 - what tokens begin with, so that scanners find leaked ones


class Unauthenticated(PermissionDenied):
    """The caller is not known: no token, a wrong, expired or revoked one."""


class Scope(StrEnum):
    """What a route's role is held on."""

    PUBLIC = "public"  # no token at all
    SELF = "self"  # any valid token; the answer is about the caller, or holds only what the caller may see
    USER = "user"  # the user in the path, or an administrator of the fleet
    PROJECT = "project"  # the project in the path
    GRANT = "grant"  # the project in the path, or `*` for the fleet
    OBJECT = "object"  # any valid token; the service checks the project of the object that the path names
    FLEET = "fleet"
    CONSOLE = "console"  # no token: the secret of one console session, which the role on its project was shown for


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """An authorised caller; `project` is set for routes under a project."""

    actor: Actor
    token_id: str = ""
    project: Project | None = None
    # The caller's token was last marked as used a while ago: mark it again, outside of this transaction.
    is_use_to_be_noted: bool = False

    @property
    def project_id(self) -> str:
        return self.project.id if self.project else ""

    @property
    def own_project(self) -> Project:
        """The project in the path; only routes under a project may ask."""
        assert self.project is not None
        return self.project


ANONYMOUS = Actor(name="anonymous")


def secret_hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def token_text(token_id: str, secret: str) -> str:
    """Return what the user keeps: `tt-<suffix of the id>.<secret>`."""
    return f"{TOKEN_PREFIX}{token_id.removeprefix('tok-')}.{secret}"


def authenticate(session: Session, authorization: str, *, request_id: str, now: datetime) -> Access:
    """Return the caller of an `Authorization: Bearer tt-...` header. Unauthenticated, with the reason, otherwise."""
    scheme, _, text = authorization.partition(" ")
    identifier, _, secret = text.strip().removeprefix(TOKEN_PREFIX).partition(".")
    if not authorization:
        raise Unauthenticated("token-missing", "send a token: `Authorization: Bearer tt-...` (CLI: TRIMTAB_TOKEN)")
    unknown = Unauthenticated("token-unknown", "the token is not known; ask an administrator for another one")
    if scheme.lower() != "bearer" or not secret or kind_of(f"tok-{identifier}") != "tok" or len(secret) > 200:
        raise unknown
    credential = identity.find_credential(session, f"tok-{identifier}")
    # Compare even where there is no such token, so that the answer takes as long.
    expected = credential.secret_sha256 if credential else secret_hash("")
    if not hmac.compare_digest(expected, secret_hash(secret)) or credential is None:
        raise unknown
    token = credential.token
    if token.revoked_at is not None:
        raise Unauthenticated("token-revoked", f"the token was revoked at {token.revoked_at:%Y-%m-%d %H:%M} UTC")
    if token.expires_at is not None and token.expires_at <= now:
        raise Unauthenticated(
            "token-expired",
            f"the token expired at {token.expires_at:%Y-%m-%d %H:%M} UTC; create another with `trimtab user token create`",
        )
    if credential.user.disabled_at is not None:
        raise Unauthenticated("user-disabled", f"user {credential.user.name} is disabled")
    return Access(
        actor=Actor(name=credential.user.name, user_id=credential.user.id, request_id=request_id, roles=dict(credential.roles)),
        token_id=token.id,
        is_use_to_be_noted=token.last_used_at is None or now - token.last_used_at >= NOTE_USE_EVERY,
    )


def authorise(session: Session, access: Access, *, role: Role, scope: Scope, path: "PathSubjects") -> Access:
    """Return the access with its project. PermissionDenied or NotFound where the caller's role does not reach."""
    actor = access.actor
    match scope:
        case Scope.PUBLIC | Scope.SELF | Scope.OBJECT | Scope.CONSOLE:
            return access
        case Scope.FLEET:
            require(actor, role, "")
            return access
        case Scope.USER:
            user = identity.find_user(session, path.user)
            if user is None or user.id != actor.user_id:
                require(actor, Role.ADMIN, "")
            return access
        case Scope.GRANT if path.project == "*":
            require(actor, role, "")
            return access
        case Scope.PROJECT | Scope.GRANT:
            project = identity.find_project(session, path.project)
            if project is None or not actor.may(Role.VIEWER, project.id):
                raise project_not_found(path.project)
            require(actor, role, project.id, place=f"project {project.name}")
            return Access(actor=actor, token_id=access.token_id, project=project, is_use_to_be_noted=access.is_use_to_be_noted)


@dataclass(frozen=True, slots=True)
class PathSubjects:
    """The parts of a path that rights hang on."""

    project: str = ""
    user: str = ""


def require(actor: Actor, role: Role, project_id: str, *, place: str = "the fleet") -> None:
    """Pass where the actor has the role ('' is the fleet), else PermissionDenied."""
    if not actor.may(role, project_id):
        raise PermissionDenied(
            "role-missing", f"{actor.name} needs the role {role.value} on {place}", role=role.value, place=place
        )


def require_object(actor: Actor, role: Role, project_id: str, *, missing: NotFound) -> None:
    """As `require`, for an object found by id: hidden (`missing`) from those without any role where it lives."""
    if not actor.may(Role.VIEWER, project_id):
        raise missing
    require(actor, role, project_id, place="its project" if project_id else "the fleet")


def visible_projects(actor: Actor) -> Sequence[str] | None:
    """Return the ids of projects whose contents the actor may read; None: all, and what belongs to the fleet."""
    return None if actor.may(Role.VIEWER, "") else tuple(sorted(key for key in actor.roles if key))


def project_not_found(name: str) -> NotFound:
    return NotFound("project-not-found", f"there is no project {name}, or you have no role in it", project=name)
