"""SecretService: keys that come to this host and are never written down here, not in the journal either."""

from collections.abc import Callable

from trimtab_agent import edge
from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import secret_service_pb2 as pb
from trimtab_protos.agent.v1.secret_service_pb2_grpc import SecretServiceServicer
from trimtab_protos.errors import InvalidRequest

KEYS_MAX = 64


class SecretServicer(SecretServiceServicer):
    """The secrets of one host."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        pool: WorkerPool,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._hypervisor = hypervisor
        self._pool = pool
        self._authorise = authorise

    @edge.unary
    async def GiveVolumeKeys(self, request: pb.GiveVolumeKeysRequest, context: edge.Context) -> pb.GiveVolumeKeysResponse:
        self._authorise(context)
        if len(request.keys) + len(request.pool_secrets) > KEYS_MAX:
            raise InvalidRequest("keys-too-many", f"keys: at most {KEYS_MAX} at once", field="keys")
        keys = {one.volume_id: one.key for one in request.keys}
        keys |= {one.pool_id: one.secret for one in request.pool_secrets}
        await edge.in_pool(self._pool, lambda: self._hypervisor.give_volume_keys(keys))
        return pb.GiveVolumeKeysResponse()
