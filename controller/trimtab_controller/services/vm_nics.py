"""The cards of vms: what is asked for, what comes of it, and the row that holds its MAC and address against everybody else."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint, system_rng
from trimtab_controller.core import addresses as addressing
from trimtab_controller.core.ids import free_mac_address
from trimtab_controller.core.model import Actor, Network, Nic, Project, Role
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import seeds
from trimtab_controller.services.authorise import require
from trimtab_controller.store import networks
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NoCapacity


@dataclass(frozen=True, slots=True, kw_only=True)
class NicWish:
    network: str
    mac: str = ""
    # `10.0.0.5` or `10.0.0.5/24`; '' draws a free one where the network has a subnet.
    ip: str = ""
    # It may send as others, as a router does; takes an administrator of the fleet.
    allows_spoofing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedNic:
    nic: Nic
    network: Network
    # Whether the user named the MAC: then no other will do.
    is_mac_given: bool
    # Whether the user named the address.
    is_address_given: bool

    @property
    def told(self) -> seeds.SeedNic:
        """The nic as the guest's seed is told of it: an address that was drawn is DHCP's to say where that answers for the network."""
        is_dhcps = self.network.has_dhcp and not self.is_address_given
        return seeds.SeedNic(
            nic_index=self.nic.nic_index,
            mac=self.nic.mac,
            addresses=() if is_dhcps else self.nic.addresses,
            gateway=self.network.gateway,
            dns=self.network.dns,
        )


def require_spoofing(wish: NicWish, actor: Actor) -> None:
    """Raise PermissionDenied where somebody else than an administrator of the fleet wants a card that may send as others."""
    if wish.allows_spoofing:
        require(actor, Role.ADMIN, "")


def plan_nic(
    session: Session,
    vm_id: str,
    index: int,
    wish: NicWish,
    *,
    project: Project,
    field: str,
    model: str = "virtio",
    beside: Sequence[PlannedNic] = (),
) -> PlannedNic:
    """Return the nic as it is going to be; the database has the last word about its MAC and address.

    `beside`: other nics of the vm that are not inserted yet.
    """
    network = network_service.find(session, wish.network, project=project)
    if "outer" in network.settings:
        message = (
            f"{field}.network: {network.name} is the way out of overlay networks, which vms are not on themselves; "
            "`trimtab floating create` gives one an address there"
        )
        raise InvalidRequest("network-outer", message, field=f"{field}.network")
    mac = wish.mac.lower() or free_mac_address(system_rng(), is_taken=partial(networks.is_mac_taken, session))
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidRequest("mac-wrong", f'{field}.mac: a unicast MAC, for example "52:54:00:12:34:56"', field=f"{field}.mac")
    addresses = _addresses(session, network, wish.ip, mac, beside, field=f"{field}.ip")
    nic = Nic(
        id=mint("nic"),
        vm_id=vm_id,
        network_id=network.id,
        nic_index=index,
        mac=mac,
        model=model,
        addresses=addresses,
        allows_spoofing=wish.allows_spoofing,
    )
    return PlannedNic(nic=nic, network=network, is_mac_given=bool(wish.mac), is_address_given=bool(wish.ip))


def _addresses(
    session: Session, network: Network, asked: str, mac: str, beside: Sequence[PlannedNic], *, field: str
) -> tuple[str, ...]:
    """Return the card's addresses: of each of the network's subnets the one asked for, else one that is free."""
    has_asked6 = ":" in asked and bool(network.subnet6)
    found: tuple[str, ...] = ()
    if asked:
        subnet = network.subnet6 if has_asked6 else network.subnet
        gateway = network.gateway or addressing.gateway_of(network.kind, subnet)
        address, prefix_length = seeds.parse_address(asked, subnet, gateway=gateway, field=field)
        found = (f"{address}/{prefix_length}",)
    if network.subnet and (not asked or has_asked6):
        found = (*_draw_address(session, network, beside, field=field), *found)
    if network.subnet6 and not has_asked6:
        # Nobody else's, since nobody else has its MAC; and the one that a guest makes by itself.
        found = (*found, f"{addressing.made_of_mac(mac, network.subnet6)}/{addressing.GUESTS_PREFIX6}")
    return found


def _draw_address(session: Session, network: Network, beside: Sequence[PlannedNic], *, field: str) -> tuple[str, ...]:
    """Return the lowest free address of the network's subnet. NoCapacity where there is none; IPv6 guests make their own.

    The LAN's router and DNS servers have theirs already; a DNS server that is a vm asks for its own.
    """
    network_service.hold(session, network)
    lans = {*network.dns, network.gateway} - {""}
    coming = {text.partition("/")[0] for one in beside if one.network.id == network.id for text in one.nic.addresses}
    address = addressing.first_free(network.subnet, networks.addresses_on(session, network.id) | coming | lans)
    if address is not None:
        return (f"{address}/{network.subnet.partition('/')[2]}",)
    if ":" in network.subnet:
        return ()
    cure = "delete vms and `trimtab vm purge` them, or make another network"
    message = f"{field}: every address of network {network.name} ({network.subnet}) is taken; {cure}"
    raise NoCapacity("addresses-taken", message, field=field)


def insert_nic(session: Session, planned: PlannedNic, *, now: datetime, field: str) -> Nic:
    """Insert one nic with its declared address. AlreadyExists names who has the MAC or the address already."""
    nic = planned.nic
    if networks.is_unmanaged_mac(session, nic.mac) or not networks.insert_nic(session, nic, now=now):
        holder = networks.mac_holder(session, nic.mac)
        again = "" if planned.is_mac_given else "; it was drawn by lot, so send the request again"
        raise AlreadyExists("mac-taken", f"{field}.mac: {nic.mac} belongs to {holder}{again}", field=f"{field}.mac")
    network_service.require_live(session, planned.network)
    for text in nic.addresses:
        address, _, prefix_length = text.partition("/")
        is_free = networks.insert_address(
            session, network_id=nic.network_id, address=address, prefix_length=int(prefix_length), nic_id=nic.id
        )
        if not is_free:
            _refuse_address(session, planned.network, address, vm_id=nic.vm_id, field=f"{field}.ip")
    return nic


def _refuse_address(session: Session, network: Network, address: str, *, vm_id: str, field: str) -> None:
    holder = networks.address_holder(session, network.id, address)
    if holder is None:
        raise Conflict("address-moved", f"{field}: {address} was taken and freed just now; send the request again", field=field)
    if holder.vm_id == vm_id:
        raise InvalidRequest("address-twice", f"{field}: {address} is given to two nics of this vm", field=field)
    hidden = " (deleted, kept until it is purged: `trimtab vm purge`)" if holder.deleted_at is not None else ""
    who = f"vm {holder.vm_name}{hidden}"
    raise AlreadyExists("address-taken", f"{field}: {address} on network {network.name} belongs to {who}", field=field)
