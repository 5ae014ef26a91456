"""Repositories of backups: made once their key was saved, made anew in SQL from themselves, pruned, forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Actor, BackupRepo, Operation
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.store import backup_repos, backups, hosts, keyset, lookup, recovery_plans, schema
from trimtab_controller.store import identity as identity_store
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, PermissionDenied


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoSpec:
    """What is asked for; keys come sealed, and their ids."""

    repo_id: str
    name: str
    url: str
    # A host's name: the folder is on that host only.
    host: str = ""
    # A project's name: it keeps vms of that one only.
    project: str = ""
    endpoint: str = ""
    region: str = ""
    access_key_id: str = ""
    allow_http: bool = False
    wrapped_key: str = field(repr=False)
    wrapped_secret: str = field(default="", repr=False)
    key_id: str
    fleet_id: str
    # The key was given: the repository is there, and its key saved.
    is_adopted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoView:
    repo: BackupRepo
    host_name: str
    project_name: str
    backups: int
    size_bytes: int
    stored_bytes: int

    @property
    def dedup_ratio(self) -> float:
        """Return how many bytes of disks a stored byte stands for; 0 where nothing is stored."""
        return round(self.size_bytes / self.stored_bytes, 2) if self.stored_bytes else 0.0


def create(session: Session, spec: RepoSpec, *, actor: Actor, now: datetime) -> tuple[RepoView, Operation | None]:
    """Insert the repository; it is made once `confirm` was called with its key. One that is there already is opened at once."""
    kind = _kind_of(spec)
    host_id, project_id = "", ""
    if spec.host:
        host = hosts.find(session, spec.host)
        if host is None:
            raise NotFound("host-not-found", f"host: there is no host {spec.host}", field="host")
        host_id = host.id
    if spec.project:
        project = identity_store.find_project(session, spec.project)
        if project is None:
            raise NotFound("project-not-found", f"project: there is no project {spec.project}", field="project")
        project_id = project.id
    taken = backup_repos.at(session, spec.url, host_id)
    if taken is not None:
        raise AlreadyExists("backup-repo-url-taken", f"url: {spec.url} is repository {taken.name} already", field="url")
    settings: dict[str, Any] = {
        "endpoint": spec.endpoint,
        "region": spec.region,
        "access_key_id": spec.access_key_id,
        "allow_http": spec.allow_http,
    }
    repo = backup_repos.insert(
        session,
        repo_id=spec.repo_id,
        now=now,
        name=spec.name,
        project_id=project_id,
        kind=kind,
        url=spec.url,
        host_id=host_id,
        settings={name: value for name, value in settings.items() if value},
        wrapped_key=spec.wrapped_key,
        wrapped_secret=spec.wrapped_secret,
        key_id=spec.key_id,
        fleet_id=spec.fleet_id,
        state="opening" if spec.is_adopted else "unconfirmed",
        is_adopted=spec.is_adopted,
    )
    operation = _accept_opening(session, repo, actor=actor, now=now) if spec.is_adopted else None
    return views(session, (repo,))[0], operation


def confirm(session: Session, name: str, *, key_id: str, actor: Actor, now: datetime) -> tuple[RepoView, Operation]:
    """Accept the making of a repository whose key comes back: whoever has it has saved it. PermissionDenied for another key."""
    repo = find(session, name)
    if key_id != repo.key_id:
        raise PermissionDenied(
            "repository-key-wrong",
            f"key: this is the key {key_id}, repository {repo.name} has {repo.key_id}; give the one that `backup repo create` showed",
            field="key",
        )
    if repo.state == "ready":
        raise Conflict(
            "repository-ready",
            f"repository {repo.name} is ready already; `trimtab backup repo rotate-key {repo.name}` gives it another key",
            state=repo.state,
        )
    backup_repos.update(session, repo.id, state="opening", problem="")
    operation = _accept_opening(session, repo, actor=actor, now=now)
    return views(session, (backup_repos.get(session, repo.id),))[0], operation


def rebuild(session: Session, name: str, *, actor: Actor, now: datetime) -> Operation:
    """Accept that the rows of the repository's backups are made anew from what it lists."""
    repo = find(session, name)
    backup_steps.require_ready(session, repo.id)
    return _accept(session, "backup_repo.rebuild", repo, {}, actor=actor, now=now)


def replicate(session: Session, name: str, to_name: str, *, bandwidth_mib_s: int, actor: Actor, now: datetime) -> Operation:
    """Accept that what the other repository does not list yet is copied into it. Conflict where either cannot be used."""
    repo, target = find(session, name), find(session, to_name)
    if repo.id == target.id:
        raise InvalidRequest("repository-is-itself", "to: a repository is not copied into itself; name another one", field="to")
    backup_steps.require_ready(session, repo.id)
    backup_steps.require_ready(session, target.id)
    params = {"to_repo_id": target.id, "bandwidth_mib_s": bandwidth_mib_s}
    return _accept(session, "backup_repo.replicate", repo, params, actor=actor, now=now)


