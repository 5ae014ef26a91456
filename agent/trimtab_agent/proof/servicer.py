"""ProofService: what a booted backup shows of itself, asked where nobody but this agent reaches it."""

from collections.abc import Callable
from functools import partial

from trimtab_agent import edge
from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_range
from trimtab_agent.proof.lines import Lines
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import proof_service_pb2 as pb
from trimtab_protos.agent.v1.proof_service_pb2_grpc import ProofServiceServicer
from trimtab_protos.codec import from_proto
from trimtab_protos.messages import NicSpec

WAIT_MAX_MS = 5_000


class ProofServicer(ProofServiceServicer):
    """The verbs of one host."""

    def __init__(
        self, lines: Lines, *, pool: WorkerPool, authorise: Callable[[tls.AuthContext], None] = tls.require_controller
    ) -> None:
        self._lines = lines
        self._pool = pool
        self._authorise = authorise

    @edge.unary
    async def KnockGuest(self, request: pb.KnockGuestRequest, context: edge.Context) -> pb.KnockGuestResponse:
        self._authorise(context)
        check_id(request.vm_id, "vm_id")
        check_range(request.port, "port", low=1, high=65535)
        nics = [from_proto(nic, NicSpec) for nic in request.nics]
        timeout_s = min(max(request.timeout_ms, 0), WAIT_MAX_MS) / 1000
        knock = partial(self._lines.knock, request.vm_id, nics, request.port, timeout_s=timeout_s)
        found = await edge.in_pool(self._pool, knock)
        return pb.KnockGuestResponse(has_answered=found.has_answered, address=found.address, problem=found.problem)
