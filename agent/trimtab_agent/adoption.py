"""AdoptionService: turns messages into the verbs that take domains under control and give them back."""

from collections.abc import Callable

from trimtab_agent import edge
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import Hypervisor, Stamp
from trimtab_agent.servicer import Pools
from trimtab_protos import tls
from trimtab_protos.adoption_messages import AdoptedDisk
from trimtab_protos.agent.v1 import adoption_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2
from trimtab_protos.agent.v1.adoption_service_pb2_grpc import AdoptionServiceServicer
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey, DomainSpec


class AdoptionServicer(AdoptionServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        commands: Commands,
        pools: Pools,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._hypervisor = hypervisor
        self._commands = commands
        self._pools = pools
        self._authorise = authorise

    @edge.unary
    async def DescribeDomain(self, request: pb.DescribeDomainRequest, context: edge.Context) -> pb.DescribeDomainResponse:
        self._authorise(context)
        if bool(request.domain) == bool(request.vm_id):
            raise InvalidRequest("domain-missing", "name a domain, or a vm whose domain is meant", field="domain")
        found = await edge.in_pool(self._pools.query, lambda: self._hypervisor.describe_domain(request.domain, request.vm_id))
        return pb.DescribeDomainResponse(
            live=to_proto(found.live, pb.DomainDescription), stored=to_proto(found.stored, pb.DomainDescription)
        )

    @edge.unary
    async def AdoptDomain(self, request: pb.AdoptDomainRequest, context: edge.Context) -> pb.AdoptDomainResponse:
        self._authorise(context)
        spec = from_proto(request.domain, DomainSpec)
        disks = tuple(from_proto(disk, AdoptedDisk) for disk in request.disks)
        _require_subject(request.key, spec.vm_id)

        def act(_key: CommandKey, stamp: Stamp) -> pb.AdoptDomainResponse:
            seen = self._hypervisor.adopt_domain(request.uuid, spec, disks, stamp)
            return pb.AdoptDomainResponse(domain=to_proto(seen, domain_pb2.DomainObservation))

        return await self._commands.run(request, pb.AdoptDomainResponse, act, pool=self._pools.mutate, needs_lease=True)

    @edge.unary
    async def ReleaseDomain(self, request: pb.ReleaseDomainRequest, context: edge.Context) -> pb.ReleaseDomainResponse:
        self._authorise(context)
        spec = from_proto(request.domain, DomainSpec)
        _require_subject(request.key, spec.vm_id)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.ReleaseDomainResponse:
            seen = self._hypervisor.release_domain(spec, has_autostart=request.has_autostart)
            return pb.ReleaseDomainResponse(domain=to_proto(seen, domain_pb2.DomainObservation))

        return await self._commands.run(request, pb.ReleaseDomainResponse, act, pool=self._pools.mutate)


def _require_subject(key: command_pb2.CommandKey, vm_id: str) -> None:
    """A verb on a domain is guarded by its vm's turn and epoch, so its key must name that vm."""
    if key.subject_id != vm_id:
        raise InvalidRequest("subject-mismatch", f"key.subject_id must be the vm, {vm_id}", field="key.subject_id")
