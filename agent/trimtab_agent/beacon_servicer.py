"""BeaconService: reads and writes other hosts' slots on shared storage for a controller that has no mount of it.

Storage hangs. The calls have threads of their own, few of them, and an answer is waited for only so long: a hung pool costs those
threads until it answers again, and nothing else of the agent.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from trimtab_agent import edge
from trimtab_agent.workers import WorkerPool
from trimtab_protos import beacon_slots, tls
from trimtab_protos.agent.v1 import beacon_service_pb2 as pb
from trimtab_protos.agent.v1.beacon_service_pb2_grpc import BeaconServiceServicer
from trimtab_protos.beacon_slots import Intent
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import InvalidRequest, Unavailable
from trimtab_protos.messages import PoolSpec

T = TypeVar("T")

SLOTS_MAX = 256
THREADS, QUEUED_MAX = 2, 4
ANSWER_TIMEOUT_S = 4.0
"""The caller asks another host then. A late write does no harm: an intent only ever forbids."""


class BeaconServicer(BeaconServiceServicer):
    """The slots that this host reaches."""

    def __init__(self, *, authorise: Callable[[tls.AuthContext], None] = tls.require_controller) -> None:
        self._authorise = authorise
        self._pool = WorkerPool("beacon-slots", threads=THREADS, max_queued=QUEUED_MAX)

    @edge.unary
    async def ReadSlots(self, request: pb.ReadSlotsRequest, context: edge.Context) -> pb.ReadSlotsResponse:
        self._authorise(context)
        if len(request.host_ids) > SLOTS_MAX:
            raise InvalidRequest("too-many-slots", f"at most {SLOTS_MAX} slots at a time", field="host_ids")
        pool, host_ids = _path(request.pool), [_host_id(one) for one in request.host_ids]
        return pb.ReadSlotsResponse(slots=await self._wait(self._pool.submit(lambda: _read(pool, host_ids))))

    @edge.unary
    async def WriteIntent(self, request: pb.WriteIntentRequest, context: edge.Context) -> pb.WriteIntentResponse:
        self._authorise(context)
        path = beacon_slots.path_of(_path(request.pool), _host_id(request.host_id))
        intent = Intent(term=request.term, number=request.number, lease_number=request.lease_number)
        return pb.WriteIntentResponse(
            intent=await self._wait(self._pool.submit(lambda: _reached(lambda: beacon_slots.place_intent(path, intent))))
        )

    async def _wait(self, future: "Future[T]") -> T:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await edge.wait(future)
        except TimeoutError as error:
            raise Unavailable("storage-hangs", f"the storage has not answered for {ANSWER_TIMEOUT_S:g} s") from error


def _read(pool: Path, host_ids: Sequence[str]) -> list[pb.BeaconSlot]:
    return [slot for host_id in host_ids if (slot := _reached(lambda host_id=host_id: _slot(pool, host_id))) is not None]  # type: ignore[misc]


def _slot(pool: Path, host_id: str) -> pb.BeaconSlot | None:
    path = beacon_slots.path_of(pool, host_id)
    if not path.exists():
        return None
    with beacon_slots.opened(path) as slot:
        beat, intent = (beacon_slots.read_block(slot, number) for number in (beacon_slots.BEAT, beacon_slots.INTENT))
    return pb.BeaconSlot(host_id=host_id, beat=beat, intent=intent)


def _reached(call: Callable[[], T]) -> T:
    try:
        return call()
    except OSError as error:
        raise Unavailable("slot-unreachable", f"the beacon's slot cannot be reached: {error.strerror or error}") from error


def _path(pool: object) -> Path:
    """Return where the pool is mounted here. Nothing is made where it is not: a slot beside the mount would prove nothing."""
    spec = from_proto(pool, PoolSpec)  # type: ignore[arg-type]
    if not spec.is_shared:
        raise InvalidRequest("pool-not-shared", f"pool {spec.pool_id} is this host's alone: no beacon renews there", field="pool")
    return Path(spec.path)


def _host_id(text: str) -> str:
    if not text.startswith("host-") or "/" in text or len(text) > 80:
        raise InvalidRequest("host-id-malformed", "a slot belongs to a host id", field="host_id")
    return text
