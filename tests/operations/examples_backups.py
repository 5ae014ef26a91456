"""One valid operation of every kind that concerns backups. See `examples.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.operations.backup_kit import (
    accept_backup,
    accept_recovery,
    accept_repo,
    accept_restore,
    accept_rotation,
    accept_together,
    backup_of,
    content_of,
    made_backup,
    ready_repo,
    repo_spec,
    write_to,
)
from tests.operations.example import Example, name_of
from tests.operations.examples_storage import volume_is_gone, volume_is_there
from tests.operations.examples_vms import not_created
from tests.operations.kit import FleetStory
from trimtab_controller import repository_keys
from trimtab_controller.clock import mint
from trimtab_controller.core.model import Backup, Operation
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backup_export, backup_restore, lost_disks
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backups as backup_service
from trimtab_controller.store import (
    backup_instants,
    backup_repos,
    backups,
    claims,
    failover,
    hosts,
    recovery_plans,
    schema,
    vms,
    volumes,
)
from trimtab_controller.store.database import Session

Check = Callable[[FleetStory, Operation], None]


def _backed_up(story: FleetStory) -> Backup:
    """Return a backup of a vm of its own, with something on its disk."""
    ready_repo(story)
    vm = story.running_vm(name_of("db"))
    write_to(story, vm.id, 0, vm.id.encode())
    return made_backup(story, vm)


def _kept_backup(story: FleetStory, name: str = "") -> Backup:
    """Return a backup that the fleet's examples share: for those that only read it."""
    kept: Backup = story.shelf.get(f"backup {name}") or _backed_up(story)
    story.shelf[f"backup {name}"] = kept
    return kept


def creates_repo(story: FleetStory) -> Operation:
    return accept_repo(story, repo_spec(story, name_of("repo")))


def repo_is(state: str) -> Check:
    def check(story: FleetStory, operation: Operation) -> None:
        repo = story.db.read(lambda session: backup_repos.get(session, operation.subject_id))
        assert repo.state == state
        assert bool(repo.problem) == (state == "failed")

    return check


def runs(story: FleetStory) -> Operation:
    ready_repo(story)
    return accept_backup(story, story.running_vm(name_of("db")))


def runs_of_stopped(story: FleetStory) -> Operation:
    ready_repo(story)
    vm = story.running_vm(name_of("db"))
    story.accept_power(vm, "stop", force=True)
    story.settle()
    return accept_backup(story, story.vm(vm.id))


def backup_is(state: str) -> Check:
    def check(story: FleetStory, operation: Operation) -> None:
        backup = backup_of(story, operation)
        assert backup.state == state
        assert bool(backup.problem) == (state == "failed")
        assert bool(backup.manifest) == (state == "ready")

    return check


def verifies(story: FleetStory) -> Operation:
    backup = _backed_up(story)
    return story.db.write(lambda session: backup_service.accept_verify(session, backup, actor=story.actor, now=story.clock.now()))


def replicates(story: FleetStory) -> Operation:
    backup = _backed_up(story)
    second = ready_repo(story, "second")

    def work(session: Session) -> Operation:
        repo = backup_repos.get(session, backup.repo_id)
        return repo_service.replicate(
            session, repo.name, second.name, bandwidth_mib_s=0, actor=story.actor, now=story.clock.now()
        )

    return story.db.write(work)


def rotates_key(story: FleetStory) -> Operation:
    """A repository of its own with a backup in it; its next key was shown and came back."""
    repo = ready_repo(story, name_of("repo"))
    made_backup(story, story.running_vm(name_of("db")), repo=repo.name)
    return accept_rotation(story, repo.name)[0]


def recovers(story: FleetStory) -> Operation:
    """A plan of two groups whose vms are backed up, and gone."""
    names = [_kept_backup(story, group).vm_name for group in ("first", "second")]
    for name in names:
        vm = story.db.read(lambda session, name=name: vms.find(session, story.project.id, name))  # type: ignore[misc]
        if vm is not None:
            story.accept_power(vm, "delete")
    story.settle()
    return accept_recovery(story, [[name] for name in names], mode="real")


