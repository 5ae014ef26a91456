"""backup.verify: every record that a backup needs is read and checked against its id (level 1).

| step   | do                                         | undo                |
|--------|--------------------------------------------|---------------------|
| choose | a host that works on the repository         | - it only looks     |
| read   | the agent's job                             | cancel the job      |
| finish | record level and age, or what is damaged    | - last              |

A damaged record is noted in the repository: the next backup does not rely on it and stores its content anew.
"""

from dataclasses import dataclass

from trimtab_controller.agents.client import Job
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, events, vms
from trimtab_protos.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    backup_id: str
    repo_id: str


def _choose(context: Transaction[Params]) -> Json:
    session = context.session
    backup = backups.get(session, context.params.backup_id)
    repo = backup_steps.require_ready(session, context.params.repo_id)
    try:
        home = vms.get(session, backup.vm_id).host_id
    except NotFound:
        home = ""
    return {"host_id": backup_steps.host_for(session, repo, prefer=home), "vm_id": backup.vm_id}


def _read(context: Effect[Params]) -> Json | Wait:
    chosen, params = context.results["choose"], context.params
    host_id = str(chosen["host_id"])
    backup_steps.open_on(context, host_id, params.repo_id)
    job = context.agents.start_verify(
        host_id,
        backup_steps.job_key(context),
        repo_id=params.repo_id,
        vm_id=str(chosen["vm_id"]),
        backup_id=params.backup_id,
    )
    return backup_steps.follow(job, "the verification", _verified)


def _verified(job: Job) -> Json:
    assert job.verify is not None
    parts = [part for one in job.verify.damaged for part in one.parts]
    return {"read_bytes": job.verify.read_bytes, "damaged_records": job.verify.damaged_records, "damaged_parts": parts}


def _cancel_read(context: Effect[Params]) -> Json | Wait | Stopped:
    return backup_steps.cancel(context, str(context.results["choose"]["host_id"]), backup_steps.job_key(context), _verified)


def _unread(context: Effect[Params]) -> Wait | None:
    chosen = context.results.get("choose")
    if chosen is None:
        return None
    ended = backup_steps.end_job(context, str(chosen["host_id"]), backup_steps.job_key(context))
    return ended if isinstance(ended, Wait) else None


def _finish(context: Transaction[Params]) -> None:
    session, read = context.session, context.results["read"]
    backup = backups.get(session, context.params.backup_id)
    parts = ", ".join(read["damaged_parts"])
    if parts:
        problem = f"{read['damaged_records']} records are damaged: {parts} cannot be restored whole"
        backups.update(session, backup.id, state="damaged", problem=problem[:1000], verified_at=context.now)
    else:
        level = max(1, backup.level)
        backups.update(session, backup.id, state="ready", problem="", level=level, verified_at=context.now)
    events.append(
        session,
        kind="backup.damaged" if parts else "backup.verified",
        project_id=backup.project_id,
        subject_id=backup.vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"backup {backup.id} of vm {backup.vm_name} {'is damaged: ' + parts if parts else 'was read whole'}",
        now=context.now,
    )


SAGA = Saga(
    name="backup.verify",
    version=1,
    params=Params,
    result=lambda results: {
        "read_bytes": results["read"]["read_bytes"],
        "damaged_records": results["read"]["damaged_records"],
        "damaged_parts": results["read"]["damaged_parts"],
    },
    steps=(
        transaction("choose", _choose, None, because="it only looks"),
        effect("read", _read, _unread, cancel=_cancel_read),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
