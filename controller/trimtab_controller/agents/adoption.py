"""What may be asked of a host about domains of others: a part of `AgentClient`."""

from collections.abc import Sequence
from typing import Protocol

from trimtab_controller.agents.sending import Sender
from trimtab_protos.adoption_messages import AdoptedDisk, Described, DomainDescription
from trimtab_protos.agent.v1 import adoption_service_pb2 as pb
from trimtab_protos.agent.v1 import domain_pb2
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.messages import CommandKey, DomainObservation, DomainSpec


class AdoptionAgents(Protocol):
    def describe_domain(self, host_id: str, *, domain: str = "", vm_id: str = "") -> Described: ...

    def adopt_domain(
        self, host_id: str, key: CommandKey, uuid: str, domain: DomainSpec, disks: Sequence[AdoptedDisk]
    ) -> DomainObservation: ...

    def release_domain(self, host_id: str, key: CommandKey, domain: DomainSpec, *, has_autostart: bool) -> DomainObservation: ...


class AdoptionVerbs(Sender):
    """The gRPC half; the client brings the wire."""

    def describe_domain(self, host_id: str, *, domain: str = "", vm_id: str = "") -> Described:
        request = pb.DescribeDomainRequest(domain=domain, vm_id=vm_id)
        found = self._call(host_id, "DescribeDomain", request, waits_for_agent=True)
        return Described(from_proto(found.live, DomainDescription), from_proto(found.stored, DomainDescription))

    def adopt_domain(
        self, host_id: str, key: CommandKey, uuid: str, domain: DomainSpec, disks: Sequence[AdoptedDisk]
    ) -> DomainObservation:
        request = pb.AdoptDomainRequest(
            uuid=uuid,
            domain=to_proto(domain, domain_pb2.DomainSpec),
            disks=[to_proto(disk, pb.AdoptedDisk) for disk in disks],
        )
        return from_proto(self._command(host_id, "AdoptDomain", request, key).domain, DomainObservation)

    def release_domain(self, host_id: str, key: CommandKey, domain: DomainSpec, *, has_autostart: bool) -> DomainObservation:
        request = pb.ReleaseDomainRequest(domain=to_proto(domain, domain_pb2.DomainSpec), has_autostart=has_autostart)
        return from_proto(self._command(host_id, "ReleaseDomain", request, key).domain, DomainObservation)
