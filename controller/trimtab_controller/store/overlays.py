"""What overlay networks, their cards and the hosts of those look like in SQL, as OVN shall be told of them."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.overlay import OverlayCard, OverlayNetwork
from trimtab_controller.store import schema

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
            chassis=_both(chassis.get(row.host_id, ""), chassis.get(row.target_host_id or "", "")),
            allows_spoofing=row.allows_spoofing,
        )
        for row in session.execute(_CARDS)
    )
    return networks, cards


def _both(home: str, target: str) -> str:
    return ",".join(dict.fromkeys(one for one in (home, target) if one))
