"""Image replicas between hosts: who may read which, for how long, and the service that streams them.

An offer lives in memory: it is made anew when the agent restarts, since the command that makes it is acted on at each repeat.
"""

import hmac
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog

from trimtab_agent import edge
from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1.agent_service_pb2_grpc import ReplicaServiceServicer
from trimtab_protos.errors import InvalidRequest, Unavailable
from trimtab_protos.messages import PoolSpec

log = structlog.get_logger(__name__)

BLOCK_BYTES = 1 << 20
TICKET_LENGTH = 64
MAX_TTL_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Offer:
    image_id: str
    pool: PoolSpec
    ticket: str
    peer_host_id: str
    expires_at_boottime: float


class Offers:
    """The offers of one host. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}

    def make(self, *, image_id: str, pool: PoolSpec, ticket: str, peer_host_id: str, ttl_s: int) -> None:
        """Let `peer_host_id` read the image with this ticket for `ttl_s` seconds."""
        if len(ticket) != TICKET_LENGTH or any(letter not in "0123456789abcdef" for letter in ticket):
            raise InvalidRequest("ticket-malformed", "ticket must be 256 random bits in lower-case hex", field="ticket")
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidRequest("ttl-out-of-range", f"ttl_s must be 1 to {MAX_TTL_S}", field="ttl_s")
        now = self._clock.boottime_s()
        with self._lock:
            self._offers = {key: offer for key, offer in self._offers.items() if now < offer.expires_at_boottime}
            self._offers[ticket] = Offer(image_id, pool, ticket, peer_host_id, now + ttl_s)

    def find(self, *, image_id: str, ticket: str, peer_host_id: str) -> Offer:
        """Return the offer. Unavailable(`ticket-refused`), whatever is wrong with it: a new offer may follow."""
        now = self._clock.boottime_s()
        with self._lock:
            for offer in self._offers.values():
                if (
                    hmac.compare_digest(offer.ticket.encode(), ticket.encode())
                    and image_id in {"", offer.image_id}
                    and offer.peer_host_id == peer_host_id
                    and now < offer.expires_at_boottime
                ):
                    return offer
        raise Unavailable("ticket-refused", "the image was not offered to this host, or not for so long; ask for a new offer")

    def use_up(self, offer: Offer) -> None:
        with self._lock:
            self._offers.pop(offer.ticket, None)


class ReplicaServicer(ReplicaServiceServicer):
    """Streams replicas to peers that hold a ticket."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        offers: Offers,
        *,
        pool: WorkerPool,
        identify: Callable[[tls.AuthContext], str] = tls.peer_host_id,
    ) -> None:
        self._hypervisor = hypervisor
        self._offers = offers
        self._pool = pool
        self._identify = identify

    @edge.stream
    async def ReadImage(self, request: pb.ReadImageRequest, context: edge.Context) -> AsyncIterator[pb.ReadImageResponse]:
        peer_host_id = self._identify(context)
        offer = self._offers.find(image_id=request.image_id, ticket=request.ticket, peer_host_id=peer_host_id)
        if request.offset < 0:
            raise InvalidRequest("offset-negative", "offset must be 0 or more", field="offset")
        descriptor = await edge.in_pool(self._pool, lambda: self._open(offer, request.offset))
        try:
            while block := await edge.in_pool(self._pool, lambda: os.read(descriptor, BLOCK_BYTES)):
                yield pb.ReadImageResponse(content=block)
        finally:
            os.close(descriptor)
        self._offers.use_up(offer)
        log.info("replica read", image_id=offer.image_id, peer_host_id=peer_host_id)

    def _open(self, offer: Offer, offset: int) -> int:
        path = self._hypervisor.open_image(offer.image_id, offer.pool)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return descriptor
