"""Another key for a repository: made, shown, and taken up only when it came back, since then somebody has saved it."""

from collections.abc import Callable
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Actor, BackupRepo, Operation
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services.backup_repos import RepoView
from trimtab_controller.store import backup_repos
from trimtab_protos.errors import Conflict, PermissionDenied


def show_next(session: Session, name: str, *, key_id: str, seal: Callable[[str], str]) -> RepoView:
    """Keep the next key, which the caller shows. Conflict while an earlier one is being taken up; one that never came back is replaced.

    `seal` returns the key as it may lie in the row of this id.
    """
    repo = repo_service.find(session, name)
    backup_steps.require_ready(session, repo.id)
    if repo.is_next_key_saved:
        raise Conflict(
            "key-rotation-running",
            f"repository {repo.name} is being locked with the key {repo.next_key_id}: "
            "`trimtab op list --filter kind=backup_repo.rotate_key`",
            key_id=repo.next_key_id,
        )
    backup_repos.update(session, repo.id, wrapped_next_key=seal(repo.id), next_key_id=key_id)
    return _view(session, repo)


def confirm_next(session: Session, name: str, *, key_id: str, actor: Actor, now: datetime) -> tuple[RepoView, Operation]:
    """Accept that the repository is locked with the key that was shown. PermissionDenied where another one comes back."""
    repo = repo_service.find(session, name)
    backup_steps.require_ready(session, repo.id)
    if key_id != repo.next_key_id:
        raise PermissionDenied(
            "repository-key-wrong",
            f"key: this is the key {key_id}, {repo.next_key_id or 'none'} was shown last; give back the one that "
            "`backup repo rotate-key` showed",
            field="key",
        )
    if repo.is_next_key_saved:
        raise Conflict("key-rotation-running", f"repository {repo.name} is being locked with the key {key_id} already")
    backup_repos.update(session, repo.id, is_next_key_saved=True)
    operation = accept(
        session,
        "backup_repo.rotate_key",
        subject_id=repo.id,
        subject_name=repo.name,
        project_id="",
        params={"repo_id": repo.id},
        actor=actor,
        now=now,
    )
    return _view(session, repo), operation


def _view(session: Session, repo: BackupRepo) -> RepoView:
    return repo_service.views(session, (backup_repos.get(session, repo.id),))[0]
