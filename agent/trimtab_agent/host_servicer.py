"""HostService: what maintenance asks of the machine itself."""

from collections.abc import Callable

from trimtab_agent import edge
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import Hypervisor, Stamp
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import host_service_pb2 as pb
from trimtab_protos.agent.v1.host_service_pb2_grpc import HostServiceServicer
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import CommandKey, DomainState

_OFF = frozenset({DomainState.STOPPED, DomainState.ABSENT, DomainState.CRASHED})


class HostServicer(HostServiceServicer):
    """The machine under one agent."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        commands: Commands,
        pool: WorkerPool,
        boot_id: str,
        reboot: Callable[[], None],
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        """`reboot` has the operating system restart and returns."""
        self._hypervisor = hypervisor
        self._commands = commands
        self._pool = pool
        self._boot_id = boot_id
        self._reboot = reboot
        self._authorise = authorise

    @edge.unary
    async def RebootHost(self, request: pb.RebootHostRequest, context: edge.Context) -> pb.RebootHostResponse:
        self._authorise(context)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.RebootHostResponse:
            if request.boot_id != self._boot_id:
                return pb.RebootHostResponse()
            running = [one for one in self._hypervisor.list_domains() if one.state not in _OFF]
            if running and not request.ends_guests:
                names = ", ".join(sorted(one.vm_id or one.name for one in running)[:8])
                raise Conflict("guests-running", f"{len(running)} guests run on this host and would end with it: {names}")
            self._reboot()
            return pb.RebootHostResponse(has_begun=True)

        return await self._commands.run(request, pb.RebootHostResponse, act, pool=self._pool)
