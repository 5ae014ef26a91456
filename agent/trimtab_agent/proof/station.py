"""What stands at the other end of a proof guest's card: just enough of a network for the guest to come up in, and to learn whether a
TCP port answers. Pure: frames in, frames out.

    the guest asks by DHCP          ─► it gets its declared address, else the one that it asks for, else one for documentation
    it asks (ARP) who has another   ─► we do, so that it finds its gateway
    it shows an address of its own  ─► ARP for that address, then SYN ─► SYN-ACK: it answers, and gets a RST; RST: it refuses

What a guest sends is not to be trusted: a frame that cannot be read is dropped, and what is kept of it is bounded. Only IPv4.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import dpkt
from dpkt.arp import ARP, ARP_OP_REPLY, ARP_OP_REQUEST
from dpkt.dhcp import DHCP
from dpkt.ethernet import ETH_TYPE_ARP, ETH_TYPE_IP, Ethernet
from dpkt.ip import IP, IP_PROTO_TCP, IP_PROTO_UDP
from dpkt.tcp import TCP, TH_ACK, TH_RST, TH_SYN
from dpkt.udp import UDP

OWN_MAC = bytes.fromhex("027474000001")
"""Locally administered; nobody else is on the line."""
BROADCAST_MAC = b"\xff" * 6
UNKNOWN_ADDRESS = IPv4Interface("192.0.2.10/24")
"""What a guest gets that has no declared address and asks for none: of the block for documentation, which is nobody's."""
ADDRESSES_MAX = 16
_ANY, _BROADCAST = IPv4Address(0), IPv4Address("255.255.255.255")
_BOOTPS, _BOOTPC = 67, 68
_LEASE_S = 86400
_FIRST_PORT, _PORTS = 49152, 16384
_FIRST_SEQUENCE = 0x74740000


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known so far. `is_final`: it answers, or it refuses right now."""

    has_answered: bool = False
    address: str = ""
    problem: str = ""
    is_final: bool = False


@dataclass(slots=True)
class _Seat:
    """An address that the guest has."""

    network: IPv4Network
    gateway: IPv4Address | None = None
    mac: bytes = b""


class Station:
    """One card's line. Not thread-safe."""

    def __init__(self, *, addresses: Sequence[str], port: int) -> None:
        """`addresses`: those that were declared for the card, with prefix length; IPv6 ones are passed over."""
        self._declared = tuple(one for text in addresses if isinstance(one := ipaddress.ip_interface(text), IPv4Interface))
        self._port = port
        self._seats: dict[IPv4Address, _Seat] = {one.ip: _Seat(one.network) for one in self._declared}
        self._has_heard = False
        self._knocks = 0
        self._asked: dict[int, tuple[IPv4Address, int]] = {}
        """Our port → whom it asked, and with which sequence number."""
        self.finding = Finding(problem="nothing was heard of its card")

    @property
    def reachable(self) -> int:
        """How many addresses of the guest can be asked: a new one is worth a knock at once."""
        return sum(1 for seat in self._seats.values() if seat.mac)

    def knock(self) -> list[bytes]:
        """Return what asks each address of the guest anew; call it every half second or so."""
        frames = []
        for address, seat in self._seats.items():
            ours = _ours(address, seat)
            frames.append(_arp(ARP_OP_REQUEST, sender=ours, target=address, target_mac=b"\0" * 6, to=BROADCAST_MAC))
            if seat.mac:
                frames.append(self._syn(address, seat, ours))
        return frames

    def hear(self, frame: bytes) -> list[bytes]:
        """Return what answers a frame of the guest."""
        try:
            heard = Ethernet(frame)
        except (dpkt.UnpackError, IndexError, ValueError):
            return []
        if heard.src == OWN_MAC:
            return []
        self._note()
        match heard.data:
            case ARP() as asked if heard.type == ETH_TYPE_ARP:
                return self._hear_arp(asked)
            case IP() as packet if heard.type == ETH_TYPE_IP:
                return self._hear_ip(packet, bytes(heard.src))
            case _:
                return []

    def _hear_arp(self, asked: ARP) -> list[bytes]:
        sender, target, mac = IPv4Address(bytes(asked.spa)), IPv4Address(bytes(asked.tpa)), bytes(asked.sha)
        if asked.op == ARP_OP_REQUEST and sender in {_ANY, target}:
            # Before it takes an address a guest asks who has it, and then tells that it does: an answer would scare it off.
            self._learn(target, mac)
            return []
        seat = self._learn(sender, mac)
        if asked.op != ARP_OP_REQUEST or target in self._seats:
            return []
        if seat is not None:
            seat.gateway = target
        return [_arp(ARP_OP_REPLY, sender=target, target=sender, target_mac=mac, to=mac)]

    def _hear_ip(self, packet: IP, mac: bytes) -> list[bytes]:
        sender = IPv4Address(bytes(packet.src))
        if isinstance(packet.data, UDP) and packet.data.dport == _BOOTPS:
            return self._hear_dhcp(packet.data)
        self._learn(sender, mac)
        if isinstance(packet.data, TCP) and packet.data.sport == self._port:
            return self._hear_tcp(sender, packet.data)
        return []

    def _hear_tcp(self, sender: IPv4Address, said: TCP) -> list[bytes]:
        address, sequence = self._asked.get(said.dport, (_ANY, 0))
        if address != sender or not said.flags & TH_ACK or said.ack != (sequence + 1) & 0xFFFFFFFF:
            return []
        if said.flags & TH_RST:
            if not self.finding.has_answered:
                problem = f"{sender} refuses connections to TCP port {self._port}"
                self.finding = Finding(address=str(sender), problem=problem, is_final=True)
            return []
        if not said.flags & TH_SYN:
            return []
        self.finding = Finding(has_answered=True, address=str(sender), is_final=True)
        seat = self._seats[sender]
        reset = TCP(sport=said.dport, dport=self._port, seq=said.ack, flags=TH_RST)
        return [_packet(reset, IP_PROTO_TCP, source=_ours(sender, seat), to=sender, mac=seat.mac)]

    def _syn(self, address: IPv4Address, seat: _Seat, ours: IPv4Address) -> bytes:
        # Each from another port: what is left of an earlier one in the guest confuses nothing.
        self._knocks += 1
        own_port, sequence = _FIRST_PORT + self._knocks % _PORTS, (_FIRST_SEQUENCE + (self._knocks << 8)) & 0xFFFFFFFF
        self._asked[own_port] = (address, sequence)
        syn = TCP(sport=own_port, dport=self._port, seq=sequence, flags=TH_SYN, win=1024)
        return _packet(syn, IP_PROTO_TCP, source=ours, to=address, mac=seat.mac)

    def _hear_dhcp(self, datagram: UDP) -> list[bytes]:
        try:
            asked = datagram.data if isinstance(datagram.data, DHCP) else DHCP(bytes(datagram.data))
            options = dict(asked.opts)
        except (dpkt.UnpackError, IndexError, ValueError, TypeError):
            return []
        kinds = {dpkt.dhcp.DHCPDISCOVER: dpkt.dhcp.DHCPOFFER, dpkt.dhcp.DHCPREQUEST: dpkt.dhcp.DHCPACK}
        kind = kinds.get(int.from_bytes(options.get(dpkt.dhcp.DHCP_OPT_MSGTYPE, b"")))
        if kind is None or asked.op != dpkt.dhcp.DHCP_OP_REQUEST:
            return []
        wished = options.get(dpkt.dhcp.DHCP_OPT_REQ_IP) or asked.ciaddr.to_bytes(4)
        lease = self._lease(IPv4Address(wished) if len(wished) == 4 else _ANY)
        if kind == dpkt.dhcp.DHCPACK and wished != lease.ip.packed:
            kind = dpkt.dhcp.DHCPNAK
        if kind == dpkt.dhcp.DHCPACK:
            self._learn(lease.ip, bytes(asked.chaddr[:6]), network=lease.network)
        return [_dhcp(kind, asked, lease, server=_first_other(lease.ip, lease.network))]

    def _lease(self, wished: IPv4Address) -> IPv4Interface:
        if self._declared:
            return self._declared[0]
        return IPv4Interface(f"{wished}/24") if _is_usable(wished) else UNKNOWN_ADDRESS

    def _learn(self, address: IPv4Address, mac: bytes, *, network: IPv4Network | None = None) -> _Seat | None:
        """Note that the guest has this address; None for one that it cannot have."""
        if not _is_usable(address) or mac in {OWN_MAC, BROADCAST_MAC}:
            return None
        seat = self._seats.get(address)
        if seat is None:
            if len(self._seats) >= ADDRESSES_MAX:
                return None
            known = next((one.network for one in self._declared if address in one.network), None)
            seat = self._seats[address] = _Seat(network or known or IPv4Network(f"{address}/24", strict=False))
        seat.mac = mac
        self._note()
        return seat

    def _note(self) -> None:
        """Say what is known as long as nothing better is."""
        if self.finding.address:
            return
        taken = sorted(str(address) for address, seat in self._seats.items() if seat.mac)
        if taken:
            self.finding = Finding(problem=f"{', '.join(taken)} does not answer on TCP port {self._port}")
        else:
            self.finding = Finding(problem="its card has taken no IPv4 address")


