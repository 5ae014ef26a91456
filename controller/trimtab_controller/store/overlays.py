"""What overlay networks, their cards and the hosts of those look like in SQL, as OVN shall be told of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core import firewall
from trimtab_controller.core.overlay import OverlayCard, OverlayNetwork
from trimtab_controller.core.overlay_groups import MOVED_GRACE_S, OverlayGroup
from trimtab_controller.core.overlay_outside import Floating, GatewayHost, OuterNetwork, OuterSide, Outside
from trimtab_controller.store import schema
from trimtab_controller.store.among import among
from trimtab_controller.store.inserts import insert_unless_taken

_network, _nic, _vm, _host, _migration = schema.network, schema.nic, schema.vm, schema.host, schema.migration

# Plan: network by kind is a scan of a small table; nics by ix_nic_network_id.
_IS_LIVE_OVERLAY = sa.and_(_network.c.kind == "overlay", _network.c.deleted_at.is_(None))
_NETWORKS = sa.select(
    _network.c.id, _network.c.project_id, _network.c.subnet, _network.c.mtu, _network.c.has_dhcp, _network.c.settings
).where(_IS_LIVE_OVERLAY)
_CARDS = (
    sa.select(
        _nic.c.id,
        _nic.c.network_id,
        _nic.c.mac,
        _nic.c.allows_spoofing,
        _nic.c.vm_id,
        _vm.c.name,
        _vm.c.host_id,
        _migration.c.target_host_id,
    )
    .join(_network, _network.c.id == _nic.c.network_id)
    .join(_vm, _vm.c.id == _nic.c.vm_id)
    .outerjoin(_migration, _migration.c.vm_id == _vm.c.id)
    .where(_IS_LIVE_OVERLAY)
)
_ADDRESSES = (
    sa.select(schema.nic_address.c.nic_id, schema.nic_address.c.address, schema.nic_address.c.prefix_length)
    .join(_network, _network.c.id == schema.nic_address.c.network_id)
    .where(_network.c.kind == "overlay")
    .order_by(schema.nic_address.c.address)
)
_CHASSIS = sa.select(_host.c.id, _host.c.inventory["overlay_chassis"].as_string().label("chassis")).where(
    _host.c.deleted_at.is_(None), _host.c.inventory.is_not(None)
)


def read(session: Session) -> tuple[tuple[OverlayNetwork, ...], tuple[OverlayCard, ...]]:
    """Return every overlay network and every card on one. While a vm moves live its cards are on both of its hosts, the source first."""
    networks = tuple(
        OverlayNetwork(
            network_id=row.id,
            subnet=row.subnet,
            mtu=row.mtu,
            has_dhcp=row.has_dhcp,
            project_id=row.project_id,
            router=str(row.settings.get("router", "")),
            subnet6=str(row.settings.get("subnet6", "")),
            has_dhcp6=bool(row.settings.get("has_dhcp6", False)),
        )
        for row in session.execute(_NETWORKS)
    )
    if not networks:
        return (), ()
    chassis = {row.id: row.chassis or "" for row in session.execute(_CHASSIS)}
    addresses: dict[str, tuple[str, ...]] = {}
    for row in session.execute(_ADDRESSES):
        addresses[row.nic_id] = (*addresses.get(row.nic_id, ()), f"{row.address}/{row.prefix_length}")
    cards = tuple(
        OverlayCard(
            nic_id=row.id,
            network_id=row.network_id,
            mac=row.mac,
            addresses=addresses.get(row.id, ()),
            vm_name=row.name,
            vm_id=row.vm_id,
            chassis=_both(chassis.get(row.host_id, ""), chassis.get(row.target_host_id or "", "")),
            allows_spoofing=row.allows_spoofing,
        )
        for row in session.execute(_CARDS)
    )
    return networks, cards


def _both(home: str, target: str) -> str:
    return ",".join(dict.fromkeys(one for one in (home, target) if one))


# --- the way out -------------------------------------------------------------------------------------------------------------

OUTER_CAPABILITY = "outer-networks"
"""Of an agent that can be told of one; an earlier one takes it for an ordinary bridge."""


def read_outside(session: Session) -> Outside:
    """Return outer networks with the hosts that reach them, routers' outer sides, and floating addresses that lead somewhere now."""
    router, floating = schema.router, schema.floating
    sides = tuple(
        OuterSide(
            project_id=row.project_id, router=row.name, outer_network_id=row.outer_network_id, address=str(row.outer_address)
        )
        for row in session.execute(sa.select(router).where(router.c.deleted_at.is_(None), router.c.outer_network_id.is_not(None)))
    )
    if not sides:
        return Outside()
    wanted = sorted({side.outer_network_id for side in sides})
    hosts = gateway_hosts(session, wanted)
    rows = session.execute(sa.select(_network).where(_network.c.id.in_(wanted), _network.c.deleted_at.is_(None)))
    leading = (
        sa.select(floating.c.id, floating.c.network_id, floating.c.name, floating.c.nic_id)
        .join(_nic, _nic.c.id == floating.c.nic_id)
        .join(_vm, _vm.c.id == _nic.c.vm_id)
        .where(floating.c.deleted_at.is_(None), _vm.c.deleted_at.is_(None))
    )
    return Outside(
        networks=tuple(
            OuterNetwork(
                network_id=row.id,
                subnet=row.subnet,
                gateway=str(row.settings["outer"]["gateway"]),
                vlan=row.vlan,
                hosts=hosts.get(row.id, ()),
            )
            for row in rows
        ),
        sides=sides,
        floating=tuple(
            Floating(floating_id=row.id, outer_network_id=row.network_id, address=row.name, nic_id=row.nic_id)
            for row in session.execute(leading)
        ),
    )


