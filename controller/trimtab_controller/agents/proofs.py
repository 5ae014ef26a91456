"""What may be asked of a host about guests that prove their backup."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_controller.agents.sending import Sender
from trimtab_protos.agent.v1 import domain_pb2
from trimtab_protos.agent.v1 import proof_service_pb2 as pb
from trimtab_protos.codec import to_proto
from trimtab_protos.messages import NicSpec

KNOCK_WAIT_S = 1.5


@dataclass(frozen=True, slots=True)
class Knocked:
    """`problem` is a part of a sentence about the guest; '' where it has answered."""

    has_answered: bool
    problem: str


class ProofAgents(Protocol):
    def knock_guest(self, host_id: str, vm_id: str, nics: Sequence[NicSpec], port: int) -> Knocked:
        """Tell whether a TCP port of a guest on no network answers, within some two seconds. Conflict: it does not run."""


class ProofVerbs(Sender):
    """`ProofAgents` over whatever sends a message: mixed into the gRPC client."""

    def knock_guest(self, host_id: str, vm_id: str, nics: Sequence[NicSpec], port: int) -> Knocked:
        request = pb.KnockGuestRequest(
            vm_id=vm_id,
            nics=[to_proto(nic, domain_pb2.NicSpec) for nic in nics],
            port=port,
            timeout_ms=int(KNOCK_WAIT_S * 1000),
        )
        found = self._call(host_id, "KnockGuest", request, timeout_s=KNOCK_WAIT_S + 5.0)
        return Knocked(found.has_answered, found.problem)
