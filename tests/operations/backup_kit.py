"""A repository in a folder that every simulated host reaches, and what tests do with it."""

import uuid
from collections.abc import Sequence
from typing import Any

from tests.operations.kit import FleetStory
from trimtab_controller import repository_keys
from trimtab_controller.clock import mint
from trimtab_controller.core.model import Backup, BackupRepo, Operation, Vm
from trimtab_controller.core.recovery_plans import Group, Mode
from trimtab_controller.services import backup_instants, backup_keys, backup_policies, backup_restore, recovery_plans
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backups as backup_service
from trimtab_controller.services.backup_instants import InstantSpec
from trimtab_controller.services.backup_policies import PolicySpec
from trimtab_controller.services.backup_repos import RepoSpec
from trimtab_controller.services.backup_restore import RestoreSpec
from trimtab_controller.services.backups import RunSpec
from trimtab_controller.store import backup_repos, backups, vms


def repo_spec(story: FleetStory, name: str, *, url: str = "", key: str = "", repo_id: str = "", **fields: Any) -> RepoSpec:
    repo_id = repo_id or mint("repo")
    text = key or repository_keys.new_key()
    given: dict[str, Any] = {"fleet_id": story.secrets.fleet_id, "is_adopted": bool(key), **fields}
    return RepoSpec(
        repo_id=repo_id,
        name=name,
        url=url or f"file://{story.directory}/{name}-{uuid.uuid4().hex[:8]}",
        wrapped_key=story.secrets.seal(text, place=repo_id),
        key_id=repository_keys.key_id(text),
        **given,
    )


def accept_repo(story: FleetStory, spec: RepoSpec) -> Operation:
    """Insert the repository and confirm its key, as after it was saved."""

    def work(session: Any) -> Operation:
        view, opening = repo_service.create(session, spec, actor=story.actor, now=story.clock.now())
        if opening is not None:
            return opening
        return repo_service.confirm(session, view.repo.name, key_id=spec.key_id, actor=story.actor, now=story.clock.now())[1]

    return story.db.write(work)


def ready_repo(story: FleetStory, name: str = "main", **fields: Any) -> BackupRepo:
    """Return a repository that is ready, made where there is none of this name."""
    found = story.db.read(lambda session: backup_repos.find(session, name))
    if found is None:
        accept_repo(story, repo_spec(story, name, **fields))
        story.settle()
        found = story.db.read(lambda session: backup_repos.find(session, name))
    assert found is not None
    assert found.state == "ready", found.problem
    return found


def accept_rotation(story: FleetStory, name: str) -> tuple[Operation, str]:
    """Have the repository's next key shown and give it back; return the operation and the key."""
    key = repository_keys.new_key()
    key_id = repository_keys.key_id(key)

    def work(session: Any) -> Operation:
        backup_keys.show_next(session, name, key_id=key_id, seal=lambda repo_id: story.secrets.seal(key, place=repo_id))
        return backup_keys.confirm_next(session, name, key_id=key_id, actor=story.actor, now=story.clock.now())[1]

    return story.db.write(work), key


def accept_together(story: FleetStory, members: Sequence[Vm], **wishes: Any) -> Operation:
    """Accept a backup of these vms at one instant."""
    spec = InstantSpec(name="together", vms=[vm.name for vm in members], repo="main", **wishes)
    return story.db.write(
        lambda session: backup_instants.create(session, spec, project=story.project, actor=story.actor, now=story.clock.now())[1]
    )


def accept_recovery(
    story: FleetStory, groups: Sequence[Sequence[str]], *, mode: str, repo: str = "main", **wishes: Any
) -> Operation:
    """Write a recovery plan of these groups down and accept a run of it."""

    def work(session: Any) -> Operation:
        name = f"plan-{uuid.uuid4().hex[:8]}"
        wanted = [Group(name=f"group{i}", vms=list(vms), **wishes) for i, vms in enumerate(groups)]
        spec = recovery_plans.PlanSpec(name=name, groups=wanted, repo=repo)
        recovery_plans.create(session, spec, project=story.project, now=story.clock.now())
        return recovery_plans.run(session, name, mode=Mode(mode), project=story.project, actor=story.actor, now=story.clock.now())

    return story.db.write(work)


def accept_backup(story: FleetStory, vm: Vm, *, repo: str = "main", **wishes: Any) -> Operation:
    def work(session: Any) -> Operation:
        present, spec = vms.get(session, vm.id), RunSpec(repo=repo, **wishes)
        _view, operation = backup_service.run(
            session, present, spec, project_id=present.project_id, actor=story.actor, now=story.clock.now()
        )
        return operation

    return story.db.write(work)


def made_backup(story: FleetStory, vm: Vm, **wishes: Any) -> Backup:
    """Return a backup that was made now."""
    operation = accept_backup(story, vm, **wishes)
    story.settle()
    ended = story.operation(operation.id)
    assert ended.state.value == "done", ended.error
    return backup_of(story, operation)


def backup_of(story: FleetStory, operation: Operation) -> Backup:
    return story.db.read(lambda session: backups.get(session, str(operation.params["backup_id"])))


def accept_restore(story: FleetStory, backup: Backup, name: str, **wishes: Any) -> Operation:
    spec = RestoreSpec(name=name, **wishes)
    _view, operation = story.db.write(
        lambda session: backup_restore.restore(
            session, backup.id, spec, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )
    return operation


def content_of(story: FleetStory, vm_id: str) -> bytes:
    """Return what is on the vm's first disk."""
    return bytes(story.fleet.disk_contents[story.volumes(vm_id)[0].id])


def write_to(story: FleetStory, vm_id: str, offset: int, content: bytes) -> None:
    """Let the guest write to its first disk; checkpoints see it."""
    vm = story.vm(vm_id)
    source: Any = story.agents.agent(vm.host_id).parts.backups
    source.look_at(vm_id).disks["vda"].write(offset, content)


def give_policy(story: FleetStory, vm: Vm, **wishes: Any) -> None:
    def work(session: Any) -> None:
        spec = PolicySpec(name="nightly", schedule="0 2 * * *", repo="main", **wishes)
        backup_policies.create(session, spec, project=story.project, now=story.clock.now())
        vms.update(session, vm.id, **backup_policies.values_for(session, vm, "nightly", now=story.clock.now()))

    story.db.write(work)
