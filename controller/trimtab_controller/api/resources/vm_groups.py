"""Vm groups as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.render import etag_of
from trimtab_controller.core.placement.needs import GroupRule
from trimtab_controller.services.vm_groups import VmGroupView


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRuleResource:
    # affinity or anti-affinity.
    relation: str
    # The label of hosts that makes the failure domains; `host`: each host is one.
    domain: str
    # False: a wish.
    must: bool
    # Members per domain, for anti-affinity.
    limit: int
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmGroupResource:
    id: str
    name: str
    project: str
    rules: tuple[GroupRuleResource, ...]
    # Host by name of the vm; '' for one that is nowhere.
    members: dict[str, str]
    version: int
    etag: str
    created_at: datetime


def render_vm_group(view: VmGroupView) -> VmGroupResource:
    group = view.group
    rules = [GroupRule.from_json(one) for one in group.rule["rules"]]
    return VmGroupResource(
        id=group.id,
        name=group.name,
        project=view.project_name,
        rules=tuple(
            GroupRuleResource(relation=one.relation.value, domain=one.domain, must=one.is_must, limit=one.limit, summary=str(one))
            for one in rules
        ),
        members=dict(view.members),
        version=group.version,
        etag=etag_of(group.version),
        created_at=group.created_at,
    )
