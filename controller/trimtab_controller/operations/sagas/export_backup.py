"""backup.export: a host is made ready to hand out a backup's disks as files; whoever asked then reads them through the API.

| step   | do                                                    | undo            |
|--------|-------------------------------------------------------|-----------------|
| choose | a host that works on the repository                    | - it only looks |
| open   | give it access and see that the repository is the one   | - in memory only |
| finish | say so on record                                       | - last          |

An operation, so that it is on record who took a copy of a guest's disks out of the fleet. The key goes to the host alone.
"""

from dataclasses import dataclass

from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import backups, events


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    backup_id: str
    repo_id: str


def _choose(context: Transaction[Params]) -> Json:
    repo = backup_steps.require_ready(context.session, context.params.repo_id)
    backups.get(context.session, context.params.backup_id)
    return {"host_id": backup_steps.host_for(context.session, repo)}


def _open(context: Effect[Params]) -> Json:
    return backup_steps.open_on(context, str(context.results["choose"]["host_id"]), context.params.repo_id)


def _finish(context: Transaction[Params]) -> None:
    backup = backups.get(context.session, context.params.backup_id)
    events.append(
        context.session,
        kind="backup.exported",
        project_id=backup.project_id,
        subject_id=backup.vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"the disks of backup {backup.id} of vm {backup.vm_name} may be read out",
        now=context.now,
    )


SAGA = Saga(
    name="backup.export",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: {"host_id": results["choose"]["host_id"]},
    steps=(
        transaction("choose", _choose, None, because="it only looks"),
        effect("open", _open, None, because="access is in the host's memory only"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