def _is_usable(address: IPv4Address) -> bool:
    return not (address.is_unspecified or address.is_multicast or address.is_loopback or address == _BROADCAST)


def _ours(address: IPv4Address, seat: _Seat) -> IPv4Address:
    """Return the address from which the guest's is asked: one that it takes for a neighbour."""
    return seat.gateway or _first_other(address, seat.network)


def _first_other(address: IPv4Address, network: IPv4Network) -> IPv4Address:
    if network.num_addresses == 1:
        network = IPv4Network(f"{address}/24", strict=False)
    hosts: Iterable[IPv4Address] = network.hosts()
    return next(each for each in hosts if each != address)


def _arp(op: int, *, sender: IPv4Address, target: IPv4Address, target_mac: bytes, to: bytes) -> bytes:
    said = ARP(op=op, sha=OWN_MAC, spa=sender.packed, tha=target_mac, tpa=target.packed)
    return bytes(Ethernet(dst=to, src=OWN_MAC, type=ETH_TYPE_ARP, data=said))


def _packet(data: TCP | UDP, protocol: int, *, source: IPv4Address, to: IPv4Address, mac: bytes) -> bytes:
    packet = IP(src=source.packed, dst=to.packed, p=protocol, ttl=64, data=data)
    return bytes(Ethernet(dst=mac, src=OWN_MAC, type=ETH_TYPE_IP, data=packet))


