"""backup.prune: backups leave the repository's list, and what no listed backup needs leaves its storage, in two phases.

| step   | do                                                          | undo                                            |
|--------|-------------------------------------------------------------|-------------------------------------------------|
| own    | (what is forgotten was hidden at acceptance)                  | - it goes only forward: what is hidden is to go |
| choose | a host that works on the repository                           | - it only looks                                 |
| prune  | the agent's job: forget, condemn, remove what was condemned   | - what is gone is gone                          |
| finish | record what is kept                                           | - last                                          |

What is condemned now is removed by a later prune, when every writer that may rely on it has ended (docs/backup-format.md).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trimtab_controller.agents.client import Job
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import backup_repos


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    repo_id: str
    # [vm id, backup id] of each backup that is taken off the list.
    forget: Sequence[Sequence[str]] = ()
    is_dry_run: bool = False


def _own(_context: Transaction[Params]) -> None:
    """What is forgotten was hidden when the request was accepted."""


def _choose(context: Transaction[Params]) -> Json:
    repo = backup_repos.get(context.session, context.params.repo_id)
    return {"host_id": backup_steps.host_for(context.session, repo)}


def _prune(context: Effect[Params]) -> Json | Wait:
    params, host_id = context.params, str(context.results["choose"]["host_id"])
    backup_steps.open_on(context, host_id, params.repo_id)
    job = context.agents.start_prune(
        host_id,
        backup_steps.job_key(context),
        repo_id=params.repo_id,
        forget=[(vm_id, backup_id) for vm_id, backup_id in params.forget],
        is_dry_run=params.is_dry_run,
    )
    return backup_steps.follow(job, "the prune", _pruned)


def _pruned(job: Job) -> Json:
    assert job.prune is not None
    lists = {"waits_for": list(job.prune.waits_for), "retired_data_keys": list(job.prune.retired_data_keys)}
    return {**asdict(job.prune), **lists}


def _finish(context: Transaction[Params]) -> None:
    pruned = context.results["prune"]
    if not context.params.is_dry_run:
        backup_repos.update(context.session, context.params.repo_id, kept_bytes=int(pruned["kept_bytes"]), pruned_at=context.now)


SAGA = Saga(
    name="backup.prune",
    version=1,
    params=Params,
    # Backups of one repository are forgotten one after the other or at once: the repository has one pruner by itself.
    is_exclusive=False,
    is_forward_only=lambda _params: True,
    result=lambda results: results["prune"],
    steps=(
        transaction("own", _own, None, because="what is hidden is to go", pivot=True),
        transaction("choose", _choose, None, because="it only looks"),
        effect("prune", _prune, None, because="what is gone is gone"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