def gateway_hosts(session: Session, network_ids: Sequence[str]) -> dict[str, tuple[GatewayHost, ...]]:
    """Return the hosts that have said that they reach each of these outer networks and are OVN's."""
    if not network_ids:
        return {}
    mapping = schema.network_host
    query = (
        sa.select(mapping.c.network_id, _host.c.name, _host.c.connectivity, _host.c.is_cordoned, _host.c.inventory)
        .join(_host, _host.c.id == mapping.c.host_id)
        .where(among(mapping.c.network_id, network_ids), mapping.c.state == "ready")
        .where(_host.c.deleted_at.is_(None), _host.c.inventory.is_not(None))
        .order_by(_host.c.id)
    )
    found: dict[str, tuple[GatewayHost, ...]] = {}
    for row in session.execute(query):
        chassis = str(row.inventory.get("overlay_chassis", ""))
        if chassis and OUTER_CAPABILITY in row.inventory.get("capabilities", ()):
            host = GatewayHost(
                chassis=chassis,
                name=row.name,
                is_up=row.connectivity == "up",
                is_cordoned=row.is_cordoned,
                is_off=row.connectivity == "fenced",
            )
            found[row.network_id] = (*found.get(row.network_id, ()), host)
    return found


# --- security groups -----------------------------------------------------------------------------------------------------------


def read_groups(session: Session, *, now: datetime) -> tuple[tuple[OverlayGroup, ...], frozenset[str]]:
    """Return the groups of vms with cards on overlay networks, and which of these vms move or moved a short while ago."""
    group, member, operation = schema.secgroup, schema.secgroup_member, schema.operation
    query = (
        sa.select(group.c.id, group.c.rules, member.c.vm_id)
        .join(member, member.c.secgroup_id == group.c.id)
        .join(_nic, _nic.c.vm_id == member.c.vm_id)
        .join(_network, _network.c.id == _nic.c.network_id)
        .where(group.c.deleted_at.is_(None), _IS_LIVE_OVERLAY)
        .distinct()
        .order_by(group.c.id, member.c.vm_id)
    )
    rules: dict[str, Sequence[str]] = {}
    vms: dict[str, list[str]] = {}
    for row in session.execute(query):
        rules[row.id] = row.rules
        vms.setdefault(row.id, []).append(row.vm_id)
    if not vms:
        return (), frozenset()
    since = now - timedelta(seconds=MOVED_GRACE_S)
    # Plan: ix_operation_ended_at, a short range of it.
    arrived = sa.select(operation.c.subject_id).where(operation.c.ended_at > since, operation.c.kind == "vm.migrate")
    moving = {*session.scalars(sa.select(_migration.c.vm_id)), *session.scalars(arrived)}
    groups = tuple(
        OverlayGroup(
            group_id=group_id,
            rules=tuple(one for text in rules[group_id] if isinstance(one := firewall.parse_rule(text), firewall.Rule)),
            vm_ids=tuple(vm_ids),
        )
        for group_id, vm_ids in vms.items()
    )
    return groups, frozenset(moving)


def has_cards(session: Session, vm_ids: Sequence[str]) -> bool:
    """Tell whether one of these vms has a card on an overlay network."""
    query = sa.select(_nic.c.id).join(_network, _network.c.id == _nic.c.network_id)
    return session.execute(query.where(_IS_LIVE_OVERLAY, among(_nic.c.vm_id, vm_ids)).limit(1)).first() is not None


# --- how far OVN has followed --------------------------------------------------------------------------------------------------

_state = schema.overlay_state


@dataclass(frozen=True, slots=True)
class OverlayState:
    is_up: bool = True
    problem: str = ""
    since: datetime | None = None
    asked: int = 0
    answered: int = 0


def state(session: Session) -> OverlayState:
    """Return how the last round went, and how far who waits has been answered."""
    row = session.execute(sa.select(_state)).one_or_none()
    return OverlayState(row.is_up, row.problem, row.since, row.asked, row.answered) if row else OverlayState()


def ask(session: Session) -> int:
    """Ask that OVN be told of what is true now, and return the number that `answered` reaches once it is."""
    _ensure_state(session)
    session.execute(_state.update().values(asked=_state.c.asked + 1))
    return state(session).asked


def answer(session: Session, asked: int) -> None:
    """Note that OVN's database is as SQL was when this was asked."""
    session.execute(_state.update().where(_state.c.answered < asked, _state.c.asked >= asked).values(answered=asked))


def tell_state(session: Session, *, problem: str, now: datetime) -> None:
    """Note whether OVN's database answers; '' where it does."""
    _ensure_state(session)
    session.execute(_state.update().values(is_up=not problem, problem=problem[:500], since=now))


def _ensure_state(session: Session) -> None:
    insert_unless_taken(session, _state, {"id": 1})