def _dhcp(kind: int, asked: DHCP, lease: IPv4Interface, *, server: IPv4Address) -> bytes:
    """Return an answer, sent to all: the guest has no address yet."""
    options = [(dpkt.dhcp.DHCP_OPT_MSGTYPE, bytes([kind])), (dpkt.dhcp.DHCP_OPT_SERVER_ID, server.packed)]
    if kind != dpkt.dhcp.DHCPNAK:
        options += [
            (dpkt.dhcp.DHCP_OPT_LEASE_SEC, _LEASE_S.to_bytes(4)),
            (dpkt.dhcp.DHCP_OPT_NETMASK, lease.netmask.packed),
            (dpkt.dhcp.DHCP_OPT_ROUTER, server.packed),
        ]
    said = DHCP(
        op=dpkt.dhcp.DHCP_OP_REPLY,
        xid=asked.xid,
        flags=asked.flags,
        yiaddr=0 if kind == dpkt.dhcp.DHCPNAK else int(lease.ip),
        siaddr=int(server),
        chaddr=asked.chaddr,
        opts=options,
    )
    content = bytes(said)
    datagram = UDP(sport=_BOOTPS, dport=_BOOTPC, ulen=8 + len(content), data=content)
    return _packet(datagram, IP_PROTO_UDP, source=server, to=_BROADCAST, mac=BROADCAST_MAC)
