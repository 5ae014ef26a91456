"""LayerService: what snapshots and clones ask of this host; turns messages into verbs of the hypervisor and jobs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from trimtab_agent import edge
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import Hypervisor, JobControl, Stamp
from trimtab_agent.job_rows import JobResult
from trimtab_agent.jobs import JobKind, Jobs, Runner
from trimtab_agent.servicer import Pools
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2, command_pb2, storage_pb2
from trimtab_protos.agent.v1 import layer_service_pb2 as pb
from trimtab_protos.agent.v1.layer_service_pb2_grpc import LayerServiceServicer
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey, DomainSpec, LayerMerge, PoolKind, PoolSpec, VolumeSpec
from trimtab_protos.volume_messages import VolumeMove

R = TypeVar("R", bound=Message)


def layer_runners(hypervisor: Hypervisor) -> Mapping[JobKind, Runner]:
    """Return what the two kinds of job do; a request is journaled as a `LayerJob`."""

    def memory(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:
        job = pb.LayerJob.FromString(request)
        if job.WhichOneof("work") == "memory_snapshot":
            asked = job.memory_snapshot
            return hypervisor.snapshot_memory(from_proto(asked.domain, DomainSpec), stamp, asked.snapshot_id, control)
        restore = job.memory_restore
        return hypervisor.restore_memory(from_proto(restore.domain, DomainSpec), stamp, restore.snapshot_id, control)

    def layers(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:
        job = pb.LayerJob.FromString(request)
        if job.WhichOneof("work") == "copy":
            return hypervisor.copy_volume(from_proto(job.copy.volume, VolumeSpec), from_proto(job.copy.pool, PoolSpec), control)
        if job.WhichOneof("work") == "move":
            moved = from_proto(job.move.domain, DomainSpec) if job.move.HasField("domain") else None
            return hypervisor.move_volume(from_proto(job.move.move, VolumeMove), moved, stamp, control)
        asked = job.merge
        domain = from_proto(asked.domain, DomainSpec) if asked.HasField("domain") else None
        merge, pool = from_proto(asked.merge, LayerMerge), from_proto(asked.pool, PoolSpec)
        return hypervisor.merge_layer(merge, pool, domain, stamp, control)

    return {JobKind.MEMORY: memory, JobKind.LAYERS: layers}


class LayerServicer(LayerServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        commands: Commands,
        jobs: Jobs,
        pools: Pools,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._hypervisor = hypervisor
        self._commands = commands
        self._jobs = jobs
        self._pools = pools
        self._authorise = authorise

    @edge.unary
    async def SwitchLayers(self, request: pb.SwitchLayersRequest, context: edge.Context) -> pb.SwitchLayersResponse:
        self._authorise(context)
        domain = from_proto(request.domain, DomainSpec)
        _require_subject(request.key, domain.vm_id)

        def act(_key: CommandKey, stamp: Stamp) -> pb.SwitchLayersResponse:
            result = self._hypervisor.switch_layers(domain, stamp, wants_freeze=request.wants_freeze)
            return pb.SwitchLayersResponse(result=to_proto(result, storage_pb2.LayerResult))

        return await self._commands.run(request, pb.SwitchLayersResponse, act, pool=self._pools.mutate, needs_lease=True)

    @edge.unary
    async def DeleteLayer(self, request: pb.DeleteLayerRequest, context: edge.Context) -> pb.DeleteLayerResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.DeleteLayerResponse:
            self._hypervisor.delete_layer(request.volume_id, request.layer_id, pool)
            return pb.DeleteLayerResponse()

        return await self._commands.run(request, pb.DeleteLayerResponse, act, pool=self._pools.storage)

    @edge.unary
    async def DeleteMemory(self, request: pb.DeleteMemoryRequest, context: edge.Context) -> pb.DeleteMemoryResponse:
        self._authorise(context)
        pool = from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.DeleteMemoryResponse:
            self._hypervisor.delete_memory(request.vm_id, request.snapshot_id, pool)
            return pb.DeleteMemoryResponse()

        return await self._commands.run(request, pb.DeleteMemoryResponse, act, pool=self._pools.storage)

    @edge.unary
    async def StartMemorySnapshot(
        self, request: pb.StartMemorySnapshotRequest, context: edge.Context
    ) -> pb.StartMemorySnapshotResponse:
        self._authorise(context)
        _require_subject(request.key, request.domain.vm_id)
        work = pb.LayerJob(memory_snapshot=request)
        return await self._start(request, pb.StartMemorySnapshotResponse, JobKind.MEMORY, work, needs_lease=True)

    @edge.unary
    async def StartMemoryRestore(
        self, request: pb.StartMemoryRestoreRequest, context: edge.Context
    ) -> pb.StartMemoryRestoreResponse:
        self._authorise(context)
        _require_subject(request.key, request.domain.vm_id)
        work = pb.LayerJob(memory_restore=request)
        return await self._start(request, pb.StartMemoryRestoreResponse, JobKind.MEMORY, work, needs_lease=True)

    @edge.unary
    async def StartMerge(self, request: pb.StartMergeRequest, context: edge.Context) -> pb.StartMergeResponse:
        self._authorise(context)
        if not request.merge.top_layer_id:
            raise InvalidRequest("layer-missing", "the bottom layer lies over nothing", field="merge.top_layer_id")
        work = pb.LayerJob(merge=request)
        return await self._start(request, pb.StartMergeResponse, JobKind.LAYERS, work, needs_keys=_secret_of(request.pool))

    @edge.unary
    async def StartVolumeCopy(self, request: pb.StartVolumeCopyRequest, context: edge.Context) -> pb.StartVolumeCopyResponse:
        self._authorise(context)
        volume = request.volume
        # Before the job begins: its own end would come too late for the key to be given.
        needed = ((volume.volume_id,) if volume.is_encrypted else ()) + _secret_of(request.pool)
        return await self._start(
            request, pb.StartVolumeCopyResponse, JobKind.LAYERS, pb.LayerJob(copy=request), needs_keys=needed
        )

    @edge.unary
    async def StartVolumeMove(self, request: pb.StartVolumeMoveRequest, context: edge.Context) -> pb.StartVolumeMoveResponse:
        self._authorise(context)
        if request.HasField("domain"):
            _require_subject(request.key, request.domain.vm_id)
        return await self._start(request, pb.StartVolumeMoveResponse, JobKind.LAYERS, pb.LayerJob(move=request))

    @edge.unary
    async def SettleVolumeMove(self, request: pb.SettleVolumeMoveRequest, context: edge.Context) -> pb.SettleVolumeMoveResponse:
        self._authorise(context)
        if request.HasField("domain"):
            _require_subject(request.key, request.domain.vm_id)
        domain = from_proto(request.domain, DomainSpec) if request.HasField("domain") else None
        move = from_proto(request.move, VolumeMove)

        def act(_key: CommandKey, stamp: Stamp) -> pb.SettleVolumeMoveResponse:
            is_moved = self._hypervisor.settle_move(move, domain, stamp, is_recorded=request.is_recorded)
            return pb.SettleVolumeMoveResponse(is_moved=is_moved)

        return await self._commands.run(request, pb.SettleVolumeMoveResponse, act, pool=self._pools.storage)

    async def _start(
        self,
        request: Message,
        response_class: type[R],
        kind: JobKind,
        work: pb.LayerJob,
        *,
        needs_lease: bool = False,
        needs_keys: Sequence[str] = (),
    ) -> R:
        def act(key: CommandKey, _stamp: Stamp) -> R:
            self._hypervisor.require_volume_keys(needs_keys)
            job: agent_service_pb2.Job = self._jobs.start(key, kind, work.SerializeToString()).result()
            response = response_class()
            response.job.CopyFrom(job)  # type: ignore[attr-defined]
            return response

        return await self._commands.run(
            request, response_class, act, pool=self._pools.query, needs_lease=needs_lease, remembers=False
        )


def _secret_of(pool: storage_pb2.PoolSpec) -> tuple[str, ...]:
    """Return under what the secret of a pool is kept that lets nobody in without one."""
    return (pool.pool_id,) if from_proto(pool, PoolSpec).kind is PoolKind.RBD else ()


def _require_subject(key: command_pb2.CommandKey, vm_id: str) -> None:
    """A verb on a domain is guarded by its vm's turn and epoch, so its key must name that vm."""
    if key.subject_id != vm_id:
        raise InvalidRequest("subject-mismatch", f"key.subject_id must be the vm, {vm_id}", field="key.subject_id")
