"""Networks: of a project, or shared by all."""

import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.addresses import (
    LONGEST_OWN_PREFIX,
    gateway_problem,
    name_server_problem,
    outer_problem,
    overlapping,
    subnet6_problem,
)
from trimtab_controller.core.model import Actor, Network, Operation, Project, Role
from trimtab_controller.core.overlay import TUNNEL_OVERHEAD
from trimtab_controller.operations.accept import accept
from trimtab_controller.services.authorise import require
from trimtab_controller.store import hosts, keyset, lookup, networks, routers, schema
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

OVERLAY_MTU_MAX = 65535 - TUNNEL_OVERHEAD
DNS_MAX = 3
"""Of a LAN's DNS servers: the resolver of glibc asks no more of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSpec:
    """Its router, and the addresses, from first to last, that are ours to give to routers and as floating ones."""

    gateway: str
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    name: str
    # bridge, nat, isolated or overlay.
    kind: str
    bridge: str = ""
    # Host (name or id) -> its own bridge.
    bridges: Mapping[str, str]
    vlan: int = 0
    mtu: int = 1500
    subnet: str = ""
    has_dhcp: bool = False
    # Of an overlay network, beside `subnet`. Its guests make their addresses of their MACs, or (`has_dhcp6`) are given the same ones.
    subnet6: str = ""
    has_dhcp6: bool = False
    # Of an overlay network: the router that it shares with others of its project; '' for none.
    router: str = ""
    # Of a network on a bridge that is the way out of overlay networks.
    outer: OuterSpec | None = None
    # Of another network on a bridge, whose LAN they are of: seeds say them. At most `DNS_MAX`.
    gateway: str = ""
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkView:
    network: Network
    # '' for a shared one.
    project_name: str
    # By host name.
    hosts: dict[str, networks.NetworkOnHost]


def create(
    session: Session,
    spec: NetworkSpec,
    *,
    project: Project | None,
    actor: Actor,
    now: datetime,
    has_overlay: bool = False,
) -> tuple[NetworkView, Operation]:
    """Insert a network (project None: shared) and accept its making. `has_overlay`: the controller knows an OVN.

    A bridge is the host's own network, so only an administrator of the fleet may attach a network to one.
    """
    _check(spec)
    if spec.kind == "overlay" or spec.outer is not None:
        require_overlay(has_overlay, field="kind" if spec.kind == "overlay" else "outer")
    if spec.kind == "bridge":
        require(actor, Role.ADMIN, "")
    project_id = project.id if project else ""
    if spec.router and project_id:
        # Before the networks are locked: who changes a router locks in this order too.
        routers.lock(session, project_id)
    for field, subnet in (("subnet", spec.subnet), ("subnet6", spec.subnet6)):
        _refuse_overlap(session, subnet, project_id=project_id, field=field)
    network = networks.insert(
        session,
        network_id=mint("net"),
        bridges=_by_host_id(session, spec.bridges),
        now=now,
        project_id=project_id,
        name=spec.name,
        kind=spec.kind,
        bridge=spec.bridge,
        vlan=spec.vlan,
        mtu=spec.mtu,
        subnet=spec.subnet,
        has_dhcp=spec.has_dhcp,
        settings=_settings(spec),
    )
    if spec.router and project_id:
        routers.ensure(session, router_id=mint("rt"), project_id=project_id, name=spec.router, now=now)
    operation = accept(
        session,
        "network.create",
        subject_id=network.id,
        subject_name=network.name,
        project_id=project_id,
        params={"network_id": network.id},
        actor=actor,
        now=now,
    )
    return views(session, (network,))[0], operation


def _settings(spec: NetworkSpec) -> dict[str, Any]:
    return (
        ({"router": spec.router} if spec.router else {})
        | ({"outer": asdict(spec.outer)} if spec.outer else {})
        | ({"subnet6": spec.subnet6, "has_dhcp6": spec.has_dhcp6} if spec.subnet6 else {})
        | ({"gateway": str(ipaddress.ip_address(spec.gateway))} if spec.gateway else {})
        | ({"dns": [str(ipaddress.ip_address(one)) for one in spec.dns]} if spec.dns else {})
    )


def require_overlay(has_overlay: bool, *, field: str) -> None:
    """Raise InvalidRequest where the controller knows no OVN."""
    if not has_overlay:
        message = f"{field}: this fleet has no OVN; name its northbound database in the controller's settings: ovn_northbound"
        raise InvalidRequest("overlay-off", message, field=field)


def delete(
    session: Session,
    name_or_id: str,
    *,
    project: Project | None,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Operation:
    """Accept the removal of a network without nics. Conflict names the vms that use it."""
    network = find(session, name_or_id, project=project)
    if network.project_id == "":
        require(actor, Role.ADMIN, "")
    users = networks.dependants(session, network.id)
    if users:
        raise Conflict("network-in-use", f"network {network.name} is used by {', '.join(users)}", network=network.name)
    networks.check_version(session, network.id, expected_version)
    return accept(
        session,
        "network.delete",
        subject_id=network.id,
        subject_name=network.name,
        project_id=network.project_id,
        params={"network_id": network.id},
        actor=actor,
        now=now,
    )


def find(session: Session, name_or_id: str, *, project: Project | None) -> Network:
    network = networks.find(session, project.id if project else "", name_or_id)
    if network is None:
        raise NotFound("network-not-found", f"there is no network {name_or_id} here", network=name_or_id)
    return network


def hold(session: Session, network: Network) -> None:
    """Let nobody else draw an address of the network until this transaction ends. NotFound where it was deleted meanwhile."""
    if not networks.lock(session, network.id):
        raise _gone(network.name)


def require_live(session: Session, network: Network) -> None:
    """Raise NotFound where the network was deleted since it was read: call it once a row of this transaction refers to it."""
    if not networks.is_live(session, network.id):
        raise _gone(network.name)


def _gone(name: str) -> NotFound:
    return NotFound("network-not-found", f"there is no network {name} here any more: it was deleted just now", network=name)


def get(session: Session, name_or_id: str, *, project: Project | None) -> NetworkView:
    return views(session, (find(session, name_or_id, project=project),))[0]


def page(
    session: Session, page: keyset.Page, *, project: Project | None
) -> tuple[tuple[NetworkView, ...], tuple[str, str] | None]:
    found, next_after = networks.page(session, page, project_id=project.id if project else "")
    return views(session, found), next_after


def views(session: Session, found: tuple[Network, ...]) -> tuple[NetworkView, ...]:
    on_hosts = networks.hosts_of(session, [network.id for network in found])
    names = lookup.names_in(
        session,
        {
            schema.host: {one.host_id for states in on_hosts.values() for one in states},
            schema.project: {network.project_id for network in found},
        },
    )
    return tuple(
        NetworkView(
            network=network,
            project_name=names.get(network.project_id, ""),
            hosts={names.get(one.host_id, one.host_id): one for one in on_hosts[network.id]},
        )
        for network in found
    )


def _check(spec: NetworkSpec) -> None:
    """Refuse what contradicts itself, naming the field."""
    _check_kind(spec)
    _check_subnet(spec)
    _check_subnet6(spec)
    _check_lan(spec)
    if spec.outer is not None:
        problem = outer_problem(spec.subnet, spec.outer.gateway, spec.outer.first, spec.outer.last)
        if problem is not None:
            raise InvalidRequest("outer-wrong", f"{problem[0]}: {problem[1]}", field=problem[0])


def _check_kind(spec: NetworkSpec) -> None:
    if spec.kind == "bridge":
        if not spec.bridge and not spec.bridges:
            raise InvalidRequest("bridge-missing", 'bridge: name the bridge of the hosts, for example "br0"', field="bridge")
        if spec.has_dhcp:
            raise InvalidRequest("dhcp-on-bridge", "dhcp: Trimtab serves no DHCP on a bridge it did not make", field="dhcp")
    else:
        for field, value in (("bridge", spec.bridge), ("bridges", spec.bridges), ("vlan", spec.vlan)):
            if value:
                raise InvalidRequest(f"{field}-not-allowed", f"{field}: only networks of kind bridge have one", field=field)
    if spec.kind == "overlay" and spec.mtu > OVERLAY_MTU_MAX:
        message = f"mtu: an overlay network takes at most {OVERLAY_MTU_MAX}, since {TUNNEL_OVERHEAD} bytes go to its tunnels"
        raise InvalidRequest("mtu-too-large", message, field="mtu")
    if spec.router and spec.kind != "overlay":
        raise InvalidRequest("router-not-allowed", "router: only overlay networks have one", field="router")
    if spec.outer is not None and spec.kind != "bridge":
        raise InvalidRequest("outer-not-allowed", "outer: only a network on a bridge is a way out", field="outer")


def _check_subnet(spec: NetworkSpec) -> None:
    if not spec.subnet:
        if spec.kind == "nat" or spec.has_dhcp or spec.router or spec.outer is not None:
            raise InvalidRequest("subnet-missing", 'subnet: give one, for example "10.20.0.0/24"', field="subnet")
        return
    try:
        subnet = ipaddress.ip_network(spec.subnet)
    except ValueError as error:
        raise InvalidRequest("subnet-wrong", f'subnet: {error}; for example "10.20.0.0/24"', field="subnet") from error
    if spec.kind != "bridge" and (subnet.version == 6 or subnet.prefixlen > LONGEST_OWN_PREFIX):
        message = f"subnet: an IPv4 network of /{LONGEST_OWN_PREFIX} or larger, for example 10.20.0.0/24, not {spec.subnet}"
        if subnet.version == 6 and spec.kind == "overlay":
            message += "; an IPv6 one goes beside it, as subnet6"
        raise InvalidRequest("subnet-wrong", message, field="subnet")


def _check_subnet6(spec: NetworkSpec) -> None:
    if not spec.subnet6:
        if spec.has_dhcp6:
            raise InvalidRequest("subnet6-missing", "ipv6: without subnet6 there are no addresses to give", field="ipv6")
        return
    if spec.kind != "overlay":
        message = "subnet6: only overlay networks have one; a bridge has the routers and subnets of its LAN"
        raise InvalidRequest("subnet6-not-allowed", message, field="subnet6")
    if not spec.subnet:
        message = 'subnet: an overlay network with an IPv6 subnet has an IPv4 one too, for example "10.20.0.0/24"'
        raise InvalidRequest("subnet-missing", message, field="subnet")
    problem = subnet6_problem(spec.subnet6)
    if problem:
        raise InvalidRequest("subnet6-wrong", f"subnet6: {problem}", field="subnet6")


def _check_lan(spec: NetworkSpec) -> None:
    """Refuse a router or DNS servers of a LAN where there is none, or that guests on it could not reach."""
    for field, value in (("gateway", spec.gateway), ("dns", spec.dns)):
        if not value:
            continue
        if spec.kind != "bridge":
            message = f"{field}: only networks of kind bridge have one; guests on others are told by DHCP (--dhcp)"
            raise InvalidRequest(f"{field}-not-allowed", message, field=field)
        if spec.outer is not None:
            message = f"{field}: no vm is on a way out, whose router is outer.gateway; leave it out"
            raise InvalidRequest(f"{field}-not-allowed", message, field=field)
        if not spec.subnet:
            message = f'subnet: guests are told of {field} with addresses of a subnet; give one, for example "192.0.2.0/24"'
            raise InvalidRequest("subnet-missing", message, field="subnet")
    if spec.gateway and (problem := gateway_problem(spec.subnet, spec.gateway)):
        raise InvalidRequest("gateway-wrong", f"gateway: {problem}", field="gateway")
    for i, one in enumerate(spec.dns):
        if problem := name_server_problem(one):
            raise InvalidRequest("dns-wrong", f"dns[{i}]: {problem}", field=f"dns[{i}]")


def _refuse_overlap(session: Session, subnet: str, *, project_id: str, field: str) -> None:
    """Refuse a subnet that another network has a part of: a host could not tell where an address is, and a guest would have two."""
    if not subnet:
        return
    networks.lock_subnets(session)
    there = {network.id: network for network in networks.with_subnet(session)}
    others = [(network.id, one) for network in there.values() for one in (network.subnet, network.subnet6) if one]
    taken = overlapping(subnet, others)
    if taken is None:
        return
    other = there[taken]
    is_visible = other.project_id in {"", project_id}
    theirs = ", ".join(one for one in (other.subnet, other.subnet6) if one)
    who = f"network {other.name} ({theirs})" if is_visible else "a network of another project"
    raise Conflict(
        "subnet-overlaps",
        f"{field}: {subnet} overlaps with {who}; choose another (`trimtab network list` shows those in use)",
        field=field,
    )


def _by_host_id(session: Session, bridges: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, bridge in bridges.items():
        host = hosts.find(session, name)
        if host is None:
            raise NotFound("host-not-found", f"bridges: there is no host {name}", host=name)
        found[host.id] = bridge
    return found
