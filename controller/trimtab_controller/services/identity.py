"""Users and service accounts, their roles, and the first administrator."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Role, User
from trimtab_controller.services import tokens
from trimtab_controller.store import events, hosts, identity, keyset, lookup, schema
from trimtab_protos.errors import Conflict, NotFound

ADMIN = "admin"
DEFAULT_PROJECT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserView:
    user: User
    # Role by project name; '*' is the fleet.
    roles: dict[str, Role]


def create(session: Session, *, name: str, kind: str, actor: Actor, now: datetime) -> UserView:
    """Return the new user, who may do nothing yet. AlreadyExists where the name is taken."""
    user = identity.insert_user(session, user_id=mint("user"), name=name, kind=kind, now=now)
    _tell(session, user, "created", actor, now)
    return UserView(user=user, roles={})


def get(session: Session, name_or_id: str) -> UserView:
    return _views(session, (find(session, name_or_id),))[0]


def find(session: Session, name_or_id: str) -> User:
    user = identity.find_user(session, name_or_id)
    if user is None:
        raise NotFound("user-not-found", f"there is no user {name_or_id}", user=name_or_id)
    return user


def page(session: Session, page: keyset.Page) -> tuple[tuple[UserView, ...], tuple[str, str] | None]:
    users, next_after = identity.users_page(session, page)
    return _views(session, users), next_after


def delete(session: Session, name_or_id: str, *, expected_version: int | None, actor: Actor, now: datetime) -> None:
    """Delete a user; tokens end at once. Conflict for the last administrator of the fleet."""
    user = find(session, name_or_id)
    _keep_an_administrator(session, user)
    identity.delete_user(session, user.id, expected_version=expected_version, now=now)
    _tell(session, user, "deleted", actor, now)


def set_role(session: Session, name_or_id: str, *, project_id: str, role: Role, actor: Actor, now: datetime) -> UserView:
    """Return the user with the role in the project ('' for the fleet)."""
    user = find(session, name_or_id)
    if project_id == "" and role is not Role.ADMIN:
        _keep_an_administrator(session, user)
    identity.set_role(session, user_id=user.id, project_id=project_id, role=role, now=now)
    _tell(session, user, "roles_changed", actor, now)
    return get(session, user.id)


def remove_role(session: Session, name_or_id: str, *, project_id: str, actor: Actor, now: datetime) -> UserView:
    """Return the user without a role there. NotFound where there was none."""
    user = find(session, name_or_id)
    if project_id == "":
        _keep_an_administrator(session, user)
    if not identity.remove_role(session, user_id=user.id, project_id=project_id):
        raise NotFound("role-not-found", f"user {user.name} has no role there")
    _tell(session, user, "roles_changed", actor, now)
    return get(session, user.id)


def bootstrap_admin(session: Session, now: datetime, *, lifetime: timedelta = tokens.DEFAULT_LIFETIME) -> str:
    """Return a fresh token of the user `admin`, who administers the fleet; older tokens of theirs end.

    For `trimtab-controller init` and `token reset`, which have the database and therefore need no rights. Makes the user, the
    project `default` and the host class `default` where they are missing.
    """
    user = identity.find_user(session, ADMIN)
    if user is None:
        user = identity.insert_user(session, user_id=mint("user"), name=ADMIN, kind="user", now=now)
    identity.set_role(session, user_id=user.id, project_id="", role=Role.ADMIN, now=now)
    for token in identity.tokens_of(session, user.id):
        identity.revoke_token(session, user_id=user.id, token_id=token.id, now=now)
    _make_defaults(session, now)
    return tokens.create(session, user, name="bootstrap", lifetime=lifetime, now=now).secret


def _make_defaults(session: Session, now: datetime) -> None:
    if identity.find_project(session, DEFAULT_PROJECT) is None:
        identity.insert_project(session, project_id=mint("proj"), name=DEFAULT_PROJECT, quotas={}, now=now)
    if hosts.find_class(session, hosts.DEFAULT_CLASS) is None:
        hosts.insert_class(session, host_class_id=mint("hc"), name=hosts.DEFAULT_CLASS, now=now)


def _views(session: Session, users: tuple[User, ...]) -> tuple[UserView, ...]:
    roles = identity.roles_of(session, [user.id for user in users])
    names = lookup.names(session, schema.project, {project_id for held in roles.values() for project_id in held})
    return tuple(
        UserView(user=user, roles={names.get(key, "*") if key else "*": role for key, role in sorted(roles[user.id].items())})
        for user in users
    )


def _keep_an_administrator(session: Session, user: User) -> None:
    if identity.fleet_admin_ids(session) == (user.id,):
        raise Conflict("last-administrator", f"{user.name} is the fleet's last administrator; give another user that role first")


def _tell(session: Session, user: User, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"user.{what}",
        subject_id=user.id,
        actor=actor.name,
        message=f"user {user.name} {what.replace('_', ' ')}",
        now=now,
    )
