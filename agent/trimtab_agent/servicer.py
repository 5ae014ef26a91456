"""AgentService: each verb checks who calls, turns messages into dataclasses, and lets the hypervisor do it in a bounded pool.

grpc.aio, since sessions already need an event loop and one process may play a thousand hosts; whatever blocks runs in one of three
pools, so that hung storage leaves threads for stopping guests, and hung libvirt leaves threads for questions:

    query    reads                     4 threads
    storage  pools, volumes, images    4
    mutate   domains and networks      8
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimtab_agent import edge
from trimtab_agent.commands import Commands, key_of
from trimtab_agent.guard import NO_WARDEN, Warden
from trimtab_agent.hypervisor.base import Hypervisor, Stamp
from trimtab_agent.inventory import InventoryReader
from trimtab_agent.jobs import JobKind, Jobs
from trimtab_agent.observer import KnownPools
from trimtab_agent.replica import Offers
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2, inventory_pb2, storage_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import AgentServiceServicer
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import (
    CommandKey,
    Direction,
    DomainObservation,
    DomainSpec,
    MigrationSide,
    NetworkSpec,
    PoolSpec,
    PowerAction,
    VolumeSpec,
)

DEFAULT_PAGE_SIZE = 500
MAX_PAGE_SIZE = 1000
MAX_CONSOLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Pools:
    """The thread pools of a process; several simulated hosts share one set."""

    query: WorkerPool
    storage: WorkerPool
    mutate: WorkerPool
    jobs: WorkerPool

    def all(self) -> Sequence[WorkerPool]:
        return self.query, self.storage, self.mutate, self.jobs

    def close(self) -> None:
        for pool in self.all():
            pool.close()


def host_pools() -> Pools:
    """Return the pools of a real host."""
    return Pools(
        query=WorkerPool("query", threads=4),
        storage=WorkerPool("storage", threads=4),
        mutate=WorkerPool("mutate", threads=8),
        # As many as all classes of jobs may run at once; waiting ones do not hold a thread.
        jobs=WorkerPool("jobs", threads=20),
    )


class AgentServicer(AgentServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        commands: Commands,
        jobs: Jobs,
        offers: Offers,
        pools: Pools,
        known_pools: KnownPools,
        inventory: InventoryReader,
        incarnation: str,
        agent_address: Callable[[], str],
        leave: Callable[[bool], Sequence[str]],
        warden: Warden = NO_WARDEN,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        """`leave` undoes the join and lets the agent end itself after the answer; it gets whether to keep certificates."""
        self._hypervisor = hypervisor
        self._commands = commands
        self._jobs = jobs
        self._offers = offers
        self._pools = pools
        self._known_pools = known_pools
        self._inventory = inventory
        self._incarnation = incarnation
        self._agent_address = agent_address
        self._leave = leave
        self._warden = warden
        self._authorise = authorise

    # Reads.

    @edge.unary
    async def GetInventory(self, request: pb.GetInventoryRequest, context: edge.Context) -> pb.GetInventoryResponse:
        self._authorise(context)
        found = await edge.in_pool(self._pools.query, lambda: self._inventory.read(only_fitness=request.only_fitness))
        return pb.GetInventoryResponse(inventory=to_proto(found, inventory_pb2.Inventory), incarnation=self._incarnation)

    @edge.unary
    async def ListDomains(self, request: pb.ListDomainsRequest, context: edge.Context) -> pb.ListDomainsResponse:
        self._authorise(context)
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise InvalidRequest("page-size-out-of-range", f"page_size must be 0 to {MAX_PAGE_SIZE}", field="page_size")
        size = request.page_size or DEFAULT_PAGE_SIZE
        found = await edge.in_pool(self._pools.query, self._hypervisor.list_domains)
        # By name and UUID: names are unique on a host, but a listing may be taken while one is renamed.
        placed = [(f"{domain.name}\n{domain.uuid}", domain) for domain in found]
        rest = sorted((entry for entry in placed if entry[0] > request.page_token), key=lambda entry: entry[0])
        page = rest[:size]
        return pb.ListDomainsResponse(
            domains=[to_proto(domain, domain_pb2.DomainObservation) for _place, domain in page],
            next_page_token=page[-1][0] if len(rest) > size else "",
            incarnation=self._incarnation,
        )

    @edge.unary
    async def GetDomain(self, request: pb.GetDomainRequest, context: edge.Context) -> pb.GetDomainResponse:
        self._authorise(context)
        found = await edge.in_pool(self._pools.query, lambda: self._hypervisor.observe_domain(request.vm_id))
        return pb.GetDomainResponse(domain=_observation(found), incarnation=self._incarnation)

    @edge.unary
    async def ReadConsole(self, request: pb.ReadConsoleRequest, context: edge.Context) -> pb.ReadConsoleResponse:
        self._authorise(context)
        size = min(request.max_bytes or MAX_CONSOLE_BYTES, MAX_CONSOLE_BYTES)
        if size < 0:
            raise InvalidRequest("max-bytes-negative", "max_bytes must be 0 or more", field="max_bytes")
        content, next_offset = await edge.in_pool(
            self._pools.query, lambda: self._hypervisor.read_console(request.vm_id, request.offset, size)
        )
        return pb.ReadConsoleResponse(content=content, next_offset=next_offset)

    # Storage.

    @edge.unary
    async def EnsurePool(self, request: pb.EnsurePoolRequest, context: edge.Context) -> pb.EnsurePoolResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.EnsurePoolResponse:
            seen = self._hypervisor.ensure_pool(pool)
            self._known_pools.add(pool)
            return pb.EnsurePoolResponse(pool=to_proto(seen, storage_pb2.PoolObservation))

        # Acted on at each repeat: the answer is what is seen, and ensuring twice is cheap.
        return await self._commands.run(request, pb.EnsurePoolResponse, act, pool=self._pools.storage, remembers=False)

    @edge.unary
    async def CheckPoolMarker(self, request: pb.CheckPoolMarkerRequest, context: edge.Context) -> pb.CheckPoolMarkerResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)
        content = await edge.in_pool(
            self._pools.storage,
            lambda: self._hypervisor.check_marker(pool, request.marker, request.write_content, request.remove),
        )
        return pb.CheckPoolMarkerResponse(content=content)

    @edge.unary
    async def RemovePool(self, request: pb.RemovePoolRequest, context: edge.Context) -> pb.RemovePoolResponse:
        self._authorise(context)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.RemovePoolResponse:
            self._hypervisor.remove_pool(request.pool_id)
            self._known_pools.remove(request.pool_id)
            return pb.RemovePoolResponse()

        return await self._commands.run(request, pb.RemovePoolResponse, act, pool=self._pools.storage)

    @edge.unary
    async def EnsureVolume(self, request: pb.EnsureVolumeRequest, context: edge.Context) -> pb.EnsureVolumeResponse:
        self._authorise(context)
        volume, pool = from_proto(request.volume, VolumeSpec), from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.EnsureVolumeResponse:
            seen = self._hypervisor.ensure_volume(volume, pool)
            return pb.EnsureVolumeResponse(volume=to_proto(seen, storage_pb2.VolumeObservation))

        return await self._commands.run(request, pb.EnsureVolumeResponse, act, pool=self._pools.storage)

    @edge.unary
    async def ResizeVolume(self, request: pb.ResizeVolumeRequest, context: edge.Context) -> pb.ResizeVolumeResponse:
        self._authorise(context)
        volume, pool = from_proto(request.volume, VolumeSpec), from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.ResizeVolumeResponse:
            seen = self._hypervisor.resize_volume(volume, pool, request.vm_id)
            return pb.ResizeVolumeResponse(volume=to_proto(seen, storage_pb2.VolumeObservation))

        return await self._commands.run(request, pb.ResizeVolumeResponse, act, pool=self._pools.storage)

    @edge.unary
    async def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: edge.Context) -> pb.DeleteVolumeResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.DeleteVolumeResponse:
            self._hypervisor.delete_volume(request.volume_id, pool)
            return pb.DeleteVolumeResponse()

        return await self._commands.run(request, pb.DeleteVolumeResponse, act, pool=self._pools.storage)

    # Networks.

    @edge.unary
    async def EnsureNetwork(self, request: pb.EnsureNetworkRequest, context: edge.Context) -> pb.EnsureNetworkResponse:
        self._authorise(context)
        network = from_proto(request.network, NetworkSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.EnsureNetworkResponse:
            try:
                self._hypervisor.ensure_network(network)
            except Conflict as error:
                # The operator's bridge is not as it must be: an answer about this host, not a failed command.
                return pb.EnsureNetworkResponse(is_reachable=False, problem=error.message)
            return pb.EnsureNetworkResponse(is_reachable=True)

        # Acted on at each repeat: the operator may have mended the bridge meanwhile.
        return await self._commands.run(request, pb.EnsureNetworkResponse, act, pool=self._pools.mutate, remembers=False)

    @edge.unary
    async def RemoveNetwork(self, request: pb.RemoveNetworkRequest, context: edge.Context) -> pb.RemoveNetworkResponse:
        self._authorise(context)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.RemoveNetworkResponse:
            self._hypervisor.remove_network(request.network_id)
            return pb.RemoveNetworkResponse()

        return await self._commands.run(request, pb.RemoveNetworkResponse, act, pool=self._pools.mutate)

    # Images.

    @edge.unary
    async def StartImageImport(self, request: pb.StartImageImportRequest, context: edge.Context) -> pb.StartImageImportResponse:
        self._authorise(context)
        if request.WhichOneof("source") is None:
            raise InvalidRequest("source-missing", "the import names no source", field="source")

        def act(key: CommandKey, _stamp: Stamp) -> pb.StartImageImportResponse:
            job = self._jobs.start(key, JobKind.IMPORT, request.SerializeToString()).result()
            return pb.StartImageImportResponse(job=job)

        return await self._commands.run(request, pb.StartImageImportResponse, act, pool=self._pools.query, remembers=False)

    @edge.unary
    async def OfferImage(self, request: pb.OfferImageRequest, context: edge.Context) -> pb.OfferImageResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.OfferImageResponse:
            self._hypervisor.open_image(request.image_id, pool)
            self._offers.make(
                image_id=request.image_id,
                pool=pool,
                ticket=request.ticket,
                peer_host_id=request.peer_host_id,
                ttl_s=request.ttl_s,
            )
            return pb.OfferImageResponse(address=self._agent_address())

        # Acted on at each repeat: every sending carries a ticket of its own, and offers do not outlive the agent.
        return await self._commands.run(request, pb.OfferImageResponse, act, pool=self._pools.storage, remembers=False)

    @edge.unary
    async def DeleteImage(self, request: pb.DeleteImageRequest, context: edge.Context) -> pb.DeleteImageResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.DeleteImageResponse:
            self._hypervisor.delete_image(request.image_id, pool)
            return pb.DeleteImageResponse()

        return await self._commands.run(request, pb.DeleteImageResponse, act, pool=self._pools.storage)

    # Domains.

    @edge.unary
    async def DefineDomain(self, request: pb.DefineDomainRequest, context: edge.Context) -> pb.DefineDomainResponse:
        self._authorise(context)
        domain = from_proto(request.domain, DomainSpec)
        _require_subject(request.key, domain.vm_id)

        def act(_key: CommandKey, stamp: Stamp) -> pb.DefineDomainResponse:
            self._warden.expect(domain, stamp.epoch)
            seen = self._hypervisor.define_domain(domain, stamp, needs_volumes=request.needs_volumes)
            return pb.DefineDomainResponse(domain=_observation(seen))

        return await self._commands.run(request, pb.DefineDomainResponse, act, pool=self._pools.mutate, needs_lease=True)

    @edge.unary
    async def ApplyDomain(self, request: pb.ApplyDomainRequest, context: edge.Context) -> pb.ApplyDomainResponse:
        self._authorise(context)
        domain = from_proto(request.domain, DomainSpec)
        _require_subject(request.key, domain.vm_id)

        def act(_key: CommandKey, stamp: Stamp) -> pb.ApplyDomainResponse:
            self._warden.expect(domain, stamp.epoch)
            applied = self._hypervisor.apply_domain(domain, stamp)
            left = [to_proto(each, domain_pb2.ChangeLeft) for each in applied.left]
            return pb.ApplyDomainResponse(domain=_observation(applied.domain), left=left)

        # Acted on at each repeat: a guest that had not followed yet may have by now.
        return await self._commands.run(
            request,
            pb.ApplyDomainResponse,
            act,
            pool=self._pools.mutate,
            needs_lease=True,
            remembers=False,
            is_word_of_the_moment=True,
        )

    @edge.unary
    async def UndefineDomain(self, request: pb.UndefineDomainRequest, context: edge.Context) -> pb.UndefineDomainResponse:
        self._authorise(context)
        _require_subject(request.key, request.vm_id)
        pools = tuple(from_proto(pool, PoolSpec) for pool in request.pools)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.UndefineDomainResponse:
            self._hypervisor.undefine_domain(
                request.vm_id, pools, kill_if_running=request.kill_if_running, keep_state_files=request.keep_state_files
            )
            return pb.UndefineDomainResponse()

        return await self._commands.run(request, pb.UndefineDomainResponse, act, pool=self._pools.mutate)

    @edge.unary
    async def ChangePower(self, request: pb.ChangePowerRequest, context: edge.Context) -> pb.ChangePowerResponse:
        self._authorise(context)
        _require_subject(request.key, request.vm_id)
        action = _power_action(request.action)

        def act(_key: CommandKey, stamp: Stamp) -> pb.ChangePowerResponse:
            return pb.ChangePowerResponse(domain=_observation(self._hypervisor.change_power(request.vm_id, action, stamp)))

        return await self._commands.run(
            request,
            pb.ChangePowerResponse,
            act,
            pool=self._pools.mutate,
            needs_lease=action in {PowerAction.START, PowerAction.RESUME},
        )

    # Migration.

    @edge.unary
    async def PrepareMigration(self, request: pb.PrepareMigrationRequest, context: edge.Context) -> pb.PrepareMigrationResponse:
        self._authorise(context)
        domain = from_proto(request.domain, DomainSpec)
        _require_subject(request.key, domain.vm_id)
        copied = tuple(from_proto(volume, VolumeSpec) for volume in request.copied_volumes)

        def act(_key: CommandKey, stamp: Stamp) -> pb.PrepareMigrationResponse:
            self._warden.expect(domain, stamp.epoch)
            libvirt_uri, migration_uri = self._hypervisor.prepare_migration(domain, copied, request.source_host_id)
            return pb.PrepareMigrationResponse(libvirt_uri=libvirt_uri, migration_uri=migration_uri)

        return await self._commands.run(request, pb.PrepareMigrationResponse, act, pool=self._pools.mutate, needs_lease=True)

    @edge.unary
    async def StartMigration(self, request: pb.StartMigrationRequest, context: edge.Context) -> pb.StartMigrationResponse:
        self._authorise(context)
        _require_subject(request.key, request.vm_id)

        def act(key: CommandKey, _stamp: Stamp) -> pb.StartMigrationResponse:
            job = self._jobs.start(key, JobKind.MIGRATION, request.SerializeToString()).result()
            return pb.StartMigrationResponse(job=job)

        return await self._commands.run(
            request, pb.StartMigrationResponse, act, pool=self._pools.query, needs_lease=True, remembers=False
        )

    @edge.unary
    async def SettleMigration(self, request: pb.SettleMigrationRequest, context: edge.Context) -> pb.SettleMigrationResponse:
        self._authorise(context)
        _require_subject(request.key, request.vm_id)
        side = _migration_side(request.side)
        domain = from_proto(request.domain, DomainSpec)
        removed = tuple(from_proto(volume, VolumeSpec) for volume in request.removed_volumes)

        def act(_key: CommandKey, stamp: Stamp) -> pb.SettleMigrationResponse:
            seen = self._hypervisor.settle_migration(request.vm_id, side, domain, removed, stamp)
            return pb.SettleMigrationResponse(domain=_observation(seen))

        return await self._commands.run(request, pb.SettleMigrationResponse, act, pool=self._pools.mutate)

    # Jobs.

    @edge.unary
    async def GetJob(self, request: pb.GetJobRequest, context: edge.Context) -> pb.GetJobResponse:
        self._authorise(context)
        direction = _DIRECTIONS.get(request.direction)
        if direction is None:
            raise InvalidRequest("direction-missing", "direction must be DO or UNDO", field="direction")
        name = (request.operation_id, request.step, direction.value)
        job = await edge.wait(self._jobs.get(name))
        return pb.GetJobResponse(job=job, incarnation=self._incarnation)

    @edge.unary
    async def ListJobs(self, request: pb.ListJobsRequest, context: edge.Context) -> pb.ListJobsResponse:  # noqa: ARG002
        self._authorise(context)
        jobs = await edge.wait(self._jobs.list_recent())
        return pb.ListJobsResponse(jobs=jobs, incarnation=self._incarnation)

    @edge.unary
    async def CancelJob(self, request: pb.CancelJobRequest, context: edge.Context) -> pb.CancelJobResponse:
        self._authorise(context)
        key = key_of(request)
        await self._commands.check(key)
        job = await edge.wait(self._jobs.cancel(key))
        return pb.CancelJobResponse(job=job)

    # The end.

    @edge.unary
    async def LeaveFleet(self, request: pb.LeaveFleetRequest, context: edge.Context) -> pb.LeaveFleetResponse:
        self._authorise(context)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.LeaveFleetResponse:
            return pb.LeaveFleetResponse(undone=self._leave(request.keep_certificates))

        return await self._commands.run(request, pb.LeaveFleetResponse, act, pool=self._pools.mutate)


_DIRECTIONS: Mapping[int, Direction] = {
    command_pb2.DIRECTION_DO: Direction.DO,
    command_pb2.DIRECTION_UNDO: Direction.UNDO,
}


def _observation(seen: DomainObservation) -> domain_pb2.DomainObservation:
    return to_proto(seen, domain_pb2.DomainObservation)


def _require_subject(key: command_pb2.CommandKey, vm_id: str) -> None:
    """A verb on a domain is guarded by its vm's turn and epoch, so its key must name that vm."""
    if key.subject_id != vm_id:
        raise InvalidRequest("subject-mismatch", f"key.subject_id must be the vm, {vm_id}", field="key.subject_id")


def _power_action(number: int) -> PowerAction:
    name = _enum_name(pb.PowerAction, number, prefix="POWER_ACTION_")
    if name not in PowerAction.__members__:
        raise InvalidRequest("action-unknown", "action must be one that this release knows", field="action")
    return PowerAction[name]


def _migration_side(number: int) -> MigrationSide:
    name = _enum_name(pb.MigrationSide, number, prefix="MIGRATION_SIDE_")
    if name not in MigrationSide.__members__:
        raise InvalidRequest("side-unknown", "side must be KEEP or REMOVE", field="side")
    return MigrationSide[name]


def _enum_name(enum: object, number: int, *, prefix: str) -> str:
    value = enum.DESCRIPTOR.values_by_number.get(number)  # type: ignore[attr-defined]
    return value.name.removeprefix(prefix) if value else ""
