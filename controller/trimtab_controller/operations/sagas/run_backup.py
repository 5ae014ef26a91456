"""backup.run: an instant of a vm's disks goes into a repository, beside whatever the table of `core.background` lets run with it.

| step   | do                                                              | undo                                       |
|--------|-----------------------------------------------------------------|--------------------------------------------|
| own    | (the row was inserted at acceptance)                              | the row says that it failed, and why       |
| find   | where the vm is, its disks and settings                           | - it only looks                            |
| copy   | the agent's job: instant, dirty extents, manifest last (pivot)    | cancel the job; listed already, it stays so |
| finish | record what the manifest says                                     | - last                                     |

A backup exists once its manifest is in the repository, and not before: whatever dies on the way leaves chunks that prune removes.
"""

import json
from dataclasses import dataclass
from typing import Any

from trimtab_controller.agents.backups import BackupOrder, DiskWish
from trimtab_controller.agents.client import Job
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.backup_rows import values_of
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, TookPlace, Transaction, Wait, effect, transaction
from trimtab_controller.store import backup_settings, backups, describe, events, vms
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    backup_id: str
    vm_id: str
    repo_id: str
    needs_filesystem: bool = False
    wants_freeze: bool = True
    bandwidth_mib_s: int = 0
    # What is accepted once it is listed: none, read, boot.
    verify: str = "none"


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
    return {"host_id": parts.vm.host_id, "settings": backup_settings.read(session, params.vm_id)}


def _order(context: Effect[Params]) -> BackupOrder:
    params, settings = context.params, context.results["find"]["settings"]
    parts = context.read(lambda session: describe.read_vm(session, params.vm_id))
    generations = {volume.id: volume.generation for volume in parts.volumes}
    return BackupOrder(
        repo_id=params.repo_id,
        backup_id=params.backup_id,
        vm_id=params.vm_id,
        vm_name=str(settings["vm"]["name"]),
        project_id=context.operation.project_id,
        disks=tuple(
            DiskWish(name=one["disk"], volume_id=one["id"], generation=generations.get(one["id"], 0))
            for one in settings["volumes"]
        ),
        notes={backup_steps.VM_NOTE: json.dumps(settings, sort_keys=True)},
        wants_freeze=params.wants_freeze,
        needs_filesystem=params.needs_filesystem,
        bandwidth_mib_s=params.bandwidth_mib_s,
    )


def _copy(context: Effect[Params]) -> Json | Wait:
    host_id = str(context.results["find"]["host_id"])
    try:
        backup_steps.open_on(context, host_id, context.params.repo_id)
        job = context.agents.start_backup(host_id, backup_steps.job_key(context), _order(context))
        return backup_steps.follow(job, "the copy", _copied)
    except TrimtabError as error:
        _refuse_gone(context, error)
        raise


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
    return backup_steps.cancel(context, str(context.results["find"]["host_id"]), backup_steps.job_key(context), _copied)


def _uncopy(context: Effect[Params]) -> Wait | TookPlace | None:
    found = context.results.get("find")
    if found is None:
        return None
    ended = backup_steps.end_job(context, str(found["host_id"]), backup_steps.job_key(context))
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
