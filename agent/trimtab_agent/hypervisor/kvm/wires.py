"""Cards on no network: QEMU hands their frames to whoever connects to it at an address of the host's loopback, which is the agent.

A bridge of its own would still be an interface of the host, whose kernel answers ARP for any address that the host has; this way no
frame reaches a network stack but the guest's. Each card has a loopback address of its own, a function of its id, so that nothing has to
be kept and no port is searched for.
"""

import hashlib
import socket
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import NotFound, Unavailable

_CONNECT_TIMEOUT_S = 2.0
_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below those that Linux gives to who connects, so that none of these is in the way."""


def place(nic_id: str) -> tuple[str, int]:
    """Return the address and port where QEMU waits for whoever takes the card's frames; never 127.0.x.x, where others listen."""
    digest = hashlib.sha256(check_id(nic_id, "nic_id").encode()).digest()
    address = f"127.{1 + digest[0] % 254}.{digest[1]}.{1 + digest[2] % 254}"
    return address, _FIRST_PORT + int.from_bytes(digest[3:7]) % _PORTS


def interface(devices: Element, nic_id: str) -> Element:
    """Add a card on no network and return it."""
    address, port = place(nic_id)
    element = SubElement(devices, "interface", type="server")
    SubElement(element, "source", address=address, port=str(port))
    return element


def join(live_xml: str, vm_id: str, nic_id: str) -> socket.socket:
    """Return a connected socket of a running domain's card. See `Hypervisor.open_wire`."""
    alias = f"ua-{check_id(nic_id, 'nic_id')}"
    for card in parse(live_xml).findall("devices/interface[@type='server']"):
        source, name = card.find("source"), card.find("alias")
        if source is not None and name is not None and name.get("name") == alias:
            return _connect((source.get("address", ""), int(source.get("port", "0"))), vm_id)
    raise NotFound("wire-not-found", f"the guest of {vm_id} has no card {nic_id} that is on no network")


def _connect(address: tuple[str, int], vm_id: str) -> socket.socket:
    try:
        return socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
    except OSError as error:
        raise Unavailable("wire-closed", f"the card of {vm_id} cannot be joined: {error.strerror or error}") from error
