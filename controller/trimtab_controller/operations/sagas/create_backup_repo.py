"""backup_repo.create: a repository whose key was saved is made, or one that is there is opened.

| step   | do                                                     | undo                                     |
|--------|--------------------------------------------------------|------------------------------------------|
| own    | (the row was inserted, its key shown and confirmed)      | the row says that it failed, and why     |
| choose | a host that works on it                                  | - it only looks                          |
| open   | make it unless it is there; open it                      | - an empty repository is no harm         |
| finish | record what it is                                        | - last                                   |
"""

from dataclasses import dataclass

from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import backup_repos, events


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    repo_id: str


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the key was made."""


def _disown(context: Transaction[Params]) -> None:
    error = context.operation.error
    problem = error.message if error is not None else "it was not opened"
    backup_repos.update(context.session, context.params.repo_id, state="failed", problem=problem[:1000])


def _choose(context: Transaction[Params]) -> Json:
    repo = backup_repos.get(context.session, context.params.repo_id)
    return {"host_id": backup_steps.host_for(context.session, repo), "create": not repo.is_adopted}


def _open(context: Effect[Params]) -> Json:
    chosen = context.results["choose"]
    return backup_steps.open_on(context, str(chosen["host_id"]), context.params.repo_id, create=bool(chosen["create"]))


def _finish(context: Transaction[Params]) -> None:
    repository_id = str(context.results["open"]["repository_id"])
    backup_repos.update(context.session, context.params.repo_id, state="ready", problem="", repository_id=repository_id)
    events.append(
        context.session,
        kind="backup_repo.ready",
        project_id="",
        subject_id=context.params.repo_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"backup repository {context.operation.subject_name} is ready",
        now=context.now,
    )


SAGA = Saga(
    name="backup_repo.create",
    version=1,
    params=Params,
    result=lambda results: {"repository_id": results["open"]["repository_id"]},
    steps=(
        transaction("own", _own, _disown),
        transaction("choose", _choose, None, because="it only looks"),
        effect("open", _open, None, because="an empty repository is no harm, and one that was there stays"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
