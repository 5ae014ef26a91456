"""InstantService: guests that run on a backup while their disks are filled from it, and disks of backups read as files."""

from collections.abc import Callable

from trimtab_agent import edge
from trimtab_agent.backup.access import Repositories
from trimtab_agent.backup.export.exports import BackupFiles, Exported, Exports
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.source import NVRAM, BackupSource
from trimtab_agent.commands import Commands
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.job_rows import JobResult
from trimtab_agent.jobs import JobKind, Jobs, Runner
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2
from trimtab_protos.agent.v1 import instant_service_pb2 as pb
from trimtab_protos.agent.v1.instant_service_pb2_grpc import InstantServiceServicer
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import CommandKey, DomainSpec, PoolSpec, RestoreResult, VolumeSpec

PIECE_MAX_BYTES = 1 << 20


def fill_runner(exports: Exports, source: BackupSource) -> Runner:
    def fill(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:
        asked = pb.StartFillRequest.FromString(request)
        volume = from_proto(asked.volume, VolumeSpec)
        source.instants.serve(volume.volume_id, exported_of(asked.disk), exports)
        written = source.instants.fill(
            from_proto(asked.domain, DomainSpec),
            volume,
            from_proto(asked.pool, PoolSpec),
            stamp,
            bandwidth_bytes_s=asked.bandwidth_mib_s << 20,
            control=control,
        )
        return RestoreResult(written_bytes=written, root="")

    return fill


def exported_of(disk: pb.BackupDiskRef) -> Exported:
    return Exported(repository=disk.repository, vm_id=disk.vm_id, backup_id=disk.backup_id, disk=disk.disk)


class InstantServicer(InstantServiceServicer):
    """The verbs of one host."""

    def __init__(
        self,
        repositories: Repositories,
        source: BackupSource,
        exports: Exports,
        files: BackupFiles,
        *,
        commands: Commands,
        jobs: Jobs,
        pool: WorkerPool,
        query: WorkerPool,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._repositories = repositories
        self._source = source
        self._exports = exports
        self._files = files
        self._commands = commands
        self._jobs = jobs
        self._pool = pool
        self._query = query
        self._authorise = authorise

    @edge.unary
    async def ServeBackup(self, request: pb.ServeBackupRequest, context: edge.Context) -> pb.ServeBackupResponse:
        self._authorise(context)
        volume, pool = from_proto(request.volume, VolumeSpec), from_proto(request.pool, PoolSpec)

        def act(_key: CommandKey, _stamp: Stamp) -> pb.ServeBackupResponse:
            exported = exported_of(request.disk)
            self._source.instants.serve(volume.volume_id, exported, self._exports)
            if request.makes_volume:
                self._lay_over(volume, pool, exported, state_for_vm_id=request.state_for_vm_id)
            return pb.ServeBackupResponse()

        # Acted on at each repeat: what serves it may have ended since.
        return await self._commands.run(request, pb.ServeBackupResponse, act, pool=self._pool, remembers=False)

    def _lay_over(self, volume: VolumeSpec, pool: PoolSpec, exported: Exported, *, state_for_vm_id: str) -> None:
        repository = self._repositories.open(exported.repository)
        try:
            with open_backup(repository, exported.vm_id, exported.backup_id) as reader:
                self._source.instants.lay_over(volume, pool, exported, reader.disk(exported.disk))
                if state_for_vm_id and any(file.name == NVRAM for file in reader.manifest.attachments):
                    self._source.restore_nvram(state_for_vm_id, pool, reader.attachment(NVRAM))
        finally:
            repository.close()

    @edge.unary
    async def StartFill(self, request: pb.StartFillRequest, context: edge.Context) -> pb.StartFillResponse:
        self._authorise(context)

        def act(key: CommandKey, _stamp: Stamp) -> pb.StartFillResponse:
            job: agent_service_pb2.Job = self._jobs.start(key, JobKind.FILL, request.SerializeToString()).result()
            return pb.StartFillResponse(job=job)

        return await self._commands.run(request, pb.StartFillResponse, act, pool=self._query, remembers=False)

    @edge.unary
    async def ReadBackup(self, request: pb.ReadBackupRequest, context: edge.Context) -> pb.ReadBackupResponse:
        self._authorise(context)
        if request.format not in {"raw", "qcow2"} or request.offset < 0 or not 0 < request.length <= PIECE_MAX_BYTES:
            raise InvalidRequest(
                "piece-malformed", f"a piece is of raw or qcow2, and at most {PIECE_MAX_BYTES} bytes", field="length"
            )

        def read() -> pb.ReadBackupResponse:
            content, zeros, size_bytes = self._files.read(
                exported_of(request.disk), request.format, request.offset, request.length
            )
            return pb.ReadBackupResponse(content=content, zeros=zeros, size_bytes=size_bytes)

        return await edge.in_pool(self._pool, read)
