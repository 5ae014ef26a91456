"""A long piece of work as an agent tells it."""

from dataclasses import dataclass

from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2
from trimtab_protos.backup_messages import PruneResult
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import (
    BackupSummary,
    ImageResult,
    JobProgress,
    JobState,
    LayerResult,
    MigrationResult,
    RestoreResult,
    VerifyResult,
)
from trimtab_protos.status import from_detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A long piece of work as the agent tells it."""

    state: JobState
    progress: JobProgress
    error: TrimtabError | None = None
    image: ImageResult | None = None
    migration: MigrationResult | None = None
    backup: BackupSummary | None = None
    restore: RestoreResult | None = None
    verify: VerifyResult | None = None
    prune: PruneResult | None = None
    layers: LayerResult | None = None


def job_of(job: pb.Job) -> Job:
    result = job.WhichOneof("result")
    return Job(
        state=JobState[command_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")],
        progress=from_proto(job.progress, JobProgress),
        error=from_detail(job.error) if job.HasField("error") else None,
        image=from_proto(job.image, ImageResult) if result == "image" else None,
        migration=from_proto(job.migration, MigrationResult) if result == "migration" else None,
        backup=from_proto(job.backup, BackupSummary) if result == "backup" else None,
        restore=from_proto(job.restore, RestoreResult) if result == "restore" else None,
        verify=from_proto(job.verify, VerifyResult) if result == "verify" else None,
        layers=from_proto(job.layers, LayerResult) if result == "layers" else None,
        prune=from_proto(job.prune, PruneResult) if result == "prune" else None,
    )
