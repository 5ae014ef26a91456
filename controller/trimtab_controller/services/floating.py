"""Floating addresses: of an outer network, each leads to one card of a vm on an overlay network, wherever the vm is.

One that is attached stays with its vm while that is deleted and can come back; it leads nowhere meanwhile, and to nobody once the vm is
purged or the card detached. Everything here is true at once in SQL; the leader tells OVN within a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, FloatingAddress, Network, Nic, Project, Router, Vm
from trimtab_controller.services import outer_networks, quota, vm_power
from trimtab_controller.store import events, floating, keyset, lookup, networks, routers, schema, vms
from trimtab_controller.store.floating import Led
from trimtab_protos.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatingView:
    floating: FloatingAddress
    project_name: str
    network_name: str
    # None: it leads to nobody.
    led: Led | None


def create(session: Session, *, network: str, address: str, project: Project, actor: Actor, now: datetime) -> FloatingView:
    """Return a new address of an outer network: the one asked for, or the lowest free one. QuotaExceeded."""
    outer = outer_networks.find(session, network, project=project, field="network")
    quota.charge(session, project.id, quota.Charge(floating=1))
    taken = outer_networks.take_address(session, outer, address, project=project, field="address")
    made = floating.insert(
        session, floating_id=mint("fip"), project_id=project.id, network_id=outer.network.id, address=taken, now=now
    )
    _tell(session, made, "created", "created", actor, now)
    return get(session, made.id, project=project)


def attach(
    session: Session,
    address_or_id: str,
    *,
    vm: str,
    nic: str,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> FloatingView:
    """Have the address lead to a vm's card: the named one (id, MAC or index), or the first that a router leads to."""
    routers.lock(session, project.id)
    found = find(session, address_or_id, project=project)
    target = vm_power.find(session, vm, project=project)
    if found.nic_id is not None:
        led = floating.led_to(session, [found.nic_id])[found.nic_id]
        raise Conflict(
            "floating-attached",
            f"{found.name} leads to vm {led.vm_name}{' (deleted)' if led.is_deleted else ''}; `trimtab floating detach {found.name}` first",
        )
    card = _card(session, found, target, nic, project=project)
    if not floating.hold_nic(session, card.id):
        raise NotFound(
            "nic-not-found", f"nic: vm {target.name} has no nic {card.id} any more: it was taken away just now", nic=card.id
        )
    other = floating.of_nics(session, [card.id]).get(card.id)
    if other is not None:
        message = f"vm: that nic of vm {target.name} has {other.name} already; `trimtab floating detach {other.name}` first"
        raise Conflict("nic-has-floating", message, field="vm")
    floating.lead_to(session, found, card.id, expected_version=expected_version)
    _tell(session, found, "attached", f"leads to vm {target.name}", actor, now)
    return get(session, found.id, project=project)


def detach(
    session: Session, address_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> FloatingView:
    """Have the address lead to nobody; it stays the project's. Idempotent."""
    found = find(session, address_or_id, project=project)
    floating.lead_to(session, found, None, expected_version=expected_version)
    _tell(session, found, "detached", "leads to nobody", actor, now)
    return get(session, found.id, project=project)


def delete(
    session: Session, address_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> None:
    """Give the address back. Conflict where it leads to a vm, a deleted one too."""
    found = find(session, address_or_id, project=project)
    if found.nic_id is not None:
        name = floating.led_to(session, [found.nic_id])[found.nic_id].vm_name
        message = f"{found.name} leads to vm {name}; `trimtab floating detach {found.name}` first"
        raise Conflict("floating-attached", message)
    floating.delete(session, found, expected_version=expected_version, now=now)
    _tell(session, found, "deleted", "deleted", actor, now)


def find(session: Session, address_or_id: str, *, project: Project) -> FloatingAddress:
    found = floating.find(session, project.id, address_or_id)
    if found is None:
        message = f"there is no floating address {address_or_id} in project {project.name}; see `trimtab floating list`"
        raise NotFound("floating-not-found", message, floating=address_or_id)
    return found


def get(session: Session, address_or_id: str, *, project: Project) -> FloatingView:
    return views(session, (find(session, address_or_id, project=project),), project=project)[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[FloatingView, ...], tuple[str, str] | None]:
    found, after = floating.page(session, page, project_id=project.id)
    return views(session, found, project=project), after


def views(session: Session, found: Sequence[FloatingAddress], *, project: Project) -> tuple[FloatingView, ...]:
    names = lookup.names(session, schema.network, {one.network_id for one in found})
    led = floating.led_to(session, [one.nic_id for one in found if one.nic_id])
    return tuple(
        FloatingView(
            floating=one,
            project_name=project.name,
            network_name=names.get(one.network_id, ""),
            led=led.get(one.nic_id or ""),
        )
        for one in found
    )


def _card(session: Session, found: FloatingAddress, vm: Vm, wish: str, *, project: Project) -> Nic:
    """Return the card that the address is to lead to. InvalidRequest and Conflict say why none will do."""
    cards = vms.nics_of(session, [vm.id])[vm.id]
    if wish:
        cards = tuple(card for card in cards if wish.lower() in {card.id, card.mac, str(card.nic_index)})
        if not cards:
            raise NotFound("nic-not-found", f"nic: vm {vm.name} has no nic {wish}; see `trimtab vm get {vm.name}`", nic=wish)
    there = {network.id: network for network in networks.of_ids(session, {card.network_id for card in cards})}
    outer_name = lookup.names(session, schema.network, [found.network_id]).get(found.network_id, "")
    problems = []
    for card in cards:
        network = there[card.network_id]
        problem = _problem(session, found, card, network, outer_name, project=project)
        if not problem:
            return card
        problems.append((network.kind == "overlay", problem))
    if not problems:
        raise Conflict(
            "floating-no-way", f"vm: vm {vm.name} has no nic; `trimtab vm attach {vm.name} --network NAME`", field="vm"
        )
    # What can be cured on an overlay network says more than that another network is none.
    told = max(problems, key=lambda one: one[0])[1]
    raise Conflict("floating-no-way", f"vm: {found.name} has no way to vm {vm.name}: {told}", field="vm")


def _problem(session: Session, found: FloatingAddress, card: Nic, network: Network, outer_name: str, *, project: Project) -> str:
    """Return why a floating address cannot lead to this card; '' where it can."""
    if network.kind != "overlay":
        return f"its network {network.name} is no overlay network"
    name = str(network.settings.get("router", ""))
    router: Router | None = routers.find(session, project.id, name) if name and network.project_id == project.id else None
    if router is None:
        if network.project_id != project.id:
            return f"its network {network.name} is shared, and only networks of a project have a router with an outer side"
        return (
            f"its network {network.name} is behind no router; "
            f"`trimtab router create edge --network {network.name} --outer {outer_name}` makes one"
        )
    if router.outer_network_id != found.network_id:
        return (
            f"router {router.name} of its network {network.name} has no outer side on {outer_name}; "
            f"`trimtab router update {router.name} --outer {outer_name}` gives it one"
        )
    if not any("." in address for address in card.addresses):
        return f"its nic on {network.name} has no IPv4 address"
    return ""


def _tell(session: Session, found: FloatingAddress, kind: str, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"floating.{kind}",
        project_id=found.project_id,
        subject_id=found.id,
        actor=actor.name,
        message=f"floating address {found.name} {what}",
        now=now,
    )