def prune(session: Session, name: str, *, is_dry_run: bool, actor: Actor, now: datetime) -> Operation:
    """Accept the removal of what no listed backup needs; a dry run only counts it."""
    repo = find(session, name)
    backup_steps.require_ready(session, repo.id)
    params = {"forget": [], "is_dry_run": is_dry_run}
    return _accept(session, "backup.prune", repo, params, actor=actor, now=now)


def delete(session: Session, name: str, *, expected_version: int | None, now: datetime) -> None:
    """Forget a repository and its backups' rows; it stays as it is where it lies. Conflict while a policy uses it."""
    repo = find(session, name)
    users = backup_repos.policies_of_repo(session, repo.id)
    if users:
        raise Conflict("backup-repo-in-use", f"repository {repo.name} is used by policies {', '.join(users)}", repo=repo.name)
    plans = recovery_plans.of_repo(session, repo.id)
    if plans:
        raise Conflict(
            "backup-repo-in-use", f"recovery plans {', '.join(plans)} restore from repository {repo.name}", repo=repo.name
        )
    running = [one.id for one in backups.of_repo(session, repo.id) if one.state == "running"]
    if running:
        raise Conflict("backup-repo-in-use", f"backup {running[0]} is being written to repository {repo.name}", repo=repo.name)
    backup_repos.check_version(session, repo.id, expected_version)
    backups.hide(session, [one.id for one in backups.of_repo(session, repo.id)], now=now)
    backup_repos.update(session, repo.id, deleted_at=now)


def find(session: Session, name_or_id: str) -> BackupRepo:
    repo = backup_repos.find(session, name_or_id)
    if repo is None:
        raise NotFound("backup-repo-not-found", f"there is no backup repository {name_or_id}", repo=name_or_id)
    return repo


def choose(session: Session, name_or_id: str, *, project_id: str) -> BackupRepo:
    """Return the repository, named or the only one that keeps this project's vms. InvalidRequest where that is not one."""
    if name_or_id:
        repo = find(session, name_or_id)
        if repo.project_id not in {"", project_id}:
            raise Conflict(
                "repository-of-another-project", f"repo: repository {repo.name} keeps vms of another project only", field="repo"
            )
        return repo
    candidates = [one for one in backup_repos.live(session) if one.state == "ready" and one.project_id in {"", project_id}]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InvalidRequest(
            "repo-missing",
            "repo: there is no repository yet; an administrator makes one with `trimtab backup repo create`",
            field="repo",
        )
    names = ", ".join(one.name for one in candidates[:10])
    raise InvalidRequest("repo-ambiguous", f"repo: name one of {names}", field="repo")


def get(session: Session, name: str) -> RepoView:
    return views(session, (find(session, name),))[0]


def page(session: Session, page: keyset.Page) -> tuple[tuple[RepoView, ...], tuple[str, str] | None]:
    found, next_after = backup_repos.page(session, page)
    return views(session, found), next_after


def views(session: Session, found: tuple[BackupRepo, ...]) -> tuple[RepoView, ...]:
    names = lookup.names_in(
        session, {schema.host: {one.host_id for one in found}, schema.project: {one.project_id for one in found}}
    )
    totals = backups.totals(session)
    return tuple(
        RepoView(
            repo=one,
            host_name=names.get(one.host_id, ""),
            project_name=names.get(one.project_id, ""),
            backups=totals.get(one.id, (0, 0, 0))[0],
            size_bytes=totals.get(one.id, (0, 0, 0))[1],
            stored_bytes=totals.get(one.id, (0, 0, 0))[2],
        )
        for one in found
    )


def _kind_of(spec: RepoSpec) -> str:
    parts = urlsplit(spec.url)
    if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1 and ".." not in parts.path.split("/"):
        if spec.endpoint or spec.region or spec.access_key_id:
            raise InvalidRequest("repository-settings-wrong", "endpoint: only a bucket has one", field="endpoint")
        return "folder"
    if parts.scheme == "s3" and parts.netloc:
        if spec.host:
            raise InvalidRequest("repository-settings-wrong", "host: every host reaches a bucket; leave it out", field="host")
        if bool(spec.access_key_id) != bool(spec.wrapped_secret):
            message = "access_key_id: it and the secret access key are given together, or neither: then the hosts' own count"
            raise InvalidRequest("repository-settings-wrong", message, field="access_key_id")
        return "bucket"
    raise InvalidRequest(
        "repository-url-malformed",
        "url: the address of a repository is file:///folder (also on NFS) or s3://bucket/prefix",
        field="url",
    )


def _accept_opening(session: Session, repo: BackupRepo, *, actor: Actor, now: datetime) -> Operation:
    return _accept(session, "backup_repo.create", repo, {}, actor=actor, now=now)


def _accept(
    session: Session, kind: str, repo: BackupRepo, params: Mapping[str, Any], *, actor: Actor, now: datetime
) -> Operation:
    return accept(
        session,
        kind,
        subject_id=repo.id,
        subject_name=repo.name,
        project_id="",
        params={"repo_id": repo.id, **params},
        actor=actor,
        now=now,
    )
