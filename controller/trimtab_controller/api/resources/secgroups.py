"""Security groups as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.render import etag_of
from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.services.secgroups import SecGroupView


@dataclass(frozen=True, slots=True, kw_only=True)
class SecGroupResource:
    id: str
    name: str
    project: str
    # `tcp/443`, `tcp/22@10.0.0.0/8`, `icmp`; what none names does not reach a vm of the group.
    rules: tuple[str, ...]
    # Names; deleted ones count until they are purged.
    vms: tuple[str, ...]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SecGroupAnswer:
    operation: OperationResource
    secgroup: SecGroupResource


def render_secgroup(view: SecGroupView) -> SecGroupResource:
    group = view.group
    return SecGroupResource(
        id=group.id,
        name=group.name,
        project=view.project_name,
        rules=group.rules,
        vms=view.vms,
        version=group.version,
        etag=etag_of(group.version),
        created_at=group.created_at,
    )
