"""The wire between controller and agents, where tests break things: real gRPC channels whose calls can be refused, lost or held.

The real `GrpcAgentClient` is on one side, real agents on simulated hosts on the other; between them a call meets at most one
planned `WireFault`. Every mutating call is recorded, so that a test can run once, count, and then break each call in turn.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import grpc

from tests.operations.clock import VirtualClock
from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.simulated import SimulatedHost
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.journal import JournalFile
from trimtab_agent.servicer import Pools
from trimtab_agent.simulated_agents import SharedResources, shared_pools, start_simulated_agent, stop_simulated_agent
from trimtab_agent.workers import WorkerPool
from trimtab_controller.agents.grpc_client import AgentAddress, GrpcAgentClient
from trimtab_protos import status
from trimtab_protos.errors import TrimtabError

START_TIMEOUT_S = 20.0
LEASE_NUMBER = 1
FOR_EVER_S = 1e9


class How(Enum):
    REFUSED = auto()
    """The agent answers with `error` and did nothing."""
    UNREACHABLE = auto()
    """The call never arrives."""
    REPLY_LOST = auto()
    """The agent acts; the caller's deadline ends without an answer."""
    HELD = auto()
    """The call is on its way until `released` is set, then arrives."""
    TWICE = auto()
    """The call arrives two times; the second answer counts."""


@dataclass(slots=True, eq=False)
class WireFault:
    """Meets the first call that it is planned for."""

    how: How
    verb: str = ""
    """'' is any mutating verb."""
    host_id: str = ""
    after_calls: int = 0
    """Lets so many matching calls through first."""
    error: TrimtabError | None = None
    met: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Call:
    host_id: str
    verb: str
    step: str
    direction: int
    turn: int


class BrokenCall(grpc.RpcError):
    """What a caller sees of a failed call."""

    def __init__(self, code: grpc.StatusCode, error: TrimtabError | None = None) -> None:
        super().__init__(code.name)
        self._code, self._error = code, error

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "broken by a test"

    def trailing_metadata(self) -> object:
        return status.trailing_metadata(self._error) if self._error else ()


class Wire:
    """Everything that is between one controller and its agents. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[WireFault] = []
        self.calls: list[Call] = []
        # Codes of the typed errors with which agents answered, in order.
        self.refusals: list[tuple[str, str]] = []
        self.cut_hosts: set[str] = set()
        self.before_call: Callable[[Call], None] = lambda _call: None

    def plan(self, fault: WireFault) -> WireFault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.released.set()

    def take(self, host_id: str, verb: str, request: Any) -> WireFault | None:
        """Record a call and return the fault that it meets."""
        is_command = "key" in request.DESCRIPTOR.fields_by_name
        with self._lock:
            if is_command:
                key = request.key
                self.calls.append(Call(host_id, verb, key.step, key.direction, key.turn))
            for fault in self._faults:
                wanted = fault.verb == verb or (not fault.verb and is_command)
                if not wanted or fault.host_id not in {"", host_id}:
                    continue
                if fault.after_calls > 0:
                    fault.after_calls -= 1
                    continue
                self._faults.remove(fault)
                fault.met.set()
                return fault
        return None


class WireChannel:
    """A channel to one agent. Has the one method of `grpc.Channel` that stubs of unary verbs use, and `close`."""

    def __init__(self, wire: Wire, host_id: str, channel: grpc.Channel) -> None:
        self._wire, self._host_id, self._channel = wire, host_id, channel

    def unary_unary(self, path: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
        verb = path.rpartition("/")[2]
        over_grpc = self._channel.unary_unary(path, *arguments, **options)

        def real(request: Any, **how: Any) -> Any:
            try:
                return over_grpc(request, **how)
            except grpc.RpcError as error:
                self._wire.refusals.append((verb, status.from_rpc_error(error, peer=self._host_id).code))
                raise

        def call(request: Any, **how: Any) -> Any:
            fault = self._wire.take(self._host_id, verb, request)
            if self._host_id in self._wire.cut_hosts:
                raise BrokenCall(grpc.StatusCode.UNAVAILABLE)
            if fault is None:
                return real(request, **how)
            match fault.how:
                case How.REFUSED:
                    assert fault.error is not None
                    raise BrokenCall(status.STATUS_BY_KIND[fault.error.kind], fault.error)
                case How.UNREACHABLE:
                    raise BrokenCall(grpc.StatusCode.UNAVAILABLE)
                case How.REPLY_LOST:
                    with contextlib.suppress(grpc.RpcError):  # what the agent answered is lost, whatever it was
                        real(request, **how)
                    raise BrokenCall(grpc.StatusCode.DEADLINE_EXCEEDED)
                case How.HELD:
                    assert fault.released.wait(START_TIMEOUT_S), "nobody released a held call"
                    return real(request, **how)
                case How.TWICE:
                    real(request, **how)
                    return real(request, **how)

        return call

    def close(self) -> None:
        self._channel.close()


class Loop:
    """An event loop in a thread of its own, for agents."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agents", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(START_TIMEOUT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)
        self._loop.close()


