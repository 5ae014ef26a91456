"""backup_repo.rebuild: the rows of a repository's backups are made anew from what it lists, by the repository and its key alone.

| step   | do                                                              | undo                     |
|--------|-----------------------------------------------------------------|--------------------------|
| choose | a host that works on the repository                               | - it only looks          |
| list   | read every manifest                                               | - it only looks          |
| record | add what has no row, hide rows of what is not listed any more     | - the repository is right |

A backup of a project that this fleet does not have goes to the project that the repository is of, else to the oldest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_controller.core.model import BackupRepo
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.backup_rows import values_of
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import backup_repos, backups, events, identity
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    repo_id: str


def _choose(context: Transaction[Params]) -> Json:
    repo = backup_steps.require_ready(context.session, context.params.repo_id)
    return {"host_id": backup_steps.host_for(context.session, repo)}


def _list(context: Effect[Params]) -> Json:
    host_id = str(context.results["choose"]["host_id"])
    backup_steps.open_on(context, host_id, context.params.repo_id)
    found, unreadable = context.agents.list_backups(host_id, context.params.repo_id)
    listed = [
        {
            "backup_id": one.backup_id,
            "vm_id": one.vm_id,
            "vm_name": one.vm_name,
            "project_id": one.project_id,
            "settings": one.notes.get(backup_steps.VM_NOTE, ""),
            **backup_steps.summary_json(one),
        }
        for one in found
    ]
    return {"listed": listed, "unreadable": list(unreadable)}


def _record(context: Transaction[Params]) -> Json:
    session, repo = context.session, backup_repos.get(context.session, context.params.repo_id)
    listed = context.results["list"]["listed"]
    known = {one.id: one for one in backups.of_repo(session, repo.id)}
    added = 0
    for one in listed:
        if one["backup_id"] in known and known[one["backup_id"]].state in backups.LISTED:
            continue
        _put(session, repo, one, is_known=backups.exists(session, one["backup_id"]), context=context)
        added += 1
    present = {one["backup_id"] for one in listed}
    gone = [one.id for one in known.values() if one.state in backups.LISTED and one.id not in present]
    backups.hide(session, gone, now=context.now)
    events.append(
        session,
        kind="backup_repo.rebuilt",
        project_id="",
        subject_id=repo.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"repository {repo.name} lists {len(present)} backups: {added} were added, {len(gone)} are gone",
        now=context.now,
    )
    return {"added": added, "removed": len(gone), "listed": len(present)}


def _put(session: Session, repo: BackupRepo, one: Mapping[str, Any], *, is_known: bool, context: Transaction[Params]) -> None:
    settings = json.loads(one["settings"]) if one["settings"] else {}
    values = values_of(one, settings)
    if is_known:
        backups.update(session, one["backup_id"], deleted_at=None, repo_id=repo.id, **values)
        return
    project_id = _project_of(session, repo, str(one["project_id"]), str(settings.get("project", "")))
    backups.insert(
        session,
        id=one["backup_id"],
        project_id=project_id,
        repo_id=repo.id,
        vm_id=one["vm_id"],
        vm_name=one["vm_name"],
        created_at=context.now,
        **values,
    )


def _project_of(session: Session, repo: BackupRepo, project_id: str, project_name: str) -> str:
    for wanted in (project_id, project_name, repo.project_id):
        found = identity.find_project(session, wanted) if wanted else None
        if found is not None:
            return found.id
    first = identity.first_project(session)
    if first is None:
        raise Conflict("project-missing", "there is no project to put the backups into; make one with `trimtab project create`")
    return first.id


SAGA = Saga(
    name="backup_repo.rebuild",
    version=1,
    params=Params,
    result=lambda results: {**results["record"], "unreadable": results["list"]["unreadable"]},
    steps=(
        transaction("choose", _choose, None, because="it only looks"),
        effect("list", _list, None, because="it only looks"),
        transaction("record", _record, None, because="the repository is right, whatever the rows said"),
    ),
)
