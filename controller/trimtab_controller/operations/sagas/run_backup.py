"""backup.run: an instant of a vm's disks goes into a repository, beside whatever the table of `core.background` lets run with it.

| step   | do                                                              | undo                                       |
|--------|-----------------------------------------------------------------|--------------------------------------------|
| own    | (the row was inserted at acceptance)                              | the row says that it failed, and why       |
| find   | where the vm is, its disks and settings                           | - it only looks                            |
| copy   | the agent's job: instant, dirty extents, manifest last (pivot)    | cancel the job; listed already, it stays so |
| finish | record what the manifest says                                     | - last                                     |

A backup exists once its manifest is in the repository, and not before: whatever dies on the way leaves chunks that prune removes.
"""

from dataclasses import dataclass, replace
from typing import Any

from trimtab_controller.agents.backups import BackupOrder
from trimtab_controller.agents.client import Job
from trimtab_controller.operations import backup_orders, backup_steps, encrypted
from trimtab_controller.operations.backup_rows import values_of
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.operations.vm_steps import JOB_POLL_S
from trimtab_controller.store import backup_settings, backups, describe, events, operations, vms
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import CommandKey, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    backup_id: str
    vm_id: str
    repo_id: str
    needs_filesystem: bool = False
    needs_application: bool = False
    wants_freeze: bool = True
    bandwidth_mib_s: int = 0
    # What is accepted once it is listed: none, read, boot.
    verify: str = "none"
    # Of a vm that is backed up at one instant with others: the operation that begins its job with theirs.
    together_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    error = context.operation.error
    problem = error.message if error is not None else "it was not finished"
    backups.update(context.session, context.params.backup_id, state="failed", problem=problem[:1000])


def _find(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    parts = describe.read_vm(session, params.vm_id)
    _refuse_deleted(parts.vm.deleted_at is not None, parts.vm.name)
    if not parts.vm.host_id:
        raise Conflict("vm-not-placed", f"vm {parts.vm.name} is on no host, so there is nobody to read its disks")
    repo = backup_steps.require_ready(session, params.repo_id)
    backup_steps.require_reach(repo, parts.vm.host_id)
    if params.needs_application:
        backup_steps.require_hooks(session, parts.vm.host_id)
    scratch = encrypted.scratch_pool_id(session, params.vm_id)
    settings = backup_settings.read(session, params.vm_id, repo_id=params.repo_id)
    return {"host_id": parts.vm.host_id, "settings": settings, "scratch_pool_id": scratch}


def _order(context: Effect[Params]) -> BackupOrder:
    params = context.params
    return backup_orders.order_of(
        context.read,
        context.results["find"]["settings"],
        repo_id=params.repo_id,
        backup_id=params.backup_id,
        vm_id=params.vm_id,
        scratch_pool_id=context.results["find"].get("scratch_pool_id", ""),
        project_id=context.operation.project_id,
        wants_freeze=params.wants_freeze,
        needs_filesystem=params.needs_filesystem,
        needs_application=params.needs_application,
        bandwidth_mib_s=params.bandwidth_mib_s,
    )


def _job_key(context: Effect[Params]) -> CommandKey:
    """The job is this operation's own, or the one that the group's operation began."""
    params = context.params
    own = backup_steps.job_key(context)
    return replace(own, operation_id=params.together_id, step=f"take/{params.vm_id}") if params.together_id else own


def _copy(context: Effect[Params]) -> Json | Wait:
    host_id = str(context.results["find"]["host_id"])
    try:
        backup_steps.open_on(context, host_id, context.params.repo_id)
        if context.params.together_id:
            return _with_the_others(context, host_id)
        job = context.agents.start_backup(host_id, _job_key(context), _order(context))
        return backup_steps.follow(job, "the copy", _copied)
    except TrimtabError as error:
        _refuse_gone(context, error)
        raise


def _with_the_others(context: Effect[Params], host_id: str) -> Json | Wait:
    """Follow the job that the group's operation began. It is never begun anew: that would be another instant."""
    together = context.read(lambda session: operations.get(session, context.params.together_id))
    try:
        job = context.agents.get_job(host_id, _job_key(context))
    except NotFound:
        if together.ended_at is None and together.step not in {"finish", "gather"}:
            return Wait(JOB_POLL_S, "the others of its group")
        cause = f": {together.error.message}" if together.error is not None else ""
        raise Conflict("group-not-taken", f"the group was not backed up at one instant ({together.id}){cause}") from None
    if job.state is JobState.FAILED and job.error is not None and job.error.retryable:
        raise Conflict(job.error.code, f"{job.error.message}; back the group up again") from job.error
    return backup_steps.follow(job, "the copy", _copied)


def _refuse_gone(context: Effect[Params], error: TrimtabError) -> None:
    """A vm that was deleted or moved meanwhile is told as that, not as whatever broke off."""
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    _refuse_deleted(vm.deleted_at is not None or vm.desired_power.value == "deleted", vm.name, cause=error)
    if isinstance(error, NotFound) and error.code == "domain-not-found" and vm.host_id != context.results["find"]["host_id"]:
        raise Conflict("vm-moved-during-backup", f"vm {vm.name} left its host during its backup; back it up again") from error


def _refuse_deleted(is_deleted: bool, name: str, *, cause: TrimtabError | None = None) -> None:
    if is_deleted:
        raise Conflict(
            "vm-deleted-during-backup", f"vm {name} was deleted during its backup; earlier backups of it are untouched"
        ) from cause


def _copied(job: Job) -> Json:
    assert job.backup is not None
    return backup_steps.summary_json(job.backup)


def _cancel_copy(context: Effect[Params]) -> Json | Wait | Stopped:
    return backup_steps.cancel(context, str(context.results["find"]["host_id"]), _job_key(context), _copied)


def _uncopy(context: Effect[Params]) -> Wait | TookPlace | None:
    found = context.results.get("find")
    if found is None:
        return None
    ended = backup_steps.end_job(context, str(found["host_id"]), _job_key(context))
    if isinstance(ended, Wait):
        return ended
    return TookPlace(_copied(ended)) if ended is not None and ended.state is JobState.SUCCEEDED else None


def _finish(context: Transaction[Params]) -> None:
    params, copied = context.params, context.results["copy"]
    values: dict[str, Any] = values_of(copied, context.results["find"]["settings"])
    backups.update(context.session, params.backup_id, **values)
    events.append(
        context.session,
        kind="backup.made",
        project_id=context.operation.project_id,
        subject_id=params.vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"backup {params.backup_id} of vm {context.operation.subject_name}: {values['consistency']}-consistent, "
        f"{values['read_bytes']} bytes read, {values['stored_bytes']} stored",
        now=context.now,
    )


SAGA = Saga(
    name="backup.run",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: {"host_id": results["find"]["host_id"], "base_id": results["copy"]["base_id"]},
    steps=(
        transaction("own", _own, _disown),
        transaction("find", _find, None, because="it only looks"),
        effect("copy", _copy, _uncopy, cancel=_cancel_copy, pivot=True),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
