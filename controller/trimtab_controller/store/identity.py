"""Projects, users, role bindings and tokens in SQL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Project, Role, Token, User
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.rows import build, columns_of

PROJECT_FILTERS: keyset.Filters = {"name": keyset.equals(schema.project.c.name)}
USER_FILTERS: keyset.Filters = {"name": keyset.equals(schema.user.c.name), "kind": keyset.equals(schema.user.c.kind)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A token with what is needed to judge it."""

    token: Token
    secret_sha256: str
    user: User
    roles: Mapping[str, Role]


# --- projects ------------------------------------------------------------------------------------------------------------


def insert_project(session: Session, *, project_id: str, name: str, quotas: Mapping[str, int | None], now: datetime) -> Project:
    """Insert a project; `quotas` by column. AlreadyExists where the name is taken."""
    return lookup.insert_named(session, schema.project, Project, "project", id=project_id, name=name, created_at=now, **quotas)


def find_project(session: Session, name_or_id: str) -> Project | None:
    return lookup.find(session, schema.project, Project, name_or_id)


def first_project(session: Session) -> Project | None:
    """Return the oldest live project."""
    table = schema.project
    query = sa.select(*columns_of(table, Project)).where(table.c.deleted_at.is_(None)).order_by(table.c.created_at, table.c.id)
    row = session.execute(query.limit(1)).one_or_none()
    return build(Project, row) if row else None


def projects_page(
    session: Session, page: keyset.Page, *, project_ids: Sequence[str] | None
) -> tuple[tuple[Project, ...], tuple[str, str] | None]:
    """Return live projects, of these ids (None: all)."""
    table = schema.project
    query = sa.select(*columns_of(table, Project)).where(table.c.deleted_at.is_(None))
    if project_ids is not None:
        query = query.where(table.c.id.in_(project_ids))
    found = keyset.fetch(session, query, table, page, filters=PROJECT_FILTERS)
    return tuple(build(Project, row) for row in found.rows), found.next_after


def update_project(session: Session, project_id: str, *, expected_version: int | None, quotas: Mapping[str, int | None]) -> None:
    lookup.update_version(session, schema.project, "the project", project_id, expected_version=expected_version, **quotas)


def delete_project(session: Session, project_id: str, *, expected_version: int | None, now: datetime) -> None:
    lookup.update_version(session, schema.project, "the project", project_id, expected_version=expected_version, deleted_at=now)
    session.execute(schema.role_binding.delete().where(schema.role_binding.c.project_id == project_id))


_CONTENTS = (
    ("vm", schema.vm),
    ("volume", schema.volume),
    ("image", schema.image),
    ("network", schema.network),
    ("router", schema.router),
    ("floating address", schema.floating),
)


def project_contents(session: Session, project_id: str) -> dict[str, tuple[str, ...]]:
    """Return the names (up to 5 each) of what lives in the project, by noun; a deleted vm counts until it is purged."""
    found = {}
    for noun, table in _CONTENTS:
        gone = table.c.purged_at if "purged_at" in table.c else table.c.deleted_at
        query = sa.select(table.c.name).where(table.c.project_id == project_id, gone.is_(None)).order_by(table.c.name).limit(5)
        if noun == "volume":
            query = query.where(table.c.vm_id.is_(None))  # the others are told of by their vms
        names = tuple(session.scalars(query))
        if names:
            found[noun] = names
    return found


# --- users and roles -------------------------------------------------------------------------------------------------------


def insert_user(session: Session, *, user_id: str, name: str, kind: str, now: datetime) -> User:
    return lookup.insert_named(session, schema.user, User, "user", id=user_id, name=name, kind=kind, created_at=now)


def find_user(session: Session, name_or_id: str) -> User | None:
    return lookup.find(session, schema.user, User, name_or_id)


def users_page(session: Session, page: keyset.Page) -> tuple[tuple[User, ...], tuple[str, str] | None]:
    table = schema.user
    query = sa.select(*columns_of(table, User)).where(table.c.deleted_at.is_(None))
    found = keyset.fetch(session, query, table, page, filters=USER_FILTERS)
    return tuple(build(User, row) for row in found.rows), found.next_after


def delete_user(session: Session, user_id: str, *, expected_version: int | None, now: datetime) -> None:
    """Hide the user; tokens end and roles go with it."""
    lookup.update_version(session, schema.user, "the user", user_id, expected_version=expected_version, deleted_at=now)
    live = (schema.token.c.user_id == user_id, schema.token.c.revoked_at.is_(None))
    session.execute(schema.token.update().where(*live).values(revoked_at=now))
    session.execute(schema.role_binding.delete().where(schema.role_binding.c.user_id == user_id))


