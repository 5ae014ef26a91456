"""BackupService: turns messages into jobs and answers what a repository lists. What a job does is in `jobs`."""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from trimtab_agent import edge
from trimtab_agent.backup.access import Access, Repositories
from trimtab_agent.backup.holding import Holds
from trimtab_agent.backup.jobs import prune_request, replication_request, summary_of, verify_request
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.jobs import JobKind, Jobs
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2, backup_pb2
from trimtab_protos.agent.v1 import backup_service_pb2 as pb
from trimtab_protos.agent.v1.backup_service_pb2_grpc import BackupServiceServicer
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey, PoolSpec, VolumeSpec

R = TypeVar("R", bound=Message)
AWAIT_MAX_MS = 20_000


class BackupServicer(BackupServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        repositories: Repositories,
        holds: Holds,
        *,
        commands: Commands,
        jobs: Jobs,
        pool: WorkerPool,
        query: WorkerPool,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        """`pool` runs what waits for storage, `query` what only starts jobs."""
        self._repositories = repositories
        self._holds = holds
        self._commands = commands
        self._jobs = jobs
        self._pool = pool
        self._query = query
        self._authorise = authorise

    @edge.unary
    async def OpenRepository(self, request: pb.OpenRepositoryRequest, context: edge.Context) -> pb.OpenRepositoryResponse:
        self._authorise(context)
        access = _access_of(request.access)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.OpenRepositoryResponse:
            config = self._repositories.grant(request.name, access, create=request.create)
            return pb.OpenRepositoryResponse(
                repository_id=config.repository_id,
                fleet_id=config.fleet_id,
                project_id=config.project_id,
                created_ms=config.created_ms,
            )

        # Acted on at each repeat: an access does not outlive the agent, and nothing of it may get into the journal.
        return await self._commands.run(request, pb.OpenRepositoryResponse, act, pool=self._pool, remembers=False)

    @edge.unary
    async def RotateKey(self, request: pb.RotateKeyRequest, context: edge.Context) -> pb.RotateKeyResponse:
        self._authorise(context)
        access = _access_of(request.access)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.RotateKeyResponse:
            config, rotated = self._repositories.rotate(request.name, access, request.new_key)
            return pb.RotateKeyResponse(
                generation=rotated.generation,
                data_key_version=rotated.data_key_version,
                repository_id=config.repository_id,
            )

        # As OpenRepository: no key may get into the journal, and a repeat finds what was done in the repository itself.
        return await self._commands.run(request, pb.RotateKeyResponse, act, pool=self._pool, remembers=False)

    @edge.unary
    async def ListBackups(self, request: pb.ListBackupsRequest, context: edge.Context) -> pb.ListBackupsResponse:
        self._authorise(context)

        def read() -> pb.ListBackupsResponse:
            repository = self._repositories.open(request.repository)
            try:
                listing = repository.list_backups(request.vm_id)
            finally:
                repository.close()
            summaries = [to_proto(summary_of(manifest), backup_pb2.BackupSummary) for manifest in listing.manifests]
            return pb.ListBackupsResponse(backups=summaries, unreadable_manifests=list(listing.unreadable))

        return await edge.in_pool(self._pool, read)

    @edge.unary
    async def StartBackup(self, request: pb.StartBackupRequest, context: edge.Context) -> pb.StartBackupResponse:
        self._authorise(context)
        if not request.disks:
            raise InvalidRequest("disks-missing", "the backup names no disk", field="disks")
        kind = JobKind.TOGETHER if request.instant_id else JobKind.BACKUP
        return await self._start(request, pb.StartBackupResponse, kind, request.SerializeToString())

    @edge.unary
    async def AwaitInstant(self, request: pb.AwaitInstantRequest, context: edge.Context) -> pb.AwaitInstantResponse:
        self._authorise(context)
        timeout_s = min(max(request.timeout_ms, 0), AWAIT_MAX_MS) / 1000

        def wait() -> pb.AwaitInstantResponse:
            found = self._holds.wait_for(request.instant_id, request.vm_id, timeout_s=timeout_s)
            return pb.AwaitInstantResponse(state=found.state.value, taken_ms=found.taken_ms, held_ms=found.held_ms)

        return await edge.in_pool(self._pool, wait)

    @edge.unary
    async def ReleaseInstant(self, request: pb.ReleaseInstantRequest, context: edge.Context) -> pb.ReleaseInstantResponse:
        self._authorise(context)
        found = self._holds.release(request.instant_id, request.vm_id)
        return pb.ReleaseInstantResponse(state=found.state.value, taken_ms=found.taken_ms, held_ms=found.held_ms)

    @edge.unary
    async def StartRestore(self, request: pb.StartRestoreRequest, context: edge.Context) -> pb.StartRestoreResponse:
        self._authorise(context)
        volume = from_proto(request.volume, VolumeSpec)
        from_proto(request.pool, PoolSpec)
        if volume.base_image_id or volume.copy_image_id:
            raise InvalidRequest("volume-not-empty", "a restored volume has no base and no copied image", field="volume")
        return await self._start(request, pb.StartRestoreResponse, JobKind.RESTORE, request.SerializeToString())

    @edge.unary
    async def StartVerify(self, request: pb.StartVerifyRequest, context: edge.Context) -> pb.StartVerifyResponse:
        self._authorise(context)
        return await self._start(request, pb.StartVerifyResponse, JobKind.UPKEEP, verify_request(request))

    @edge.unary
    async def StartPrune(self, request: pb.StartPruneRequest, context: edge.Context) -> pb.StartPruneResponse:
        self._authorise(context)
        return await self._start(request, pb.StartPruneResponse, JobKind.UPKEEP, prune_request(request))

    @edge.unary
    async def StartReplication(self, request: pb.StartReplicationRequest, context: edge.Context) -> pb.StartReplicationResponse:
        self._authorise(context)
        return await self._start(request, pb.StartReplicationResponse, JobKind.UPKEEP, replication_request(request))

    async def _start(self, request: Message, response_class: type[R], kind: JobKind, journaled: bytes) -> R:
        def act(key: CommandKey, _stamp: Stamp) -> R:
            job: agent_service_pb2.Job = self._jobs.start(key, kind, journaled).result()
            response = response_class()
            response.job.CopyFrom(job)  # type: ignore[attr-defined]
            return response

        return await self._commands.run(request, response_class, act, pool=self._query, remembers=False)


def _access_of(asked: pb.RepositoryAccess) -> Access:
    if not asked.fleet_id:
        raise InvalidRequest("fleet-missing", "access.fleet_id is empty", field="access.fleet_id")
    return Access(
        url=asked.url,
        key=asked.key,
        fleet_id=asked.fleet_id,
        project_id=asked.project_id,
        endpoint=asked.endpoint,
        region=asked.region,
        access_key_id=asked.access_key_id,
        secret_access_key=asked.secret_access_key,
        allow_http=asked.allow_http,
    )
