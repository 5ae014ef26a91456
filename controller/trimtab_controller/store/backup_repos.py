"""Repositories of backups and the policies that use them, in SQL."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import BackupPolicy, BackupRepo
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NotFound

_repo = schema.backup_repo
_policy = schema.backup_policy

REPO_FILTERS: keyset.Filters = {"name": keyset.equals(_repo.c.name), "state": keyset.equals(_repo.c.state)}
POLICY_FILTERS: keyset.Filters = {
    "name": keyset.equals(_policy.c.name),
    "repo": keyset.named(_policy.c.repo_id, schema.backup_repo),
}


def insert(session: Session, *, repo_id: str, now: datetime, **values: Any) -> BackupRepo:
    """Insert a repository's row. AlreadyExists where its name is taken."""
    return lookup.insert_named(session, _repo, BackupRepo, "backup repository", id=repo_id, created_at=now, **values)


def get(session: Session, repo_id: str) -> BackupRepo:
    """Return the repository, deleted ones too. NotFound where there never was one."""
    row = session.execute(sa.select(*columns_of(_repo, BackupRepo)).where(_repo.c.id == repo_id)).one_or_none()
    if row is None:
        raise NotFound("backup-repo-not-found", f"no backup repository {repo_id}")
    return build(BackupRepo, row)


def find(session: Session, name_or_id: str) -> BackupRepo | None:
    return lookup.find(session, _repo, BackupRepo, name_or_id)


def live(session: Session) -> tuple[BackupRepo, ...]:
    query = sa.select(*columns_of(_repo, BackupRepo)).where(_repo.c.deleted_at.is_(None)).order_by(_repo.c.name)
    return tuple(build(BackupRepo, row) for row in session.execute(query))


def at(session: Session, url: str, host_id: str) -> BackupRepo | None:
    """Return the live repository at this address."""
    query = sa.select(*columns_of(_repo, BackupRepo)).where(
        _repo.c.deleted_at.is_(None), _repo.c.url == url, _repo.c.host_id == host_id
    )
    row = session.execute(query.limit(1)).one_or_none()
    return build(BackupRepo, row) if row else None


def page(session: Session, page: keyset.Page) -> tuple[tuple[BackupRepo, ...], tuple[str, str] | None]:
    query = sa.select(*columns_of(_repo, BackupRepo)).where(_repo.c.deleted_at.is_(None))
    found = keyset.fetch(session, query, _repo, page, filters=REPO_FILTERS)
    return tuple(build(BackupRepo, row) for row in found.rows), found.next_after


def update(session: Session, repo_id: str, **values: Any) -> None:
    """Write column values and raise the version."""
    session.execute(_repo.update().where(_repo.c.id == repo_id).values(version=_repo.c.version + 1, **values))


def check_version(session: Session, repo_id: str, expected_version: int | None) -> None:
    lookup.update_version(session, _repo, "the backup repository", repo_id, expected_version=expected_version)


# --- policies ----------------------------------------------------------------------------------------------------------------


def insert_policy(session: Session, *, policy_id: str, now: datetime, **values: Any) -> BackupPolicy:
    """Insert a policy. AlreadyExists where its name is taken in the project."""
    return lookup.insert_named(session, _policy, BackupPolicy, "backup policy", id=policy_id, created_at=now, **values)


def find_policy(session: Session, project_id: str, name_or_id: str) -> BackupPolicy | None:
    return lookup.find(session, _policy, BackupPolicy, name_or_id, project_ids=(project_id,))


def policies(session: Session) -> dict[str, BackupPolicy]:
    """Return every live policy by its id."""
    query = sa.select(*columns_of(_policy, BackupPolicy)).where(_policy.c.deleted_at.is_(None))
    return {row.id: build(BackupPolicy, row) for row in session.execute(query)}


def policies_of_repo(session: Session, repo_id: str) -> tuple[str, ...]:
    """Return the names of the live policies that use the repository."""
    query = sa.select(_policy.c.name).where(_policy.c.repo_id == repo_id, _policy.c.deleted_at.is_(None))
    return tuple(session.scalars(query.order_by(_policy.c.name)))


def page_policies(
    session: Session, page: keyset.Page, *, project_id: str
) -> tuple[tuple[BackupPolicy, ...], tuple[str, str] | None]:
    query = sa.select(*columns_of(_policy, BackupPolicy)).where(
        _policy.c.deleted_at.is_(None), _policy.c.project_id == project_id
    )
    found = keyset.fetch(session, query, _policy, page, filters=POLICY_FILTERS)
    return tuple(build(BackupPolicy, row) for row in found.rows), found.next_after


def vms_of_policy(session: Session, policy_id: str) -> tuple[str, ...]:
    """Return the names of the live vms that have the policy."""
    vm = schema.vm
    query = sa.select(vm.c.name).where(vm.c.backup_policy_id == policy_id, vm.c.deleted_at.is_(None)).order_by(vm.c.name)
    return tuple(session.scalars(query))


def delete_policy(session: Session, policy_id: str, *, expected_version: int | None, now: datetime) -> None:
    lookup.update_version(session, _policy, "the backup policy", policy_id, expected_version=expected_version, deleted_at=now)
