"""backup_repo.rotate_key: a repository is locked with another key, which was shown and came back before.

| step   | do                                                              | undo                                             |
|--------|-----------------------------------------------------------------|--------------------------------------------------|
| own    | (the new key was sealed into the row, shown and confirmed)        | - it goes only forward: the new key may count     |
| choose | a host that works on the repository                               | - it only looks                                  |
| rotate | lock it with the new key, add a data key; or find that it was done | - the old key opens nothing any more             |
| finish | the new key takes the old one's place in the row                   | - last                                           |

A crash anywhere leaves a row with both keys, and a repository that one of them opens: whoever opens it meanwhile tries both.
"""

from dataclasses import asdict, dataclass

from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import backup_repos, events
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    repo_id: str


def _own(_context: Transaction[Params]) -> None:
    """The key was sealed into the row when it was shown, and confirmed when this was accepted."""


def _choose(context: Transaction[Params]) -> Json:
    repo = backup_repos.get(context.session, context.params.repo_id)
    return {"host_id": backup_steps.host_for(context.session, repo), "repository_id": repo.repository_id}


def _rotate(context: Effect[Params]) -> Json:
    chosen, repo_id = context.results["choose"], context.params.repo_id
    host_id = str(chosen["host_id"])
    # Opened first: a folder that is not mounted on this host, or another repository, is found before a key is changed.
    backup_steps.open_on(context, host_id, repo_id)
    repo = context.read(lambda session: backup_repos.get(session, repo_id))
    key = context.key(subject_id=context.operation.id, part=f"rotate-{host_id}", direction=Direction.DO)
    rotated = context.agents.rotate_key(host_id, key, repo)
    if rotated.repository_id != chosen["repository_id"]:
        raise Conflict("repository-differs", f"the host finds another repository at {repo.url}", found=rotated.repository_id)
    return asdict(rotated)


def _finish(context: Transaction[Params]) -> None:
    repo = backup_repos.get(context.session, context.params.repo_id)
    backup_repos.update(
        context.session,
        repo.id,
        wrapped_key=repo.wrapped_next_key,
        key_id=repo.next_key_id,
        wrapped_next_key="",
        next_key_id="",
        is_next_key_saved=False,
        key_changed_at=context.now,
    )
    events.append(
        context.session,
        kind="backup_repo.key_rotated",
        project_id="",
        subject_id=repo.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"backup repository {repo.name} is locked with the key {repo.next_key_id}; {repo.key_id} opens it no longer",
        now=context.now,
    )


SAGA = Saga(
    name="backup_repo.rotate_key",
    version=1,
    params=Params,
    is_forward_only=lambda _params: True,
    result=lambda results: {name: results["rotate"][name] for name in ("generation", "data_key_version")},
    steps=(
        transaction("own", _own, None, because="the new key may count already", pivot=True),
        transaction("choose", _choose, None, because="it only looks"),
        effect("rotate", _rotate, None, because="the old key opens nothing any more"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
