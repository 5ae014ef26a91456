"""Outer networks: the operator's own network beyond overlay ones, of whose addresses a range is ours to give."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from trimtab_controller.core import addresses
from trimtab_controller.core.model import Network, Project
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import seeds
from trimtab_controller.store import routers
from trimtab_protos.errors import AlreadyExists, InvalidRequest, NoCapacity


@dataclass(frozen=True, slots=True)
class OuterNet:
    network: Network
    gateway: str
    first: str
    last: str


def find(session: Session, name_or_id: str, *, project: Project, field: str) -> OuterNet:
    """Return the outer network. InvalidRequest where it is another kind of network."""
    network = network_service.find(session, name_or_id, project=project)
    outer = network.settings.get("outer")
    if outer is None:
        message = (
            f"{field}: network {network.name} is no way out; `trimtab network create NAME --bridge br0 --outer --subnet CIDR "
            "--gateway ADDRESS --range FIRST-LAST` makes one"
        )
        raise InvalidRequest("network-not-outer", message, field=field)
    return OuterNet(network, **outer)


def take_address(session: Session, outer: OuterNet, asked: str, *, project: Project, field: str) -> str:
    """Return an address that nobody else can take until this transaction ends: the one asked for, or the lowest free one.

    InvalidRequest outside of the range, AlreadyExists where somebody has it, NoCapacity where all are taken.
    """
    network = outer.network
    network_service.hold(session, network)
    taken = routers.outer_addresses(session, network.id)
    bounds = f"{outer.first}-{outer.last}"
    if not asked:
        found = addresses.first_free_between(outer.first, outer.last, taken)
        if found is None:
            message = f"{field}: every address of network {network.name} ({bounds}) is taken; `trimtab floating list` shows yours"
            raise NoCapacity("addresses-taken", message, field=field)
        return found
    address, prefix_length = seeds.parse_address(asked, network.subnet, gateway=outer.gateway, field=field)
    if "/" in asked and prefix_length != int(network.subnet.partition("/")[2]):
        message = f"{field}: network {network.name} is {network.subnet}; leave /{prefix_length} out"
        raise InvalidRequest("address-wrong", message, field=field)
    if not addresses.is_between(address, outer.first, outer.last):
        message = f"{field}: {address} is not in {bounds}, which is what of network {network.name} is ours to give"
        raise InvalidRequest("address-outside", message, field=field)
    holder = taken.get(address)
    if holder is not None:
        who = holder.what if holder.project_id == project.id else "another project"
        raise AlreadyExists("address-taken", f"{field}: {address} of network {network.name} belongs to {who}", field=field)
    return address