def all_is_back(story: FleetStory, operation: Operation) -> None:
    plan = story.db.read(lambda session: recovery_plans.get(session, operation.subject_id))
    for group in plan.groups:
        (name,) = group["vms"]
        vm = story.db.read(lambda session, name=name: vms.find(session, story.project.id, name))
        assert vm is not None
        assert story.running_on(vm.id) == {vm.host_id}
    assert plan.last_run["state"] == "done"


def has_stopped(story: FleetStory, operation: Operation) -> None:
    """Nothing of it is under way any more; what was back by then stays."""
    plan = story.db.read(lambda session: recovery_plans.get(session, operation.subject_id))
    ids = [one["operation_id"] for group in plan.last_run.get("groups", ()) for one in group["vms"] if one["operation_id"]]
    assert all(story.operation(one).ended_at is not None for one in ids)
    assert plan.last_run.get("state", "cancelled") in {"cancelled", "done"}


def brings_back(story: FleetStory) -> Operation:
    """A vm with its disks on one host, which is proven off; its last backup is on a repository that others reach."""
    ready_repo(story)
    _all_return(story)
    vm = story.running_vm(name_of("db"), pool=story.local, ha="restart")
    write_to(story, vm.id, 0, vm.id.encode())
    backup = made_backup(story, vm)
    story.hypervisor(vm.host_id).crash_guest(vm.id)

    def work(session: Session) -> Operation:
        session.execute(schema.host.update().where(schema.host.c.id == vm.host_id).values(connectivity="fenced"))
        proof = {"state": "fenced", "proof": "power_off", "fenced_at": story.clock.now()}
        failover.write_record(session, vm.host_id, failover_id=mint("fo"), now=story.clock.now(), **proof)
        return lost_disks.bring_back(session, vms.get(session, vm.id), backup, actor=story.actor, now=story.clock.now())

    return story.db.write(work)


def _all_return(story: FleetStory) -> None:
    """Hosts that earlier examples lost are back, without what moved away from them."""
    for host_id in story.host_ids:
        if story.db.read(lambda session, of=host_id: hosts.get(session, of)).connectivity.value != "fenced":  # type: ignore[misc]
            continue
        for vm_id in [one for one in story.hypervisor(host_id).domains if story.vm(one).host_id != host_id]:
            story.hypervisor(host_id).undefine_domain(vm_id, (), kill_if_running=True, keep_state_files=False)
        story.db.write(lambda session, of=host_id: _hear_again(session, of, story))  # type: ignore[misc]


def _hear_again(session: Session, host_id: str, story: FleetStory) -> None:
    session.execute(schema.host.update().where(schema.host.c.id == host_id).values(connectivity="up"))
    failover.write_record(session, host_id, failover_id="", now=story.clock.now(), state="returned")


