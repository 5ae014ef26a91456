"""backup_repo.replicate: what a second repository does not list yet is copied into it, under its own keys.

| step   | do                                                     | undo                                     |
|--------|--------------------------------------------------------|------------------------------------------|
| choose | a host that works on both                                | - it only looks                          |
| copy   | the agent's job: backup by backup, each manifest last     | cancel the job; what is listed is whole   |
| finish | record how much                                          | - last                                   |
"""

from dataclasses import dataclass

from trimtab_controller.agents.client import Job
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backup_repos, events


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    repo_id: str
    to_repo_id: str
    bandwidth_mib_s: int = 0


def _choose(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    source, target = backup_steps.require_ready(session, params.repo_id), backup_steps.require_ready(session, params.to_repo_id)
    host_id = backup_steps.host_for(session, source, prefer=target.host_id)
    backup_steps.require_reach(target, host_id)
    return {"host_id": host_id}


def _copy(context: Effect[Params]) -> Json | Wait:
    host_id, params = str(context.results["choose"]["host_id"]), context.params
    for repo_id in (params.repo_id, params.to_repo_id):
        backup_steps.open_on(context, host_id, repo_id)
    job = context.agents.start_replication(
        host_id,
        backup_steps.job_key(context),
        repo_id=params.repo_id,
        to_repo_id=params.to_repo_id,
        bandwidth_mib_s=params.bandwidth_mib_s,
    )
    return backup_steps.follow(job, "the copy", _copied)


def _copied(job: Job) -> Json:
    return {"read_bytes": job.restore.written_bytes if job.restore is not None else 0}


def _cancel_copy(context: Effect[Params]) -> Json | Wait | Stopped:
    return backup_steps.cancel(context, str(context.results["choose"]["host_id"]), backup_steps.job_key(context), _copied)


def _uncopy(context: Effect[Params]) -> Wait | None:
    chosen = context.results.get("choose")
    if chosen is None:
        return None
    ended = backup_steps.end_job(context, str(chosen["host_id"]), backup_steps.job_key(context))
    return ended if isinstance(ended, Wait) else None


def _finish(context: Transaction[Params]) -> None:
    source = backup_repos.get(context.session, context.params.repo_id)
    target = backup_repos.get(context.session, context.params.to_repo_id)
    events.append(
        context.session,
        kind="backup_repo.replicated",
        project_id="",
        subject_id=target.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"repository {target.name} has what {source.name} lists: {context.results['copy']['read_bytes']} bytes were read",
        now=context.now,
    )


SAGA = Saga(
    name="backup_repo.replicate",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: {"read_bytes": results["copy"]["read_bytes"]},
    steps=(
        transaction("choose", _choose, None, because="it only looks"),
        effect("copy", _copy, _uncopy, cancel=_cancel_copy),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
