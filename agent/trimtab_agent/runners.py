"""What the two kinds of job do: the request as it was journaled, turned into one blocking call of the hypervisor."""

from collections.abc import Mapping

from trimtab_agent.hypervisor.base import Hypervisor, JobControl, Stamp
from trimtab_agent.job_rows import JobResult
from trimtab_agent.jobs import JobKind, Runner
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import (
    DomainSpec,
    HostFileSource,
    ImageSource,
    ImageSpec,
    MigrationOptions,
    PeerSource,
    PoolSpec,
    UploadSource,
    UrlSource,
    VolumeSource,
)


def job_runners(hypervisor: Hypervisor) -> Mapping[JobKind, Runner]:
    def import_image(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:  # noqa: ARG001 an image has no metadata
        asked = pb.StartImageImportRequest.FromString(request)
        image, pool = from_proto(asked.image, ImageSpec), from_proto(asked.pool, PoolSpec)
        return hypervisor.import_image(image, pool, source_of(asked), control)

    def migrate(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:
        asked = pb.StartMigrationRequest.FromString(request)
        return hypervisor.migrate(
            asked.vm_id,
            from_proto(asked.target_domain, DomainSpec),
            Stamp(epoch=asked.next_epoch, turn=stamp.turn),
            libvirt_uri=asked.libvirt_uri,
            migration_uri=asked.migration_uri,
            copied_volume_ids=tuple(asked.copied_disk_volume_ids),
            options=from_proto(asked.options, MigrationOptions),
            control=control,
        )

    return {JobKind.IMPORT: import_image, JobKind.MIGRATION: migrate}


def source_of(request: pb.StartImageImportRequest) -> ImageSource:
    match request.WhichOneof("source"):
        case "upload":
            return from_proto(request.upload, UploadSource)
        case "url":
            return from_proto(request.url, UrlSource)
        case "host_file":
            return from_proto(request.host_file, HostFileSource)
        case "peer":
            return from_proto(request.peer, PeerSource)
        case "volume":
            return from_proto(request.volume, VolumeSource)
        case _:
            raise InvalidRequest("source-missing", "the import names no source", field="source")
