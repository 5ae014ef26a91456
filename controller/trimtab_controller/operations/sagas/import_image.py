"""image.import: bytes from an upload, a URL or a host's import folder become an image that was proven harmless.

| step    | do                                                       | undo                                |
|---------|----------------------------------------------------------|-------------------------------------|
| own     | (the row was inserted at acceptance)                      | mark it failed, free the name        |
| choose  | a host that reaches the pool; note where the file will be | - the undo of `own` forgets the note |
| import  | the agent's job: fetch, check (S1-S6), convert, hash      | cancel the job, delete the replica   |
| finish  | record sizes, hashes and the replica                      | - last                               |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_controller.agents.client import Job
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, image_replicas, reach
from trimtab_protos.errors import Internal, NotFound, Unavailable
from trimtab_protos.messages import (
    CommandKey,
    Direction,
    HostFileSource,
    ImageSource,
    ImageSpec,
    JobState,
    UploadSource,
    UrlSource,
    VolumeSource,
)

# Of the source and of the virtual size: a few kilobytes of qcow2 can claim exabytes.
MAX_BYTES = 64 << 30
POLL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    image_id: str
    pool_id: str
    # {volume_id, layer_id, host_id?}, {upload_id, size_bytes} or {url, sha256, allowed_networks?} or {host_id, file_name}
    source: Mapping[str, Any]


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted, so that the name was taken at once."""


def forget(context: Transaction[Any]) -> None:
    reach.fail_image(context.session, context.params.image_id, now=context.now)
    image_replicas.remove(context.session, context.params.image_id)


def choose(context: Transaction[Any]) -> Json:
    pool = describe.get_pool(context.session, context.params.pool_id)
    reaching = reach.ready_hosts if pool.is_shared else reach.hosts_by_space
    named = context.params.source.get("host_id")
    chosen = next((host.id for host in reaching(context.session, pool.id) if named in {None, host.id}), "")
    if not chosen:
        raise Unavailable("pool-unreachable", f"no host that is up reaches pool {pool.name}; see `trimtab pool get {pool.name}`")
    place = "" if pool.is_shared else chosen
    image_replicas.begin_at(
        context.session,
        image_id=context.params.image_id,
        pool_id=pool.id,
        host_id=place,
        operation_id=context.operation.id,
        now=context.now,
    )
    return {"host_id": chosen, "place": place}


def bring(context: Effect[Any]) -> Json | Wait:
    image = context.read(lambda session: describe.get_image(session, context.params.image_id))
    pool = context.read(lambda session: describe.get_pool(session, context.params.pool_id))
    spec = ImageSpec(
        image_id=image.id,
        pool_id=pool.id,
        format=image.format,
        source_sha256=str(context.params.source.get("sha256", "")),
        max_bytes=MAX_BYTES,
    )
    host_id = str(context.results["choose"]["host_id"])
    job = context.agents.start_image_import(
        host_id, _job_key(context), spec, describe.pool_spec(pool), _source(context.params.source)
    )
    return _follow(job)


def _follow(job: Job) -> Json | Wait:
    match job.state:
        case JobState.RUNNING:
            return Wait(POLL_S, "the import", progress=vm_steps.progress_json(job.progress))
        case JobState.SUCCEEDED if job.image is not None:
            return {
                "virtual_size_bytes": job.image.virtual_size_bytes,
                "file_size_bytes": job.image.file_size_bytes,
                "source_sha256": job.image.source_sha256,
                "stored_sha256": job.image.stored_sha256,
            }
        case _:
            raise job.error or Internal("import-failed", f"the import ended as {job.state.value}")


def cancel_bringing(context: Effect[Any]) -> Json | Wait | Stopped:
    """An import that finished before the cancel reached it has taken place."""
    job = _cancel_job(context)
    if job is None or job.state in {JobState.CANCELLED, JobState.FAILED}:
        return Stopped()
    return _follow(job)


def unbring(context: Effect[Any]) -> Json | Wait:
    chosen = context.results.get("choose")
    if chosen is None:
        return {}
    job = _cancel_job(context)
    if job is not None and job.state is JobState.RUNNING:
        return Wait(POLL_S, "the import to be cancelled")
    image = context.read(lambda session: describe.get_image(session, context.params.image_id))
    pool = context.read(lambda session: describe.get_pool(session, context.params.pool_id))
    key = context.key(subject_id=image.id, part="delete")
    context.agents.delete_image(str(chosen["host_id"]), key, image.id, describe.stored_format(image), describe.pool_spec(pool))
    return {}


def _job_key(context: Effect[Any]) -> CommandKey:
    """The job's key is that of `do`, also when the undo asks about it."""
    return context.key(subject_id=context.params.image_id, direction=Direction.DO)


def _cancel_job(context: Effect[Any]) -> Job | None:
    try:
        return context.agents.cancel_job(str(context.results["choose"]["host_id"]), _job_key(context))
    except NotFound:
        return None


def _source(source: Mapping[str, Any]) -> ImageSource:
    if "upload_id" in source:
        return UploadSource(upload_id=source["upload_id"], size_bytes=source["size_bytes"])
    if "url" in source:
        return UrlSource(url=source["url"], allowed_networks=tuple(source.get("allowed_networks", ())))
    if "volume_id" in source:
        return VolumeSource(volume_id=source["volume_id"], layer_id=source["layer_id"])
    return HostFileSource(file_name=source["file_name"])


def record(context: Transaction[Any]) -> None:
    params = context.params
    reach.finish_image(context.session, params.image_id, **context.results["import"])
    image_replicas.add(
        context.session,
        image_id=params.image_id,
        pool_id=params.pool_id,
        host_id=str(context.results["choose"]["place"]),
        now=context.now,
    )


SAGA = Saga(
    name="image.import",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["choose"]["host_id"], **results["import"]},
    steps=(
        transaction("own", _own, forget),
        transaction("choose", choose, None, because="the undo of `own` forgets the note"),
        effect("import", bring, unbring, cancel=cancel_bringing),
        transaction("finish", record, None, because="nothing follows it"),
    ),
)
