"""Vm groups: vms that belong together, or apart, in failure domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Project, VmGroup
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.store import events, keyset, lookup, schema, vm_groups
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

# So many members a refusal names.
_NAMED_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class VmGroupView:
    group: VmGroup
    project_name: str
    # Name of the host by name of the member; '' for one that is nowhere.
    members: Mapping[str, str]


def create(
    session: Session, *, name: str, rules: Sequence[GroupRule], project: Project, actor: Actor, now: datetime
) -> VmGroupView:
    """Return the new group. AlreadyExists where the name is taken, InvalidRequest where its rules contradict each other."""
    _check(rules)
    group = vm_groups.insert(session, group_id=mint("grp"), project_id=project.id, name=name, rules=rules, now=now)
    _tell(session, group, "created", actor, now)
    return views(session, (group,), project=project)[0]


def change(
    session: Session,
    name_or_id: str,
    rules: Sequence[GroupRule],
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> VmGroupView:
    """Return the group with these rules instead. Members stay where they are; the next placement of each obeys the new rules."""
    _check(rules)
    group = find(session, name_or_id, project=project)
    vm_groups.set_rules(session, group, rules, expected_version=expected_version)
    _tell(session, group, "changed", actor, now)
    return get(session, group.id, project=project)


def delete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> None:
    """Delete a group without members. Conflict names those that it has."""
    group = find(session, name_or_id, project=project)
    names = [row.name for row in vm_groups.members(session, [group.id])[group.id]]
    if names:
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        raise Conflict(
            "vm-group-not-empty",
            f"vm group {group.name} has members {', '.join(names[:_NAMED_MAX])}{more}; delete them first",
            vm_group=group.name,
        )
    vm_groups.delete(session, group, expected_version=expected_version, now=now)
    _tell(session, group, "deleted", actor, now)


def find(session: Session, name_or_id: str, *, project: Project, field: str = "") -> VmGroup:
    """Return the project's group. NotFound, which names the field of the request where it came from one."""
    group = vm_groups.find(session, project.id, name_or_id)
    if group is None:
        where = f"{field}: " if field else ""
        context = {"field": field} if field else {"vm_group": name_or_id}
        message = f"{where}there is no vm group {name_or_id} in project {project.name}; see `trimtab vm-group list`"
        raise NotFound("vm-group-not-found", message, **context)
    return group


def get(session: Session, name_or_id: str, *, project: Project) -> VmGroupView:
    return views(session, (find(session, name_or_id, project=project),), project=project)[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[VmGroupView, ...], tuple[str, str] | None]:
    found, after = vm_groups.page(session, page, project_id=project.id)
    return views(session, found, project=project), after


def views(session: Session, groups: Sequence[VmGroup], *, project: Project) -> tuple[VmGroupView, ...]:
    members = vm_groups.members(session, [group.id for group in groups])
    hosts = lookup.names(session, schema.host, {row.host_id for rows in members.values() for row in rows})
    return tuple(
        VmGroupView(
            group=group,
            project_name=project.name,
            members={row.name: hosts.get(row.host_id, "") for row in members[group.id]},
        )
        for group in groups
    )


def _check(rules: Sequence[GroupRule]) -> None:
    """Refuse what can never be kept: members that must share a domain and must not, at one level."""
    for i, rule in enumerate(rules):
        if rule.relation is Relation.TOGETHER and rule.limit != 1:
            raise InvalidRequest(
                "group-limit-wrong", f"rules[{i}].limit: is for anti-affinity; leave it out", field=f"rules[{i}].limit"
            )
    must = [rule for rule in rules if rule.is_must]
    for domain in {rule.domain for rule in must}:
        if len({rule.relation for rule in must if rule.domain == domain}) > 1:
            raise InvalidRequest(
                "group-rules-contradict",
                f"rules: members cannot be both together and apart by {domain}; make one of the two a wish (must false)",
                field="rules",
            )


def _tell(session: Session, group: VmGroup, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"vm_group.{what}",
        project_id=group.project_id,
        subject_id=group.id,
        actor=actor.name,
        message=f"vm group {group.name} {what}",
        now=now,
    )
