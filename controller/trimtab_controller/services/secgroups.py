"""Security groups: made, changed, given to vms. A change is true at once in SQL; an operation has every host follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core import firewall
from trimtab_controller.core.model import Actor, Operation, Project, SecGroup
from trimtab_controller.operations.accept import accept
from trimtab_controller.store import events, keyset, secgroups
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

APPLY = "firewall.apply"
_NAMED_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SecGroupView:
    group: SecGroup
    project_name: str
    # Names.
    vms: tuple[str, ...]


def create(session: Session, *, name: str, rules: Sequence[str], project: Project, actor: Actor, now: datetime) -> SecGroupView:
    """Return the new group. AlreadyExists where the name is taken, InvalidRequest where a rule is none."""
    group = secgroups.insert(session, secgroup_id=mint("sg"), project_id=project.id, name=name, rules=canonical(rules), now=now)
    _tell(session, group, "created", actor, now)
    return views(session, (group,), project=project)[0]


def change(
    session: Session,
    name_or_id: str,
    rules: Sequence[str],
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> tuple[SecGroupView, Operation]:
    """Give the group these rules instead, and accept that the hosts of its vms follow."""
    group = find(session, name_or_id, project=project)
    secgroups.set_rules(session, group, canonical(rules), expected_version=expected_version)
    secgroups.raise_generation(session, secgroups.members(session, [group.id])[group.id])
    _tell(session, group, "changed", actor, now)
    operation = accept(
        session,
        APPLY,
        subject_id=group.id,
        subject_name=group.name,
        project_id=project.id,
        params={"secgroup_id": group.id},
        actor=actor,
        now=now,
    )
    return get(session, group.id, project=project), operation


def delete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> None:
    """Delete a group without vms. Conflict names those that it has: without it they would be open, or closed to all."""
    group = find(session, name_or_id, project=project)
    names = tuple(secgroups.members(session, [group.id])[group.id].values())
    if names:
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        raise Conflict(
            "secgroup-in-use",
            f"security group {group.name} is used by vms {', '.join(names[:_NAMED_MAX])}{more}; "
            f"`trimtab vm update {names[0]} --no-secgroups` takes it off",
            secgroup=group.name,
        )
    secgroups.delete(session, group, expected_version=expected_version, now=now)
    _tell(session, group, "deleted", actor, now)


def put_into(session: Session, vm_id: str, names: Sequence[str], *, project: Project, field: str) -> None:
    """Put the vm into these groups and no others. NotFound and InvalidRequest name the field."""
    if len(set(names)) > firewall.GROUPS_MAX:
        message = f"{field}: at most {firewall.GROUPS_MAX} security groups for a vm, this names {len(set(names))}"
        raise InvalidRequest("secgroups-too-many", message, field=field)
    ids = [find(session, name, project=project, field=f"{field}[{i}]").id for i, name in enumerate(names)]
    secgroups.set_groups(session, vm_id, ids)
    secgroups.raise_generation(session, [vm_id])


def copy(session: Session, source_id: str, vm_id: str) -> None:
    """Put a new vm into the groups of another one."""
    ids = secgroups.ids_of(session, source_id)
    if ids:
        secgroups.set_groups(session, vm_id, ids)
        secgroups.raise_generation(session, [vm_id])


def find(session: Session, name_or_id: str, *, project: Project, field: str = "") -> SecGroup:
    """Return the project's group. NotFound, which names the field of the request where it came from one."""
    group = secgroups.find(session, project.id, name_or_id)
    if group is None:
        where = f"{field}: " if field else ""
        context = {"field": field} if field else {"secgroup": name_or_id}
        message = f"{where}there is no security group {name_or_id} in project {project.name}; see `trimtab secgroup list`"
        raise NotFound("secgroup-not-found", message, **context)
    return group


def get(session: Session, name_or_id: str, *, project: Project) -> SecGroupView:
    return views(session, (find(session, name_or_id, project=project),), project=project)[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[SecGroupView, ...], tuple[str, str] | None]:
    found, after = secgroups.page(session, page, project_id=project.id)
    return views(session, found, project=project), after


def views(session: Session, groups: Sequence[SecGroup], *, project: Project) -> tuple[SecGroupView, ...]:
    members: Mapping[str, Mapping[str, str]] = secgroups.members(session, [group.id for group in groups])
    return tuple(SecGroupView(group=group, project_name=project.name, vms=tuple(members[group.id].values())) for group in groups)


def canonical(rules: Sequence[str]) -> tuple[str, ...]:
    """Return the rules as they are stored: each once, in one order. InvalidRequest names the one that is none."""
    if len(rules) > firewall.RULES_MAX:
        raise InvalidRequest("rules-too-many", f"rules: at most {firewall.RULES_MAX}, these are {len(rules)}", field="rules")
    parsed = set()
    for i, text in enumerate(rules):
        rule = firewall.parse_rule(text)
        if isinstance(rule, str):
            raise InvalidRequest("rule-wrong", f"rules[{i}]: {text[:60]} {rule}", field=f"rules[{i}]")
        parsed.add(rule)
    return tuple(str(rule) for rule in sorted(parsed))


def _tell(session: Session, group: SecGroup, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"secgroup.{what}",
        project_id=group.project_id,
        subject_id=group.id,
        actor=actor.name,
        message=f"security group {group.name} {what}",
        now=now,
    )
