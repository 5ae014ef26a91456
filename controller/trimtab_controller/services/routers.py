"""Routers of overlay networks: which networks are behind one, and its way out.

A router is one of a project's names: overlay networks that name it reach each other. With an outer side they reach what is beyond an
outer network too, all by the router's one address there, and floating addresses lead from there to their vms. Everything here is true
at once in SQL; the leader tells OVN within a second (`loops/overlays.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.addresses import gateway_of
from trimtab_controller.core.model import Actor, FloatingAddress, Network, Project, Router
from trimtab_controller.core.overlay_outside import gateways, router_key_of
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import outer_networks
from trimtab_controller.store import events, floating, keyset, lookup, overlays, routers, schema
from trimtab_controller.store.floating import Led
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

_NAMED_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldAddress:
    """An address that a router answers for."""

    address: str
    # Name.
    network: str
    # Whom it leads to; None: it is the router's own.
    led: Led | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    router: Router
    project_name: str
    # Names.
    networks: tuple[str, ...]
    # '' where it has no outer side.
    outer_name: str
    # Names of the hosts that may carry its outer side, the first one that lives does.
    gateways: tuple[str, ...]
    # Its own, outer one first, then floating ones that come in by it.
    addresses: tuple[HeldAddress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterWish:
    """'' as the network: no outer side. '' as the address: the lowest free one."""

    network: str
    address: str = ""


def create(
    session: Session, *, name: str, networks: Sequence[str], outer: OuterWish, project: Project, actor: Actor, now: datetime
) -> RouterView:
    """Return the new router with these networks behind it. AlreadyExists where the name is taken."""
    routers.lock(session, project.id)
    router = routers.insert(session, router_id=mint("rt"), project_id=project.id, name=name, now=now)
    for i, network in enumerate(networks):
        _put_behind(session, router, network, project=project, field=f"networks[{i}]")
    if outer.network:
        _set_outer(session, router, outer, project=project, expected_version=None)
    _tell(session, router, "created", actor, now)
    return get(session, router.id, project=project)


def change(
    session: Session,
    name_or_id: str,
    outer: OuterWish,
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> RouterView:
    """Give the router another outer side, or none. Conflict where a floating address comes in by the one that it has."""
    routers.lock(session, project.id)
    router = find(session, name_or_id, project=project)
    if not outer.network and outer.address:
        raise InvalidRequest("outer-missing", "outer_address: name the network that it is an address of", field="outer_address")
    _refuse_floating(session, router, _behind(session, router), lost="its outer side cannot be changed")
    if outer.network:
        _set_outer(session, router, outer, project=project, expected_version=expected_version)
    else:
        routers.set_outer(session, router, network_id=None, address=None, expected_version=expected_version)
    _tell(session, router, "changed", actor, now)
    return get(session, router.id, project=project)


def attach(
    session: Session,
    name_or_id: str,
    network: str,
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> RouterView:
    """Put an overlay network of the project behind the router. Conflict where it is behind another one."""
    routers.lock(session, project.id)
    router = find(session, name_or_id, project=project)
    _put_behind(session, router, network, project=project, field="network")
    routers.touch(session, router, expected_version=expected_version)
    _tell(session, router, "changed", actor, now)
    return get(session, router.id, project=project)


def detach(
    session: Session,
    name_or_id: str,
    network: str,
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> RouterView:
    """Take a network away from the router. Conflict where a floating address leads to a vm on it."""
    routers.lock(session, project.id)
    router = find(session, name_or_id, project=project)
    found = next((one for one in _behind(session, router) if network in {one.name, one.id}), None)
    if found is None:
        known = ", ".join(one.name for one in _behind(session, router)) or "none are"
        raise NotFound("network-not-behind", f"network: {network} is not behind router {router.name}; behind it: {known}")
    _refuse_floating(session, router, (found,), lost=f"network {found.name} cannot be taken away")
    routers.set_router(session, found, "")
    routers.touch(session, router, expected_version=expected_version)
    _tell(session, router, "changed", actor, now)
    return get(session, router.id, project=project)


def delete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> None:
    """Delete a router that no network is behind. Conflict names those that are."""
    routers.lock(session, project.id)
    router = find(session, name_or_id, project=project)
    behind = _behind(session, router)
    if behind:
        raise Conflict(
            "router-in-use",
            f"router {router.name} is used by networks {', '.join(one.name for one in behind[:_NAMED_MAX])}; "
            f"`trimtab router detach {router.name} --network {behind[0].name}` takes one away",
            router=router.name,
        )
    routers.delete(session, router, expected_version=expected_version, now=now)
    _tell(session, router, "deleted", actor, now)


def find(session: Session, name_or_id: str, *, project: Project) -> Router:
    router = routers.find(session, project.id, name_or_id)
    if router is None:
        message = f"there is no router {name_or_id} in project {project.name}; see `trimtab router list`"
        raise NotFound("router-not-found", message, router=name_or_id)
    return router


def get(session: Session, name_or_id: str, *, project: Project) -> RouterView:
    return views(session, (find(session, name_or_id, project=project),), project=project)[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[RouterView, ...], tuple[str, str] | None]:
    found, after = routers.page(session, page, project_id=project.id)
    return views(session, found, project=project), after


def views(session: Session, found: Sequence[Router], *, project: Project) -> tuple[RouterView, ...]:
    behind = routers.networks_behind(session, [project.id]) if found else ()
    outer_ids = {router.outer_network_id for router in found}
    names = lookup.names(session, schema.network, outer_ids)
    hosts = overlays.gateway_hosts(session, [one for one in outer_ids if one])
    host_names = {host.chassis: host.name for each in hosts.values() for host in each}
    leading = floating.leading_into(session, [one.id for one in behind])
    led = floating.led_to(session, [one.nic_id for one in leading if one.nic_id])
    of = {router.id: tuple(one for one in behind if one.settings["router"] == router.name) for router in found}
    return tuple(
        RouterView(
            router=router,
            project_name=project.name,
            networks=tuple(one.name for one in of[router.id]),
            outer_name=names.get(router.outer_network_id or "", ""),
            gateways=tuple(
                host_names[one]
                for one in gateways(router_key_of(router.project_id, router.name), hosts.get(router.outer_network_id or "", ()))
            ),
            addresses=_held(router, of[router.id], names.get(router.outer_network_id or "", ""), leading, led),
        )
        for router in found
    )


def _held(
    router: Router, behind: Sequence[Network], outer_name: str, leading: Sequence[FloatingAddress], led: Mapping[str, Led]
) -> tuple[HeldAddress, ...]:
    """Return what the router answers for: its own addresses, and those floating ones that lead to cards behind it."""
    outer = (HeldAddress(address=router.outer_address, network=outer_name),) if router.outer_address else ()
    inner = tuple(
        HeldAddress(address=gateway_of(one.kind, subnet), network=one.name)
        for one in behind
        for subnet in (one.subnet, one.subnet6)
        if subnet
    )
    there = {one.id for one in behind}
    coming = tuple(
        HeldAddress(address=one.name, network=outer_name, led=found)
        for one in leading
        if (found := led.get(one.nic_id or "")) is not None and found.network_id in there
    )
    return (*outer, *inner, *coming)


def _behind(session: Session, router: Router) -> tuple[Network, ...]:
    found = routers.networks_behind(session, [router.project_id])
    return tuple(one for one in found if one.settings["router"] == router.name)


def _put_behind(session: Session, router: Router, name_or_id: str, *, project: Project, field: str) -> None:
    network = network_service.find(session, name_or_id, project=project)
    if network.kind != "overlay" or network.project_id != project.id or not network.subnet:
        message = f"{field}: a router takes overlay networks of its project that have a subnet; network {network.name} is none"
        raise InvalidRequest("network-not-overlay", message, field=field)
    other = network.settings.get("router", "")
    if other not in {"", router.name}:
        raise Conflict(
            "network-has-router",
            f"{field}: network {network.name} is behind router {other}; "
            f"`trimtab router detach {other} --network {network.name}` takes it away",
            field=field,
        )
    if not other:
        network_service.hold(session, network)
        routers.set_router(session, network, router.name)


def _set_outer(session: Session, router: Router, wish: OuterWish, *, project: Project, expected_version: int | None) -> None:
    outer = outer_networks.find(session, wish.network, project=project, field="outer")
    if router.outer_network_id == outer.network.id and wish.address in {"", router.outer_address}:
        return
    address = outer_networks.take_address(session, outer, wish.address, project=project, field="outer_address")
    routers.set_outer(session, router, network_id=outer.network.id, address=address, expected_version=expected_version)


def _refuse_floating(session: Session, router: Router, behind: Sequence[Network], *, lost: str) -> None:
    """Raise Conflict where floating addresses lead to cards on these networks: they would lead nowhere."""
    names = floating.addresses_into(session, [network.id for network in behind])
    if names:
        raise Conflict(
            "router-in-use",
            f"router {router.name}: {lost}, floating address {', '.join(names[:_NAMED_MAX])} comes in by it; "
            f"`trimtab floating detach {names[0]}` first",
            router=router.name,
        )


def _tell(session: Session, router: Router, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"router.{what}",
        project_id=router.project_id,
        subject_id=router.id,
        actor=actor.name,
        message=f"router {router.name} {what}",
        now=now,
    )
