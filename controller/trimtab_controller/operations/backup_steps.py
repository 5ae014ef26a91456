"""What the sagas of backups share: which host works on a repository, opening it there, and following a job to its end.

Commands about a repository are keyed by the operation itself: turns of other subjects say nothing about it.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from trimtab_controller.agents.client import Job
from trimtab_controller.core.model import BackupRepo
from trimtab_controller.operations.saga import Effect, Json, Stopped, Wait
from trimtab_controller.operations.vm_steps import JOB_POLL_S, progress_json
from trimtab_controller.store import backup_repos, lookup, reach, schema, snapshots
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, Internal, NotFound, Unavailable
from trimtab_protos.messages import BackupSummary, CommandKey, Direction, JobState

# A host that does not answer for so long is not waited for to end a job: what it may still list is seen by the next look at the
# repository, and is no harm.
GIVE_UP_S = 120.0
VM_NOTE = "vm"
"""The note of a manifest that holds the vm's settings."""


def host_for(session: Session, repo: BackupRepo, *, prefer: str = "") -> str:
    """Return the host that shall work on the repository. Unavailable where none that is up can."""
    up = reach.up_hosts(session)
    if repo.host_id:
        if all(host.id != repo.host_id for host in up):
            raise Unavailable(
                "repository-host-down", f"repository {repo.name} is a folder of one host, which is not up", host_id=repo.host_id
            )
        return repo.host_id
    if not up:
        raise Unavailable("no-host-up", f"no host is up to work on repository {repo.name}")
    return next((host.id for host in up if host.id == prefer), up[0].id)


def require_reach(repo: BackupRepo, host_id: str) -> None:
    """Raise Conflict where the repository is a folder of another host than this one."""
    if repo.host_id and repo.host_id != host_id:
        raise Conflict(
            "repository-not-reached",
            f"repository {repo.name} is a folder of one host and the vm is on another; use a repository that every host reaches "
            "(a bucket, or a folder on NFS)",
            host_id=host_id,
        )


def require_hooks(session: Session, host_id: str) -> None:
    """Raise Conflict where the host's agent asks no guest for its hook: it would not see what is demanded."""
    if not snapshots.is_known_to(session, host_id, "backup-hooks"):
        name = lookup.names(session, schema.host, [host_id]).get(host_id, host_id)
        raise Conflict("agent-too-old", f"the agent of host {name} makes no application-consistent backups; upgrade it first")


def require_ready(session: Session, repo_id: str) -> BackupRepo:
    """Return the repository. Conflict where it is not ready, with what to do."""
    repo = backup_repos.get(session, repo_id)
    if repo.state == "ready" and repo.deleted_at is None:
        return repo
    if repo.state == "unconfirmed":
        cure = f"nobody confirmed that its key was saved: `trimtab backup repo confirm {repo.name} --key-file FILE`"
    else:
        cure = f"it is {'deleted' if repo.deleted_at else repo.state}{f' ({repo.problem})' if repo.problem else ''}"
    raise Conflict("repository-not-ready", f"repository {repo.name} cannot be used: {cure}", state=repo.state)


def open_on(context: Effect[Any], host_id: str, repo_id: str, *, create: bool = False) -> Json:
    """Give the host access and return what the repository says of itself. Conflict where it is another one than elsewhere.

    Asked before each look at a job: an agent that was restarted has forgotten the key, which is in its memory only.
    """
    repo = context.read(lambda session: backup_repos.get(session, repo_id))
    # The repository's key may be another one by the next look: that is another command.
    part = f"open-{repo_id}-{host_id}-{repo.key_id}"
    key = context.key(subject_id=context.operation.id, part=part, direction=Direction.DO)
    opened = context.agents.open_repository(host_id, key, repo, create=create)
    if repo.repository_id and opened.repository_id != repo.repository_id:
        raise Conflict(
            "repository-differs",
            f"the host finds another repository at {repo.url} than the one that {repo.name} is; mount the same folder on every "
            "host, or name the host that has it: `trimtab backup repo create --host HOST`",
            host_id=host_id,
            found=opened.repository_id,
        )
    return {"host_id": host_id, "repository_id": opened.repository_id, "fleet_id": opened.fleet_id}


def job_key(context: Effect[Any], part: str = "") -> CommandKey:
    """The job's key is that of `do`, also when the undo asks about it."""
    return context.key(subject_id=context.operation.id, part=part, direction=Direction.DO)


def follow(job: Job, what: str, result: Callable[[Job], Json]) -> Json | Wait:
    """Return what came of the job, or wait for it; raise its error."""
    match job.state:
        case JobState.RUNNING:
            return Wait(JOB_POLL_S, what, progress=progress_json(job.progress))
        case JobState.SUCCEEDED:
            return result(job)
        case _:
            raise job.error or Internal("job-failed", f"{what} ended as {job.state.value}")


def end_job(context: Effect[Any], host_id: str, key: CommandKey) -> Job | Wait | None:
    """Cancel the job and return how it ended; None where there is none, or its host is silent for too long."""
    try:
        job = context.agents.cancel_job(host_id, key)
    except NotFound:
        return None
    except Unavailable:
        if context.waited_s < GIVE_UP_S:
            raise
        return None
    return Wait(JOB_POLL_S, "its job to end") if job.state is JobState.RUNNING else job


def end_all(context: Effect[Any], host_id: str, keys: Iterable[CommandKey]) -> Wait | None:
    """Cancel all of these jobs; a Wait while one of them still runs."""
    waiting = None
    for key in keys:
        ended = end_job(context, host_id, key)
        if isinstance(ended, Wait):
            waiting = ended
    return waiting


def cancel(context: Effect[Any], host_id: str, key: CommandKey, succeeded: Callable[[Job], Json]) -> Json | Wait | Stopped:
    """End the job for a cancel: one that succeeded before took place."""
    ended = end_job(context, host_id, key)
    if isinstance(ended, Wait):
        return ended
    return succeeded(ended) if ended is not None and ended.state is JobState.SUCCEEDED else Stopped()


def summary_json(summary: BackupSummary) -> Json:
    """Return what is journaled and kept of a manifest; the vm's settings are kept beside it."""
    notes = {name: note for name, note in summary.notes.items() if name != VM_NOTE}
    return {
        "created_ms": summary.created_ms,
        "consistency": summary.consistency,
        "base_id": summary.base_id,
        "notes": notes,
        "disks": [asdict(disk) for disk in summary.disks],
    }
