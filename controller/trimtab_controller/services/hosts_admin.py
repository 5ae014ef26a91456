"""What administrators do with hosts and host classes; how machines join: `hosts.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core import cpu_sets
from trimtab_controller.core.host_troubles import Trouble
from trimtab_controller.core.model import Actor, Host, HostClass, Maintenance, Operation
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import fencing, projects
from trimtab_controller.services.vms import merge_labels
from trimtab_controller.store import (
    certificates,
    events,
    fence_intents,
    host_guards,
    host_stocks,
    host_troubles,
    hosts,
    hosts_read,
    keyset,
    lookup,
    plans,
    pools,
    schema,
)
from trimtab_controller.store.certificates import HostCertificate
from trimtab_controller.store.fence_intents import FenceIntentRow
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    host: Host
    host_class_name: str
    counts: hosts_read.HostCounts
    # By purpose.
    certificates: Mapping[str, HostCertificate]
    # By pool name; only where one host is asked for.
    pools: Mapping[str, pools.PoolOnHost]
    # '' where it takes vms of any project.
    exclusive_project_name: str = ""
    fence_paths: tuple[fencing.FenceView, ...] = ()
    # What its lease is counted on for; None: not asked.
    guard: HostGuard | None = None
    # Names of the vms that its warden kills when its lease ends.
    would_kill: tuple[str, ...] = ()
    fence_intent: FenceIntentRow | None = None
    # What is wrong with it while it is heard from.
    troubles: tuple[Trouble, ...] = ()
    # Who holds it out of service; None: nobody.
    maintenance: Maintenance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChange:
    """None leaves as it is."""

    name: str | None = None
    host_class: str | None = None
    labels: Mapping[str, str | None] | None = None
    is_cordoned: bool | None = None
    # By key: (value, effect), None takes the taint away.
    taints: Mapping[str, tuple[str, str] | None] | None = None
    # What the host has of what operators count; 0 takes it away.
    resources: Mapping[str, int] | None = None
    # A project's name or id; '' opens it to all.
    exclusive_project: str | None = None
    # Cpus kept for pinned vms, `4-15,20`; '' gives them back.
    dedicated_cpus: str | None = None


def find(session: Session, name_or_id: str) -> Host:
    host = hosts.find(session, name_or_id)
    if host is None:
        raise NotFound("host-not-found", f"there is no host {name_or_id}", host=name_or_id)
    return host


def get(session: Session, name_or_id: str, *, now: datetime) -> HostView:
    host = find(session, name_or_id)
    view = views(session, (host,), now=now)[0]
    return replace(
        view,
        pools=_pools_of(session, host.id),
        fence_paths=fencing.of_host(session, host),
        guard=host_guards.read(session, host.id),
        would_kill=fencing.would_be_killed(session, host),
        fence_intent=fence_intents.find(session, host.id),
    )


def _refuse_held(session: Session, host: Host, wish: HostChange) -> None:
    """A host in maintenance is opened by the end of its maintenance alone."""
    if wish.is_cordoned is False and plans.maintenance_of(session, [host.id]):
        message = f"host {host.name} is in maintenance; end it with `trimtab host maintenance end {host.name}`"
        raise Conflict("host-in-maintenance", message, host=host.name)


def page(session: Session, page: keyset.Page, *, now: datetime) -> tuple[tuple[HostView, ...], tuple[str, str] | None]:
    found, next_after = hosts_read.page(session, page)
    return views(session, found, now=now), next_after


def views(session: Session, found: tuple[Host, ...], *, now: datetime) -> tuple[HostView, ...]:
    ids = [host.id for host in found]
    classes = lookup.names(session, schema.host_class, {host.host_class_id for host in found})
    owners = lookup.names(session, schema.project, {host.exclusive_project_id for host in found})
    counts, held = hosts_read.counts(session, ids), certificates.latest_of(session, ids)
    troubles, holds = host_troubles.read(session, now=now, host_ids=ids), plans.maintenance_of(session, ids)
    return tuple(
        HostView(
            host=host,
            host_class_name=classes.get(host.host_class_id, ""),
            counts=counts[host.id],
            certificates=held[host.id],
            pools={},
            exclusive_project_name=owners.get(host.exclusive_project_id, ""),
            troubles=troubles.get(host.id, ()),
            maintenance=holds.get(host.id),
        )
        for host in found
    )


def change(
    session: Session,
    name_or_id: str,
    wish: HostChange,
    *,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> HostView:
    """Return the changed host. AlreadyExists where the new name is taken, Conflict `stale-etag`."""
    host = find(session, name_or_id)
    values: dict[str, Any] = {}
    if wish.name is not None:
        values["name"] = wish.name
    if wish.labels is not None:
        values["labels"] = merge_labels(host.labels, wish.labels)
    if wish.is_cordoned is not None:
        _refuse_held(session, host, wish)
        values["is_cordoned"] = wish.is_cordoned
    if wish.taints is not None:
        values["taints"] = _merge_taints(host.taints, wish.taints)
    if wish.exclusive_project is not None:
        owner = projects.get(session, wish.exclusive_project) if wish.exclusive_project else None
        values["exclusive_project_id"] = owner.id if owner is not None else ""
    host_class = None
    if wish.host_class is not None:
        host_class = find_class(session, wish.host_class)
        values["host_class_id"] = host_class.id
    hosts.update(session, host.id, expected_version=expected_version, **values)
    if wish.dedicated_cpus is not None:
        _set_aside(session, host, wish.dedicated_cpus)
        host_class = host_class or hosts.get_class(session, host.host_class_id)
    if host_class is not None and host.inventory is not None:
        hosts.set_limits(session, host.id, host.inventory, host_class)
    host_stocks.set_resources(session, host.id, wish.resources or {})
    what = {True: "cordoned", False: "uncordoned", None: "changed"}[wish.is_cordoned]
    events.append(
        session,
        kind=f"host.{what}",
        subject_id=host.id,
        actor=actor.name,
        message=f"host {wish.name or host.name} {what}",
        now=now,
    )
    return get(session, host.id, now=now)


def _set_aside(session: Session, host: Host, text: str) -> None:
    """Keep these cpus for pinned vms. InvalidRequest for cpus that the host has not; Conflict where others need them."""
    cpus, inventory = cpu_sets.parse(text, field="dedicated_cpus"), host.inventory
    if inventory is None:
        raise Conflict("inventory-missing", f"dedicated_cpus: host {host.name} has not said yet what it has", host=host.name)
    known = {cpu for cell in inventory.numa_cells for cpu in cell.cpus}
    if not cpus <= known or len(cpus) >= len(known) > 0:
        message = f"dedicated_cpus: host {host.name} has cpus {cpu_sets.text_of(known)}, and needs one for itself and the others"
        raise InvalidRequest("cpus-wrong", message, field="dedicated_cpus")
    host_class = hosts.get_class(session, host.host_class_id)
    left, _ = hosts.limits_of(inventory, host_class, dedicated_cpus=len(cpus))
    if left < host.vcpus_claimed:
        message = f"dedicated_cpus: {left} vcpus would be left on host {host.name}, and vms hold {host.vcpus_claimed}"
        raise Conflict("cpus-in-use", message, field="dedicated_cpus")
    host_stocks.set_dedicated_cpus(session, host.id, cpus, inventory)
    hosts.update(session, host.id, dedicated_cpus=cpu_sets.text_of(cpus))


def _merge_taints(before: Sequence[Mapping[str, str]], changes: Mapping[str, tuple[str, str] | None]) -> list[dict[str, str]]:
    kept = [dict(taint) for taint in before if taint["key"] not in changes]
    added = [{"key": key, "value": one[0], "effect": one[1]} for key, one in changes.items() if one is not None]
    return sorted([*kept, *added], key=lambda taint: taint["key"])


def remove(
    session: Session,
    name_or_id: str,
    *,
    keep_guests: bool,
    force: bool,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Operation:
    """Accept the removal of a host. Conflict names vms on it, unless they are to stay behind as plain libvirt domains.

    `force`: also where it does not answer; then nothing is undone there, and its certificates are revoked all the same.
    """
    host = find(session, name_or_id)
    names = hosts_read.vms_on(session, host.id)
    if names and not keep_guests:
        raise Conflict(
            "host-not-empty",
            f"host {host.name} has vms {', '.join(names)}; migrate them away, or leave them behind with `--keep-guests`",
            host=host.name,
        )
    if expected_version is not None:
        hosts.update(session, host.id, expected_version=expected_version)
    return accept(
        session,
        "host.remove",
        subject_id=host.id,
        subject_name=host.name,
        project_id="",
        params={"host_id": host.id, "keep_guests": keep_guests, "force": force},
        actor=actor,
        now=now,
    )


# --- classes ---------------------------------------------------------------------------------------------------------------


def check(session: Session, name_or_id: str, *, actor: Actor, now: datetime) -> Operation:
    """Accept that hosts look at the ways to each other: from and to one, or ('') all. NotFound names the field."""
    host = hosts.find(session, name_or_id) if name_or_id else None
    if name_or_id and host is None:
        raise NotFound("host-not-found", f"host: there is no host {name_or_id}; see `trimtab host list`", field="host")
    return accept(
        session,
        "host.check",
        subject_id=host.id if host is not None else "fleet",
        subject_name=host.name if host is not None else "all hosts",
        project_id="",
        params={"host_id": host.id if host is not None else ""},
        actor=actor,
        now=now,
    )


def find_class(session: Session, name_or_id: str) -> HostClass:
    host_class = hosts.find_class(session, name_or_id)
    if host_class is None:
        raise NotFound("host-class-not-found", f"there is no host class {name_or_id}", host_class=name_or_id)
    return host_class


def create_class(session: Session, *, name: str, values: Mapping[str, Any], actor: Actor, now: datetime) -> HostClass:
    host_class = hosts.insert_class(session, host_class_id=mint("hc"), name=name, now=now, **values)
    _tell_class(session, host_class, "created", actor, now)
    return host_class


def change_class(
    session: Session,
    name_or_id: str,
    values: Mapping[str, Any],
    *,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> HostClass:
    """Return the changed class; its hosts get their new limits at once."""
    host_class = find_class(session, name_or_id)
    changed = hosts.update_class(session, host_class.id, expected_version=expected_version, **values)
    _tell_class(session, changed, "changed", actor, now)
    return changed


def delete_class(session: Session, name_or_id: str, *, expected_version: int | None, actor: Actor, now: datetime) -> None:
    """Delete a class without hosts. Conflict names them."""
    host_class = find_class(session, name_or_id)
    if expected_version is not None and host_class.version != expected_version:
        raise Conflict("stale-etag", f"host class {host_class.name} changed since you read it; read it again")
    hosts.delete_class(session, host_class.id, now=now)
    _tell_class(session, host_class, "deleted", actor, now)


def _pools_of(session: Session, host_id: str) -> dict[str, pools.PoolOnHost]:
    states = pools.on_host(session, host_id)
    names = lookup.names(session, schema.pool, {one.pool_id for one in states})
    return {names[one.pool_id]: one for one in states if one.pool_id in names}


def _tell_class(session: Session, host_class: HostClass, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"host_class.{what}",
        subject_id=host_class.id,
        actor=actor.name,
        message=f"host class {host_class.name} {what}",
        now=now,
    )
