"""Who acts, in which project, with which right."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Role(StrEnum):
    """Each role includes those before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    id: str
    name: str
    vms_quota: int | None
    vcpus_quota: int | None
    memory_mib_quota: int | None
    disk_bytes_quota: int | None
    snapshots_quota: int | None
    floating_quota: int | None
    vms_used: int
    vcpus_used: int
    memory_mib_used: int
    disk_bytes_used: int
    snapshots_used: int
    floating_used: int
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    id: str
    name: str
    kind: str
    disabled_at: datetime | None
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    id: str
    user_id: str
    name: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The authenticated caller of a request, or a loop of ours (`system:<loop>`)."""

    name: str
    user_id: str = ""
    request_id: str = ""
    # Role per project id; '' binds everywhere.
    roles: Mapping[str, Role] = field(default_factory=dict)

    def may(self, role: Role, project_id: str) -> bool:
        """Tell whether the actor has `role` in the project ('' asks for the fleet itself)."""
        held = [self.roles[key] for key in {"", project_id} if key in self.roles]
        return any(one.includes(role) for one in held)
