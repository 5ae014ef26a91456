"""What gateways tell the controller's other processes about hosts while Redis is away: the servicer, and who asks."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grpc
import structlog

from trimtab_controller.pki import CONTROLLER_NAME
from trimtab_controller.rpc.host_states import HostState
from trimtab_controller.rpc.peers import require_controller, typed_errors
from trimtab_controller.store import leases
from trimtab_controller.store.database import Database
from trimtab_protos.controller.v1 import host_states_service_pb2 as pb
from trimtab_protos.controller.v1 import host_states_service_pb2_grpc as pb_grpc
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

DEADLINE_S = 1.0
"""A gateway answers from memory; one that does not within this time is asked again at the next round."""

Context = grpc.aio.ServicerContext[pb.ListHostStatesRequest, pb.ListHostStatesResponse]


class Knows(Protocol):
    """What of a gateway the servicer needs."""

    gateway_id: str
    states: dict[str, HostState]


class HostStatesServicer(pb_grpc.HostStatesServiceServicer):
    def __init__(self, gateway: Knows) -> None:
        self._gateway = gateway

    async def ListHostStates(self, _request: pb.ListHostStatesRequest, context: Context) -> pb.ListHostStatesResponse:
        async with typed_errors(context, "list host states"):
            require_controller(context)
        states = [_to_proto(state) for state in self._gateway.states.values()]
        return pb.ListHostStatesResponse(gateway_id=self._gateway.gateway_id, hosts=states)


class GatewayAsker:
    """Asks every gateway whose lease row is there, all at once; for a thread that may wait a second."""

    def __init__(self, db: Database, connect: Callable[[str, str], grpc.Channel]) -> None:
        """`connect`: peer name, address -> channel with the controller's own certificate."""
        self._db, self._connect = db, connect
        self._channels: dict[str, grpc.Channel] = {}

    def states(self) -> dict[str, dict[str, Any]]:
        """Return host states by host id, the newest of each, as `HostState.as_json` has them; {} where nobody answers."""
        try:
            rows = self._db.read(lambda session: leases.named(session, leases.GATEWAY_PREFIX))
        except Unavailable:
            return {}
        addresses = {str(row.context.get("address", "")) for row in rows if row.owner} - {""}
        self._drop_all_but(addresses)
        calls = {address: self._call(address) for address in addresses}
        found: dict[str, dict[str, Any]] = {}
        for address, call in calls.items():
            try:
                found = newest_of(found, _from_proto(call.result()))
            except grpc.RpcError as error:
                log.debug("gateway does not tell its hosts' states", address=address, error=str(error)[:200])
        return found

    def close(self) -> None:
        self._drop_all_but(set())

    def _call(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = self._connect(CONTROLLER_NAME, address)
        stub = pb_grpc.HostStatesServiceStub(self._channels[address])
        return stub.ListHostStates.future(pb.ListHostStatesRequest(), timeout=DEADLINE_S)

    def _drop_all_but(self, addresses: set[str]) -> None:
        for address in set(self._channels) - addresses:
            self._channels.pop(address).close()


def newest_of(first: Mapping[str, dict[str, Any]], second: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return both, of each host what was heard last: one that went elsewhere may still be known where it was."""
    merged = dict(first)
    for host_id, state in second.items():
        if host_id not in merged or state["at_ms"] >= merged[host_id]["at_ms"]:
            merged[host_id] = state
    return merged


def add_to_server(gateway: Knows, server: Any) -> None:
    pb_grpc.add_HostStatesServiceServicer_to_server(HostStatesServicer(gateway), server)


def _to_proto(state: HostState) -> pb.HostState:
    return pb.HostState(
        host_id=state.host_id,
        heard_unix_ms=state.heard_unix_ms,
        connectivity=state.connectivity.value,
        lease_number=state.lease_number,
        skew_ms=state.skew_ms,
        is_hypervisor_up=state.is_hypervisor_up,
        is_warden_armed=state.is_warden_armed,
        kill_ms=state.kill_ms,
        load=state.load,
    )


def _from_proto(response: pb.ListHostStatesResponse) -> dict[str, dict[str, Any]]:
    found = {}
    for one in response.hosts:
        load = {field.name: getattr(one.load, field.name) for field in one.load.DESCRIPTOR.fields}
        found[one.host_id] = {
            "gateway": response.gateway_id,
            "at_ms": one.heard_unix_ms,
            "connectivity": one.connectivity,
            "lease_number": one.lease_number,
            "skew_ms": one.skew_ms,
            "is_hypervisor_up": one.is_hypervisor_up,
            "is_warden_armed": one.is_warden_armed,
            "kill_ms": one.kill_ms,
            "load": load,
        }
    return found
