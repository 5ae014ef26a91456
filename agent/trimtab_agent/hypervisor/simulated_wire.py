"""A simulated guest's card on no network: it tells its address once it is joined, and answers at the ports of `SimulatedDomain.ports`."""

import contextlib
import ipaddress
import socket
import threading
from io import BufferedRWPair

from dpkt.arp import ARP, ARP_OP_REPLY, ARP_OP_REQUEST
from dpkt.ethernet import ETH_TYPE_ARP, ETH_TYPE_IP, Ethernet
from dpkt.ip import IP, IP_PROTO_TCP
from dpkt.tcp import TCP, TH_ACK, TH_RST, TH_SYN

from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import NetworkKind, NicSpec

_EVERYBODY = b"\xff" * 6


def join(domain: SimulatedDomain, nic_id: str) -> socket.socket:
    """Return one end of the card's line; the guest is at the other. Under the fleet's lock."""
    if domain.state not in ACTIVE:
        raise Conflict("wrong-domain-state", f"the vm is {domain.state.value}", state=domain.state.value)
    wired = {network.network_id for network in domain.spec.networks if network.kind is NetworkKind.WIRE}
    nic = next((each for each in domain.spec.nics if each.nic_id == nic_id and each.network_id in wired), None)
    if nic is None:
        raise NotFound("wire-not-found", f"the guest has no card {nic_id} that is on no network")
    ours, theirs = socket.socketpair()
    domain.open_consoles.append(theirs)  # closed with the guest's process, as those are
    threading.Thread(target=_serve, args=(domain, nic, theirs), name="simulated-wire", daemon=True).start()
    return ours


def _serve(domain: SimulatedDomain, nic: NicSpec, line: socket.socket) -> None:
    mac = bytes.fromhex(nic.mac.replace(":", ""))
    own = ipaddress.ip_interface(nic.addresses[0]).ip.packed if nic.addresses else b"\xc0\x00\x02\x07"
    with contextlib.suppress(OSError), line, line.makefile("rwb") as frames:
        told = ARP(op=ARP_OP_REQUEST, sha=mac, spa=own, tpa=own)
        _send(frames, Ethernet(dst=_EVERYBODY, src=mac, type=ETH_TYPE_ARP, data=told))
        while size := int.from_bytes(frames.read(4)):
            heard = Ethernet(frames.read(size))
            match heard.data:
                case ARP() as asked if asked.op == ARP_OP_REQUEST and asked.tpa == own:
                    said = ARP(op=ARP_OP_REPLY, sha=mac, spa=own, tha=asked.sha, tpa=asked.spa)
                    _send(frames, Ethernet(dst=heard.src, src=mac, type=ETH_TYPE_ARP, data=said))
                case IP(data=TCP() as asked) as packet if asked.flags == TH_SYN:
                    flags = TH_SYN | TH_ACK if asked.dport in domain.ports else TH_RST | TH_ACK
                    said = TCP(sport=asked.dport, dport=asked.sport, seq=7, ack=asked.seq + 1, flags=flags)
                    answer = IP(src=packet.dst, dst=packet.src, p=IP_PROTO_TCP, data=said)
                    _send(frames, Ethernet(dst=heard.src, src=mac, type=ETH_TYPE_IP, data=answer))
                case _:
                    pass


def _send(frames: BufferedRWPair, frame: Ethernet) -> None:
    content = bytes(frame)
    frames.write(len(content).to_bytes(4) + content)
    frames.flush()
