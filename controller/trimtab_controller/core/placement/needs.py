"""The parts of a placement request: disks, networks, tolerations, and the rules of the vm's group."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trimtab_controller.core.placement.snapshot import Taint


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    name: str
    pool_id: str
    size_bytes: int
    host_id: str = ""
    """Where its bytes are, on a local pool; '' on a shared pool or while it is not made."""
    is_claimed: bool = False
    """Its space is claimed already at the place where it is."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pool_id": self.pool_id,
            "size_bytes": self.size_bytes,
            "host_id": self.host_id,
            "is_claimed": self.is_claimed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkNeed:
    network_id: str
    name: str
    mtu: int = 1500

    def as_json(self) -> dict[str, Any]:
        return {"network_id": self.network_id, "name": self.name, "mtu": self.mtu}


@dataclass(frozen=True, slots=True, order=True)
class Toleration:
    """Taints that the vm puts up with: of this key, and of this value unless it is ''."""

    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.value else self.key

    def covers(self, taint: Taint) -> bool:
        return self.key == taint.key and self.value in ("", taint.value)

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "value": self.value}


class Relation(StrEnum):
    # Members share a domain.
    TOGETHER = "affinity"
    # A domain holds at most `limit` of them.
    APART = "anti-affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRule:
    relation: Relation
    domain: str = "host"
    """The label whose values are the failure domains; `host` makes each host one."""
    is_must: bool = True
    """False: a wish, which the policy weighs."""
    limit: int = 1
    """Members per domain, for anti-affinity."""

    def __str__(self) -> str:
        most = f" (at most {self.limit} each)" if self.relation is Relation.APART and self.limit > 1 else ""
        return f"{'must' if self.is_must else 'should'} {self.relation.value} by {self.domain}{most}"

    def as_json(self) -> dict[str, Any]:
        return {"relation": self.relation.value, "domain": self.domain, "is_must": self.is_must, "limit": self.limit}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "GroupRule":
        return cls(
            relation=Relation(document["relation"]),
            domain=document.get("domain", "host"),
            is_must=document.get("is_must", True),
            limit=document.get("limit", 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNeed:
    """The vm group that the vm belongs to. Where the other members are stands in the fleet."""

    group_id: str
    name: str
    rules: tuple[GroupRule, ...]

    def as_json(self) -> dict[str, Any]:
        return {"group_id": self.group_id, "name": self.name, "rules": [rule.as_json() for rule in self.rules]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "GroupNeed":
        rules = tuple(GroupRule.from_json(rule) for rule in document["rules"])
        return cls(group_id=document["group_id"], name=document["name"], rules=rules)