def runs_elsewhere(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert vm.host_id != operation.params["host_id"]
    assert story.running_on(vm.id) == {vm.host_id}
    assert content_of(story, vm.id).startswith(vm.id.encode())
    _come_back(story, operation)


def is_still_lost(story: FleetStory, operation: Operation) -> None:
    vm = story.vm(operation.subject_id)
    assert (vm.host_id, vm.epoch) == (operation.params["host_id"], operation.params["epoch"])
    assert {one.id for one in story.volumes(vm.id)} == set(operation.params["replaced"].values())
    _come_back(story, operation)


def _come_back(story: FleetStory, operation: Operation) -> None:
    """The lost host is back without its guest, and what it left behind was put away, so that the next example has all hosts."""
    host_id, vm = str(operation.params["host_id"]), story.vm(operation.subject_id)

    story.db.write(lambda session: _hear_again(session, host_id, story))
    if vm.host_id != host_id:
        story.hypervisor(host_id).undefine_domain(vm.id, (), kill_if_running=True, keep_state_files=False)
    else:
        # Its owner leaves it off.
        story.db.write(lambda session: _leave_off(session, vm.id))
        story.hear_hosts()


def _leave_off(session: Session, vm_id: str) -> None:
    vms.update(session, vm_id, desired_power="stopped", ha="none")
    claims.give_back(session, vm_id)


def backs_up_together(story: FleetStory) -> Operation:
    """Two vms; their hosts are the scheduler's choice."""
    ready_repo(story)
    return accept_together(story, [story.running_vm(name_of("db")), story.running_vm(name_of("web"))])


def is_one_instant(story: FleetStory, operation: Operation) -> None:
    instant = story.db.read(lambda session: backup_instants.get(session, operation.subject_id))
    # A host that died or answered too late makes it broken, and it says so; never is it shown as more than it is. It may be shown as less:
    # guests whose host's answer was lost may have been held in time all the same, which nobody has seen.
    found = [story.db.read(lambda session, one=one: backups.get(session, one["backup_id"])) for one in instant.members]
    states = [one.manifest.get("notes", {}).get("instant_state") for one in found]
    assert instant.state == "broken" or states == ["released"] * len(found), instant.problem
    assert (instant.state, bool(instant.problem)) in {("consistent", False), ("broken", True)}


def is_broken(story: FleetStory, operation: Operation) -> None:
    instant = story.db.read(lambda session: backup_instants.get(session, operation.subject_id))
    assert (instant.state, bool(instant.problem)) == ("broken", True)


def has_the_next_key(story: FleetStory, operation: Operation) -> None:
    repo = story.db.read(lambda session: backup_repos.get(session, operation.subject_id))
    assert (repo.wrapped_next_key, repo.next_key_id, repo.is_next_key_saved) == ("", "", False)
    assert repo.key_changed_at is not None
    key = repository_keys.key_id(story.secrets.open(repo.wrapped_key, place=repo.id))
    folder = Path(repo.url.removeprefix("file://"))
    keyrings = [json.loads(path.read_bytes()) for path in sorted((folder / "keys").iterdir())]
    assert [(one["generation"], one["key_id"]) for one in keyrings] == [(2, key), (2, key)]
    assert repo.key_id == key


def is_in_both(story: FleetStory, operation: Operation) -> None:
    first, _ = story.client.list_backups(story.host_ids[0], operation.subject_id)
    second, _ = story.client.list_backups(story.host_ids[0], str(operation.params["to_repo_id"]))
    assert {one.backup_id for one in first} <= {one.backup_id for one in second}


def exports(story: FleetStory) -> Operation:
    backup = _kept_backup(story)
    return story.db.write(
        lambda session: backup_export.export(session, backup.id, project=story.project, actor=story.actor, now=story.clock.now())
    )


def is_handed_out(story: FleetStory, operation: Operation) -> None:
    backup_id = operation.subject_id
    host_id, place = story.db.read(lambda session: backup_export.place_of(session, backup_id, "", project=story.project))
    size_bytes = story.client.read_backup(host_id, place, "qcow2", 0, 512).size_bytes
    head = story.client.read_backup(host_id, place, "qcow2", 0, 1 << 20)
    assert head.content.startswith(b"QFI")
    assert head.size_bytes == size_bytes
    raw = story.client.read_backup(host_id, place, "raw", 0, 1 << 20)
    assert raw.content.startswith(place.vm_id.encode())


def level_is(level: int) -> Check:
    def check(story: FleetStory, operation: Operation) -> None:
        backup = backup_of(story, operation)
        assert (backup.state, backup.level, backup.verified_at is not None) == ("ready", level, level > 0)

    return check


def boots(story: FleetStory) -> Operation:
    backup = _backed_up(story)
    return story.db.write(
        lambda session: backup_restore.boot_test(
            session, backup, project=story.project, pattern="", timeout_s=60, actor=story.actor, now=story.clock.now()
        )
    )


def has_booted(story: FleetStory, operation: Operation) -> None:
    backup = backup_of(story, operation)
    assert (backup.level, backup.booted_at is not None, backup.problem) == (3, True, "")
    assert story.running_on(operation.subject_id) == frozenset()
    assert story.vm(operation.subject_id).deleted_at is not None, "nothing is left of the vm that was booted"


def deletes(story: FleetStory) -> Operation:
    backup = _backed_up(story)
    operation = story.db.write(
        lambda session: backup_service.delete(session, backup.id, project=story.project, actor=story.actor, now=story.clock.now())
    )
    assert operation is not None
    return operation


def is_forgotten(story: FleetStory, operation: Operation) -> None:
    ((_vm_id, backup_id),) = operation.params["forget"]
    assert story.db.read(lambda session: backups.get(session, backup_id)).deleted_at is not None
    host_id = story.host_ids[0]
    listed, unreadable = story.client.list_backups(host_id, operation.subject_id)
    assert backup_id not in {one.backup_id for one in listed}
    assert unreadable == ()


def rebuilds(story: FleetStory) -> Operation:
    """The rows are lost; the repository is not."""
    backup = _backed_up(story)

    def work(session: object) -> Operation:
        backups.hide(session, [backup.id], now=story.clock.now())  # type: ignore[arg-type]
        repo = backup_repos.get(session, backup.repo_id)  # type: ignore[arg-type]
        return repo_service.rebuild(session, repo.name, actor=story.actor, now=story.clock.now())  # type: ignore[arg-type]

    return story.db.write(work)


def is_listed_again(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: backups.of_repo(session, operation.subject_id))
    assert operation.result is not None
    assert len([one for one in found if one.state == "ready"]) == operation.result["listed"]
    assert all(one.manifest["settings"]["vm"] for one in found)


def restores(story: FleetStory) -> Operation:
    return accept_restore(story, _kept_backup(story), name_of("again"))


def restores_stopped(story: FleetStory) -> Operation:
    return accept_restore(story, _kept_backup(story), name_of("again"), start=False, pools={"shared": "local"})


def restores_instantly(story: FleetStory) -> Operation:
    return accept_restore(story, _kept_backup(story), name_of("again"), is_instant=True)


def fills(story: FleetStory) -> Operation:
    """A vm that runs on a backup."""
    backup = _backed_up(story)
    vm = story.vm(backup.vm_id)

    def work(session: Session) -> Operation:
        volumes.set_filling(session, story.volumes(vm.id)[0].id, backup_id=backup.id, disk="vda")
        params = {"vm_id": vm.id, "ha": "restart"}
        return accept(
            session,
            "vm.fill",
            subject_id=vm.id,
            subject_name=vm.name,
            project_id=vm.project_id,
            params=params,
            actor=story.actor,
            now=story.clock.now(),
        )

    return story.db.write(work)


def stands_alone(story: FleetStory, operation: Operation) -> None:
    (volume,) = story.volumes(operation.subject_id)
    assert (volume.fill_backup_id, volume.fill_disk) == ("", "")
    vm = story.vm(operation.subject_id)
    source: Any = story.agents.agent(vm.host_id).parts.backups
    assert volume.id not in source.instants.served
    assert vm.ha == operation.params["ha"]


def is_restored(story: FleetStory, operation: Operation) -> None:
    backup = story.db.read(lambda session: backups.get(session, str(operation.params["backup_id"])))
    assert content_of(story, operation.subject_id).startswith(backup.vm_id.encode())
    vm = story.vm(operation.subject_id)
    assert story.running_on(vm.id) == ({vm.host_id} if operation.params["start"] else frozenset())


def replaces(story: FleetStory) -> Operation:
    """The vm went on after its backup; what it wrote since is to go."""
    backup = _backed_up(story)
    write_to(story, backup.vm_id, 0, b"what nobody wants to keep any more")
    story.accept_power(story.vm(backup.vm_id), "stop", force=True)
    story.settle()
    return story.db.write(
        lambda session: backup_restore.replace(
            session,
            backup.id,
            vms.get(session, backup.vm_id),
            project=story.project,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def is_as_it_was(story: FleetStory, operation: Operation) -> None:
    (volume,) = story.volumes(operation.subject_id)
    assert content_of(story, operation.subject_id).startswith(operation.subject_id.encode())
    assert volume.id in operation.params["replaced"]
    vm = story.vm(operation.subject_id)
    (disk,) = story.hypervisor(vm.host_id).domains[vm.id].spec.disks
    assert (disk.volume_id, volume.name) == (volume.id, f"{vm.name}-root")


def kept_its_disk(story: FleetStory, operation: Operation) -> None:
    (volume,) = story.volumes(operation.subject_id)
    assert volume.id in operation.params["replaced"].values()
    assert content_of(story, operation.subject_id).startswith(b"what nobody wants")


def restores_volume(story: FleetStory) -> Operation:
    backup = _kept_backup(story)
    return story.db.write(
        lambda session: backup_restore.restore_volume(
            session, backup.id, "vda", name_of("disk"), "local", project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def volume_holds_it(story: FleetStory, operation: Operation) -> None:
    backup = story.db.read(lambda session: backups.get(session, str(operation.params["backup_id"])))
    assert bytes(story.fleet.disk_contents[operation.subject_id]).startswith(backup.vm_id.encode())
    volume_is_there(story, operation)


EXAMPLES: dict[str, Example] = {
    "backup_repo.create": Example(
        kind="backup_repo.create",
        arrange=creates_repo,
        done=repo_is("ready"),
        undone=repo_is("failed"),
    ),
    "backup_repo.rebuild": Example(kind="backup_repo.rebuild", arrange=rebuilds, done=is_listed_again),
    "backup.run": Example(
        kind="backup.run",
        arrange=runs,
        done=backup_is("ready"),
        undone=backup_is("failed"),
        takes_place=frozenset({"copy"}),
    ),
    "backup.run of a stopped vm": Example(
        kind="backup.run",
        arrange=runs_of_stopped,
        done=backup_is("ready"),
        undone=backup_is("failed"),
        takes_place=frozenset({"copy"}),
    ),
    "backup.verify": Example(kind="backup.verify", arrange=verifies, done=level_is(1), undone=level_is(0)),
    "backup_repo.replicate": Example(kind="backup_repo.replicate", arrange=replicates, done=is_in_both),
    "backup_repo.rotate_key": Example(kind="backup_repo.rotate_key", arrange=rotates_key, done=has_the_next_key),
    "vm.bring_back": Example(kind="vm.bring_back", arrange=brings_back, done=runs_elsewhere, undone=is_still_lost),
    "recovery.run": Example(kind="recovery.run", arrange=recovers, done=all_is_back, undone=has_stopped),
    "backup.together": Example(
        kind="backup.together", arrange=backs_up_together, done=is_one_instant, undone=is_broken, takes_place=frozenset({"take"})
    ),
    "backup.export": Example(kind="backup.export", arrange=exports, done=is_handed_out),
    "backup.boot": Example(kind="backup.boot", arrange=boots, done=has_booted, undone=not_created),
    "backup.prune": Example(kind="backup.prune", arrange=deletes, done=is_forgotten),
    "volume.restore": Example(kind="volume.restore", arrange=restores_volume, done=volume_holds_it, undone=volume_is_gone),
    "vm.replace": Example(kind="vm.replace", arrange=replaces, done=is_as_it_was, undone=kept_its_disk),
    "vm.restore": Example(kind="vm.restore", arrange=restores, done=is_restored, undone=not_created),
    "vm.restore at once": Example(kind="vm.restore", arrange=restores_instantly, done=is_restored, undone=not_created),
    "vm.fill": Example(kind="vm.fill", arrange=fills, done=stands_alone),
    "vm.restore to another pool, not started": Example(
        kind="vm.restore", arrange=restores_stopped, done=is_restored, undone=not_created
    ),
}