def touch_user(session: Session, user_id: str) -> None:
    """Raise the user's version: roles are shown with it."""
    session.execute(schema.user.update().where(schema.user.c.id == user_id).values(version=schema.user.c.version + 1))


def roles_of(session: Session, user_ids: Sequence[str]) -> dict[str, dict[str, Role]]:
    """Return each user's role by project id; '' is the fleet."""
    table = schema.role_binding
    found: dict[str, dict[str, Role]] = {user_id: {} for user_id in user_ids}
    for row in session.execute(sa.select(table).where(table.c.user_id.in_(user_ids))):
        found[row.user_id][row.project_id] = Role(row.role)
    return found


def set_role(session: Session, *, user_id: str, project_id: str, role: Role, now: datetime) -> None:
    table = schema.role_binding
    key = (table.c.user_id == user_id, table.c.project_id == project_id)
    changed = session.execute(table.update().where(*key).values(role=role.value))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(table.insert().values(user_id=user_id, project_id=project_id, role=role.value, created_at=now))
    touch_user(session, user_id)


def remove_role(session: Session, *, user_id: str, project_id: str) -> bool:
    table = schema.role_binding
    changed = session.execute(table.delete().where(table.c.user_id == user_id, table.c.project_id == project_id))
    touch_user(session, user_id)
    return getattr(changed, "rowcount", 0) == 1


def fleet_admin_ids(session: Session) -> tuple[str, ...]:
    """Return the users who may administer the fleet."""
    binding, user = schema.role_binding, schema.user
    query = (
        sa.select(user.c.id)
        .join(binding, binding.c.user_id == user.c.id)
        .where(binding.c.project_id == "", binding.c.role == Role.ADMIN.value)
        .where(user.c.deleted_at.is_(None), user.c.disabled_at.is_(None))
    )
    return tuple(session.scalars(query))


# --- tokens ----------------------------------------------------------------------------------------------------------------


def insert_token(
    session: Session, *, token_id: str, user_id: str, name: str, secret_sha256: str, expires_at: datetime, now: datetime
) -> Token:
    values: dict[str, Any] = {"id": token_id, "user_id": user_id, "name": name, "expires_at": expires_at, "created_at": now}
    session.execute(schema.token.insert().values(secret_sha256=secret_sha256, **values))
    return Token(last_used_at=None, revoked_at=None, **values)


def tokens_of(session: Session, user_id: str) -> tuple[Token, ...]:
    """Return the user's tokens that are not revoked, oldest first; expired ones too, so that one sees why a login fails."""
    table = schema.token
    query = sa.select(*columns_of(table, Token)).where(table.c.user_id == user_id, table.c.revoked_at.is_(None))
    return tuple(build(Token, row) for row in session.execute(query.order_by(table.c.id)))


def revoke_token(session: Session, *, user_id: str, token_id: str, now: datetime) -> bool:
    """End a token at once; False where the user has none of that id."""
    table = schema.token
    changed = session.execute(
        table.update()
        .where(table.c.id == token_id, table.c.user_id == user_id, table.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    return getattr(changed, "rowcount", 0) == 1


def note_token_use(session: Session, token_id: str, now: datetime) -> None:
    session.execute(schema.token.update().where(schema.token.c.id == token_id).values(last_used_at=now))


# Each request asks for one.
_CREDENTIAL = (
    sa.select(
        *(column.label(f"token_{column.name}") for column in schema.token.c),
        *(column.label(f"user_{column.name}") for column in schema.user.c),
        schema.role_binding.c.project_id.label("role_project_id"),
        schema.role_binding.c.role.label("role"),
    )
    .join(schema.user, schema.user.c.id == schema.token.c.user_id)
    .outerjoin(schema.role_binding, schema.role_binding.c.user_id == schema.user.c.id)
    .where(schema.token.c.id == sa.bindparam("wanted"), schema.user.c.deleted_at.is_(None))
)


def find_credential(session: Session, token_id: str) -> Credential | None:
    """Return the token with its user and the user's roles; one query. None where there is no such token or user."""
    token, user = schema.token, schema.user
    rows = session.execute(_CREDENTIAL, {"wanted": token_id}).all()
    if not rows:
        return None
    first = rows[0]._mapping
    return Credential(
        token=build(Token, {column.name: first[f"token_{column.name}"] for column in token.c}),
        secret_sha256=first["token_secret_sha256"],
        user=build(User, {column.name: first[f"user_{column.name}"] for column in user.c}),
        roles={row.role_project_id: Role(row.role) for row in rows if row.role is not None},
    )
