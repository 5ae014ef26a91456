"""Networks of this host: the operator's bridges, which are only looked at, NAT or isolated ones, which libvirt runs for us, and OVN's.

libvirt networks are called `trimtab-<network_id>` and their bridges `tt-<hash>`. They do not start with the host: a guest's start
ensures them, so that a host that may run no guests any more brings up nothing.
"""

import hashlib
import ipaddress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from trimtab_agent.hypervisor.kvm import errors, open_vswitch, overlays, vlans
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.identifiers import DOMAIN_PREFIX, check_id, check_interface, check_mac, check_name, check_range
from trimtab_agent.hypervisor.kvm.open_vswitch import Switch
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import DomainSpec, NetworkKind, NetworkSpec, NicSpec

OWN_BRIDGE_PREFIX = "tt-"
_LIBVIRTS = frozenset({NetworkKind.NAT, NetworkKind.ISOLATED})
_SYS_NET = Path("/sys/class/net")
_MIN_MTU, _MAX_MTU = 576, 65520
_SMALLEST_SUBNET_PREFIX = 29


class Networks:
    """Ensures and removes networks. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ensure(self, network: NetworkSpec) -> None:
        check_id(network.network_id, "network_id")
        check_range(network.mtu, "mtu", low=_MIN_MTU, high=_MAX_MTU)
        match network.kind:
            case NetworkKind.BRIDGE if network.is_outer:
                overlays.ensure_way_out(network, sys_net=_SYS_NET)
            case NetworkKind.BRIDGE:
                _ensure_bridge(network)
            case NetworkKind.WIRE:
                pass  # there is none
            case NetworkKind.OVERLAY:
                overlays.check(network, sys_net=_SYS_NET)
            case NetworkKind.NAT | NetworkKind.ISOLATED:
                wanted = network_xml(network)
                with self._connection.use(f"make network {network.name}", changes=True) as connection:
                    _ensure_libvirt_network(connection, network, wanted)

    def ensure_for(self, domain: DomainSpec) -> None:
        """Make the networks of a domain usable, and keep its cards' addresses for them where this host answers DHCP."""
        for network in domain.networks:
            self.ensure(network)
        _ensure_overlay_ports(domain)
        served = {one.network_id: one for one in domain.networks if one.has_dhcp and one.kind in _LIBVIRTS}
        cards = [nic for nic in domain.nics if nic.network_id in served and nic.addresses]
        if not cards:
            return
        with self._connection.use(f"keep addresses of {domain.vm_id}", changes=True) as connection:
            for nic in cards:
                found = connection.networkLookupByName(libvirt_network_name(nic.network_id))
                _reserve(found, nic, name=domain.name)

    def start(self, connection: Any, name: str) -> None:
        """Start libvirt's network `name` if it is one of ours and is not running."""
        if name.startswith(DOMAIN_PREFIX):
            network = connection.networkLookupByName(name)
            if not network.isActive():
                _start(network)

    def remove(self, network_id: str) -> None:
        name, own = libvirt_network_name(network_id), own_bridge(network_id)
        overlays.remove_way_out(network_id)
        if (_SYS_NET / vlans.device_of(own)).exists():
            _refuse_if_used(network_id, own)
            open_vswitch.remove(own, sys_net=_SYS_NET)
            vlans.remove(own, sys_net=_SYS_NET)
        with self._connection.use(f"remove network {network_id}", changes=True) as connection:
            try:
                network = connection.networkLookupByName(name)
                if network.isActive():
                    _refuse_if_used(network_id, own_bridge(network_id))
                    network.destroy()
                network.undefine()
            except libvirt.libvirtError as error:
                if not errors.is_gone(error):
                    raise


def libvirt_network_name(network_id: str) -> str:
    return DOMAIN_PREFIX + check_id(network_id, "network_id")


def own_bridge(network_id: str) -> str:
    """Return the name of the bridge of a NAT or isolated network; 15 characters leave no room for the id itself."""
    return OWN_BRIDGE_PREFIX + hashlib.sha256(network_id.encode()).hexdigest()[:10]


def bridge_of(network: NetworkSpec, nic_id: str) -> str:
    """Return the bridge whose port a card is on this host; '' where libvirt runs the network and knows it."""
    if network.kind in _LIBVIRTS:
        return ""
    if network.kind is NetworkKind.OVERLAY:
        return own_bridge(check_id(nic_id, "nic_id"))
    return own_bridge(network.network_id) if network.vlan else check_interface(network.bridge, "bridge")


def check_bridge(network: NetworkSpec, sys_net: Path = _SYS_NET, *, switch: Switch | None = None) -> None:
    """Make sure that guests can use the operator's bridge, `switch` where it is one of Open vSwitch's. Conflict says what is missing."""
    bridge = check_interface(network.bridge, "bridge")
    if switch is None and not (sys_net / bridge / "bridge").is_dir():
        raise Conflict("bridge-missing", f"network {network.name}: this host has no bridge {bridge}", bridge=bridge)
    if switch is not None and not network.vlan:
        raise Conflict(
            "bridge-needs-vlan",
            f"network {network.name}: bridge {bridge} is one of Open vSwitch's, where a network takes a VLAN: give --vlan",
            bridge=bridge,
        )
    if switch is not None:
        switch.refuse_unreachable(network.name, network.vlan)
    mtu = open_vswitch.mtu_of(switch, sys_net) if switch is not None else int((sys_net / bridge / "mtu").read_text())
    if mtu < network.mtu:
        raise Conflict(
            "bridge-mtu-too-small",
            f"network {network.name} wants MTU {network.mtu}; bridge {bridge} has {mtu}",
            bridge=bridge,
            mtu=mtu,
        )


