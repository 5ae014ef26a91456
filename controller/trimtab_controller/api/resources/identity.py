"""Projects, users, tokens and the audit trail as JSON."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.render import etag_of
from trimtab_controller.core.model import Project, Token
from trimtab_controller.services.identity import UserView
from trimtab_controller.store.audit import AuditRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaResource:
    """`quota` None is unlimited."""

    quota: int | None
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotasResource:
    vms: QuotaResource
    vcpus: QuotaResource
    memory_mib: QuotaResource
    disk_bytes: QuotaResource
    # Of its vms.
    snapshots: QuotaResource
    # Addresses.
    floating: QuotaResource


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectResource:
    id: str
    name: str
    quotas: QuotasResource
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UserResource:
    id: str
    name: str
    # user or service.
    kind: str
    # Role by project name; '*' is the fleet.
    roles: dict[str, str]
    is_disabled: bool
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResource:
    id: str
    name: str
    expires_at: datetime | None
    last_used_at: datetime | None
    is_expired: bool
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokenResource:
    token: TokenResource
    # Shown once; '' in the answer to a repeat.
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoamiResource:
    name: str
    user: UserResource
    token: TokenResource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResource:
    seq: int
    at: datetime
    actor: str
    request_id: str
    project: str
    verb: str
    resource: str
    outcome: str
    cause: str
    context: dict[str, Any]
    is_sealed: bool


def render_project(project: Project) -> ProjectResource:
    return ProjectResource(
        id=project.id,
        name=project.name,
        quotas=QuotasResource(
            vms=QuotaResource(quota=project.vms_quota, used=project.vms_used),
            vcpus=QuotaResource(quota=project.vcpus_quota, used=project.vcpus_used),
            memory_mib=QuotaResource(quota=project.memory_mib_quota, used=project.memory_mib_used),
            disk_bytes=QuotaResource(quota=project.disk_bytes_quota, used=project.disk_bytes_used),
            snapshots=QuotaResource(quota=project.snapshots_quota, used=project.snapshots_used),
            floating=QuotaResource(quota=project.floating_quota, used=project.floating_used),
        ),
        version=project.version,
        etag=etag_of(project.version),
        created_at=project.created_at,
    )


def render_user(view: UserView) -> UserResource:
    return UserResource(
        id=view.user.id,
        name=view.user.name,
        kind=view.user.kind,
        roles={project: role.value for project, role in view.roles.items()},
        is_disabled=view.user.disabled_at is not None,
        version=view.user.version,
        etag=etag_of(view.user.version),
        created_at=view.user.created_at,
    )


def render_token(token: Token, now: datetime) -> TokenResource:
    return TokenResource(
        id=token.id,
        name=token.name,
        expires_at=token.expires_at,
        last_used_at=token.last_used_at,
        is_expired=token.expires_at is not None and token.expires_at <= now,
        created_at=token.created_at,
    )


def render_audit(record: AuditRecord, project_name: str) -> AuditResource:
    return AuditResource(
        seq=record.seq,
        at=record.at,
        actor=record.actor,
        request_id=record.request_id,
        project=project_name,
        verb=record.verb,
        resource=record.resource,
        outcome=record.outcome,
        cause=record.cause,
        context=dict(record.context),
        is_sealed=record.chain_sha256 is not None,
    )
