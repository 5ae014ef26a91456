"""NetworkService and ProbeService: what may reach this host's guests, and what of its peers reaches this host."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from trimtab_agent import edge
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import Hypervisor, Stamp
from trimtab_agent.servicer import Pools
from trimtab_protos import tls
from trimtab_protos.agent.v1 import network_service_pb2 as pb
from trimtab_protos.agent.v1.network_service_pb2_grpc import NetworkServiceServicer, ProbeServiceServicer
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey
from trimtab_protos.network_messages import FirewallSpec, Peer, PeerFinding

LookAtPeer = Callable[[Peer, int], PeerFinding]
"""Tries the way to a peer, reading so many bytes from its agent."""

PEERS_MAX = 32
RATE_BYTES_MAX = 16 << 20
BLOCK_BYTES = 256 << 10


class NetworkServicer(NetworkServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        look_at_peer: LookAtPeer,
        *,
        commands: Commands,
        pools: Pools,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._hypervisor = hypervisor
        self._look_at_peer = look_at_peer
        self._commands = commands
        self._pools = pools
        self._authorise = authorise

    @edge.unary
    async def SetFirewall(self, request: pb.SetFirewallRequest, context: edge.Context) -> pb.SetFirewallResponse:
        self._authorise(context)
        firewall = from_proto(request.firewall, FirewallSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.SetFirewallResponse:
            return pb.SetFirewallResponse(generation=self._hypervisor.set_firewall(request.vm_id, firewall))

        return await self._commands.run(request, pb.SetFirewallResponse, act, pool=self._pools.mutate)

    @edge.unary
    async def CheckPeers(self, request: pb.CheckPeersRequest, context: edge.Context) -> pb.CheckPeersResponse:
        self._authorise(context)
        if len(request.peers) > PEERS_MAX:
            raise InvalidRequest("peers-too-many", f"peers: at most {PEERS_MAX} in one check", field="peers")
        peers = [from_proto(peer, Peer) for peer in request.peers]
        rate_bytes = min(request.rate_bytes, RATE_BYTES_MAX)
        # One after the other: two transfers at once would each see half of the rate.
        findings = [await edge.in_pool(self._pools.query, partial(self._look_at_peer, peer, rate_bytes)) for peer in peers]
        return pb.CheckPeersResponse(findings=[to_proto(finding, pb.PeerFinding) for finding in findings])


class ProbeServicer(ProbeServiceServicer):
    """Answers peers: hosts of the fleet, and nobody else."""

    def __init__(self, *, identify: Callable[[tls.AuthContext], str] = tls.peer_host_id) -> None:
        self._identify = identify

    @edge.stream
    async def ReadProbe(self, request: pb.ReadProbeRequest, context: edge.Context) -> AsyncIterator[pb.ReadProbeResponse]:
        self._identify(context)
        if not 0 <= request.size_bytes <= RATE_BYTES_MAX:
            raise InvalidRequest("size-out-of-range", f"size_bytes must be 0 to {RATE_BYTES_MAX}", field="size_bytes")
        yield pb.ReadProbeResponse(now_ms=time.time_ns() // 1_000_000)
        left, block = request.size_bytes, os.urandom(BLOCK_BYTES)
        while left > 0:
            yield pb.ReadProbeResponse(content=block[: min(left, BLOCK_BYTES)])
            left -= BLOCK_BYTES
            await asyncio.sleep(0)  # others' calls are served in between