def _ensure_bridge(network: NetworkSpec) -> None:
    switch = (
        None if (_SYS_NET / check_interface(network.bridge, "bridge") / "bridge").is_dir() else open_vswitch.find(network.bridge)
    )
    check_bridge(network, switch=switch)
    own = own_bridge(network.network_id)
    if switch is not None:
        open_vswitch.ensure(network.name, own, switch, open_vswitch.access(own, network.vlan), mtu=network.mtu, sys_net=_SYS_NET)
    elif network.vlan:
        vlans.ensure(network.name, own, base=network.bridge, vlan=network.vlan, mtu=network.mtu, sys_net=_SYS_NET)


def _ensure_overlay_ports(domain: DomainSpec) -> None:
    overlay = {network.network_id: network for network in domain.networks if network.kind is NetworkKind.OVERLAY}
    cards = {own_bridge(nic.nic_id): (nic, overlay[nic.network_id]) for nic in domain.nics if nic.network_id in overlay}
    overlays.ensure_ports(check_id(domain.vm_id, "vm_id"), cards, sys_net=_SYS_NET)


def network_xml(network: NetworkSpec) -> str:
    """Return libvirt's definition of a NAT or isolated network."""
    root = ElementTree.Element("network")
    ElementTree.SubElement(root, "name").text = libvirt_network_name(network.network_id)
    if network.kind is NetworkKind.NAT:
        ElementTree.SubElement(root, "forward", mode="nat")
    ElementTree.SubElement(root, "bridge", name=own_bridge(network.network_id), stp="off", delay="0")
    ElementTree.SubElement(root, "mtu", size=str(network.mtu))
    if network.kind is NetworkKind.NAT or network.has_dhcp:
        subnet = _subnet(network)
        gateway = subnet.network_address + 1
        address = ElementTree.SubElement(root, "ip", address=str(gateway), prefix=str(subnet.prefixlen))
        if network.has_dhcp:
            dhcp = ElementTree.SubElement(address, "dhcp")
            ElementTree.SubElement(dhcp, "range", start=str(gateway + 1), end=str(subnet.broadcast_address - 1))
    return ElementTree.tostring(root, encoding="unicode")


def _subnet(network: NetworkSpec) -> ipaddress.IPv4Network:
    try:
        subnet = ipaddress.IPv4Network(network.subnet)
    except ValueError as error:
        raise InvalidRequest(
            "network-subnet", f"subnet {network.subnet!r} must be an IPv4 network such as 10.20.0.0/24", field="subnet"
        ) from error
    if subnet.prefixlen > _SMALLEST_SUBNET_PREFIX:
        raise InvalidRequest("network-subnet", f"subnet {network.subnet} has no room for guests", field="subnet")
    return subnet


def _ensure_libvirt_network(connection: Any, network: NetworkSpec, wanted: str) -> None:
    name = libvirt_network_name(network.network_id)
    try:
        defined = connection.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if not errors.is_gone(error):
            raise
        defined = connection.networkDefineXML(wanted)
    if _essence(defined.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE)) != _essence(wanted):
        if defined.isActive():
            _refuse_if_used(network.network_id, own_bridge(network.network_id))
            defined.destroy()
        defined.undefine()
        defined = connection.networkDefineXML(wanted)
    if not defined.isActive():
        _start(defined)


def _reserve(network: Any, nic: NicSpec, *, name: str) -> None:
    """Have the network's DHCP server give the card its address, and DNS know it by the vm's name unless another vm has that."""
    address = str(ipaddress.ip_interface(nic.addresses[0]).ip)
    kept = parse(network.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE)).findall("ip/dhcp/host")
    wanted = {"mac": check_mac(nic.mac), "ip": address}
    others = [host for host in kept if host.get("mac") != nic.mac and host.get("ip") != address]
    if not any(host.get("name") == name for host in others):
        wanted["name"] = check_name(name, "name")
    if any(dict(host.attrib) == wanted for host in kept):
        return
    for host in kept:
        if host not in others:
            _change_reservation(network, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, dict(host.attrib))
    _change_reservation(network, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, wanted)


def _change_reservation(network: Any, command: int, host: dict[str, str]) -> None:
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG
    if network.isActive():
        flags |= libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
    text = ElementTree.tostring(ElementTree.Element("host", host), encoding="unicode")
    network.update(command, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, -1, text, flags)


def _start(network: Any) -> None:
    try:
        network.create()
    except libvirt.libvirtError as error:
        # Two guests that start at once may both find it stopped.
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or not network.isActive():
            raise


def _essence(xml: str) -> tuple[object, ...]:
    """Return what makes a network this one, leaving out what libvirt adds (UUID, MAC, NAT port range)."""
    root = parse(xml)
    forward, bridge, mtu = root.find("forward"), root.find("bridge"), root.find("mtu")
    address, dhcp = root.find("ip"), root.find("ip/dhcp/range")
    return (
        forward.get("mode") if forward is not None else "",
        bridge.get("name") if bridge is not None else "",
        mtu.get("size") if mtu is not None else "",
        (address.get("address"), address.get("prefix")) if address is not None else (),
        (dhcp.get("start"), dhcp.get("end")) if dhcp is not None else (),
    )


def _refuse_if_used(network_id: str, bridge: str) -> None:
    ports = _SYS_NET / bridge / "brif"
    names = [port.name for port in ports.iterdir()] if ports.is_dir() else []
    guests = [name for name in names if not name.endswith("-nic") and name != vlans.device_of(bridge)]
    if guests:
        raise Conflict("network-in-use", f"{len(guests)} guests of this host use network {network_id}", network_id=network_id)
