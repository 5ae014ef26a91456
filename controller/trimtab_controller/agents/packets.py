"""What may be asked of a host about packets: the third part of `AgentClient`."""

from collections.abc import Sequence
from typing import Protocol

from trimtab_controller.agents.sending import Sender
from trimtab_protos.agent.v1 import domain_pb2
from trimtab_protos.agent.v1 import network_service_pb2 as pb
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.messages import CommandKey
from trimtab_protos.network_messages import FirewallSpec, Peer, PeerFinding

# A peer of which nothing answers takes this long, and they are tried one after the other.
CHECK_S_PER_PEER = 17.0


class PacketAgents(Protocol):
    def set_firewall(self, host_id: str, key: CommandKey, vm_id: str, firewall: FirewallSpec) -> int: ...

    def check_peers(self, host_id: str, peers: Sequence[Peer], *, rate_bytes: int) -> tuple[PeerFinding, ...]: ...


class PacketVerbs(Sender):
    """`PacketAgents` over whatever sends a message: mixed into the gRPC client."""

    def set_firewall(self, host_id: str, key: CommandKey, vm_id: str, firewall: FirewallSpec) -> int:
        """Return the generation that the vm is under there now; 0 where it is not there."""
        request = pb.SetFirewallRequest(vm_id=vm_id, firewall=to_proto(firewall, domain_pb2.FirewallSpec))
        return int(self._command(host_id, "SetFirewall", request, key).generation)

    def check_peers(self, host_id: str, peers: Sequence[Peer], *, rate_bytes: int) -> tuple[PeerFinding, ...]:
        request = pb.CheckPeersRequest(peers=[to_proto(peer, pb.Peer) for peer in peers], rate_bytes=rate_bytes)
        found = self._call(host_id, "CheckPeers", request, timeout_s=CHECK_S_PER_PEER * len(peers), waits_for_agent=True)
        return tuple(from_proto(one, PeerFinding) for one in found.findings)