class Workshop:
    """What simulated agents of many stories share: an event loop, and threads."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.pools: Pools = shared_pools(threads=8, job_threads=8)
        self.watch = WorkerPool("watch", threads=2, max_queued=1000)

    def close(self) -> None:
        self.pools.close()
        self.watch.close()
        self.loop.close()


class SimulatedAgents:
    """The agents of one story: started, stopped and started again on the same simulated hosts."""

    def __init__(self, workshop: Workshop, directory: Path, clock: VirtualClock) -> None:
        self.fleet = SimulatedFleet(clock=clock)
        self._workshop = workshop
        self._directory = directory
        self._resources = SharedResources(journal=JournalFile(":memory:"), pools=workshop.pools, watch=workshop.watch)
        self._agents: dict[str, Agent] = {}
        self.on_reboot: Callable[[str], None] = lambda _host_id: None

    def start(self, host: SimulatedHost) -> Agent:
        """Start the agent of a new host, or of one that is there: then with the journal it had."""
        address = f"unix:{self._directory}/{host.host_id[-8:]}.sock"
        agent: Agent = self._workshop.loop.run(
            start_simulated_agent(
                self.fleet,
                host,
                resources=self._resources,
                credentials=None,
                listen_address=address,
                reboot=lambda: self.on_reboot(host.host_id),
            )
        )
        self._workshop.loop.run(_rebuilt(agent))
        agent.grant_lease(number=LEASE_NUMBER, ttl_s=FOR_EVER_S)
        self._agents[host.host_id] = agent
        return agent

    def agent(self, host_id: str) -> Agent:
        return self._agents[host_id]

    def stop(self, host_id: str) -> None:
        self._workshop.loop.run(stop_simulated_agent(self._agents.pop(host_id)))

    def restart(self, host_id: str) -> Agent:
        self.stop(host_id)
        return self.start(self.fleet.hosts[host_id].host)

    def address(self, host_id: str) -> str:
        return self._agents[host_id].address

    def jobs_under_way(self) -> int:
        return sum(len(agent.jobs.running()) for agent in self._agents.values())

    def close(self) -> None:
        for host_id in list(self._agents):
            self.stop(host_id)
        self._resources.journal.close()
        self.fleet.close()


def client_over(
    wire: Wire,
    lookup: Callable[[str], AgentAddress],
    *,
    open_seal: Callable[[str, str], str] | None = None,
    seals_of: Callable[[str], Mapping[str, str]] = lambda _subject_id: {},
) -> GrpcAgentClient:
    """Return the real client whose channels go through the wire."""

    def connect(host_id: str, address: str) -> Any:
        return WireChannel(wire, host_id, grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))

    opens = {"open_seal": open_seal} if open_seal is not None else {}
    return GrpcAgentClient(lookup=lookup, connect=connect, seals_of=seals_of, **opens)


async def _rebuilt(agent: Agent) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while not agent.replay.is_rebuilt:
            await asyncio.sleep(0.001)
