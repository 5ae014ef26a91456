"""What is counted and passed on: a dry run of prune, the bandwidth of a backup, the figures that tell who is not protected."""

import random
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from tests.operations.backup_kit import accept_backup, made_backup, ready_repo, write_to
from tests.operations.kit import FleetStory
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.repository import open_repository
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Backup, BackupRepo, Operation, Vm
from trimtab_controller.loops.backups import BackupLoop
from trimtab_controller.services import backup_policies, backup_restore, doctor
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backups as backup_service
from trimtab_controller.services.backup_policies import PolicySpec
from trimtab_controller.store import backup_repos, backups, vms
from trimtab_protos.agent.v1 import backup_service_pb2 as pb

CHUNK = 256 * 1024


def folder_of(repo: BackupRepo) -> Path:
    return Path(repo.url.removeprefix("file://"))


def files_of(repo: BackupRepo) -> dict[str, bytes]:
    """Return all that is in the repository but the leases, which come and go."""
    found = {str(path.relative_to(folder_of(repo))): path for path in folder_of(repo).rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name.partition("/")[0] in {"packs", "index", "backups", "condemned"}
    }


def prune(story: FleetStory, repo: BackupRepo, *, is_dry_run: bool) -> Any:
    operation: Operation = story.db.write(
        lambda session: repo_service.prune(session, repo.name, is_dry_run=is_dry_run, actor=story.actor, now=story.clock.now())
    )
    story.settle()
    ended = story.operation(operation.id)
    assert ended.state is OperationState.DONE, ended.error
    return ended.result


def test_a_dry_run_of_prune_counts_what_would_go_and_touches_nothing(story: FleetStory) -> None:
    repo = ready_repo(story)
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, random.Random(1).randbytes(CHUNK))
    gone = made_backup(story, vm)
    write_to(story, vm.id, 0, bytes(CHUNK))
    write_to(story, vm.id, 2 * CHUNK, b"what stays")
    kept = made_backup(story, vm)
    key = story.secrets.open(repo.wrapped_key, place=repo.id)
    opened = open_repository(
        FolderBlobs(folder_of(repo)), RepositoryKey.parse(key), fleet_id=story.secrets.fleet_id, clock=story.fleet.clock
    )
    opened.forget(gone.vm_id, gone.id)
    opened.close()
    before = files_of(repo)

    dry = prune(story, repo, is_dry_run=True)

    assert files_of(repo) == before
    packs = sum(len(content) for name, content in before.items() if name.startswith("packs/"))
    assert CHUNK < dry["condemned_bytes"] < packs
    assert (dry["removed_bytes"], dry["kept_bytes"]) == (0, packs - dry["condemned_bytes"])
    told = story.db.read(lambda session: backup_repos.get(session, repo.id))
    assert (told.pruned_at, told.kept_bytes) == (None, 0), "it is no prune"
    real = prune(story, repo, is_dry_run=False)
    assert (real["condemned_bytes"], real["kept_bytes"]) == (dry["condemned_bytes"], dry["kept_bytes"])
    assert len([name for name in files_of(repo) if name.startswith("condemned/")]) == 1
    assert story.db.read(lambda session: backups.get(session, kept.id)).state == "ready"


def give_policy(story: FleetStory, some: list[Vm], **wishes: Any) -> None:
    def work(session: Any) -> None:
        spec = PolicySpec(name="nightly", schedule="0 2 * * *", repo="main", **wishes)
        backup_policies.create(session, spec, project=story.project, now=story.clock.now())
        for vm in some:
            vms.update(session, vm.id, **backup_policies.values_for(session, vm, "nightly", now=story.clock.now()))

    story.db.write(work)


def bandwidths(story: FleetStory, vm: Vm) -> list[int]:
    """Return what the agent's journal says of the backups that were asked of the vm's host."""
    journal = story.agents.agent(vm.host_id).parts.journal
    rows = journal.submit(
        lambda connection: connection.execute("SELECT request FROM job WHERE kind = 'backup'").fetchall()
    ).result()
    asked = [pb.StartBackupRequest.FromString(request) for (request,) in rows]
    return [one.bandwidth_mib_s for one in asked if one.vm_id == vm.id]


def test_the_bandwidth_of_a_backup_or_of_its_policy_is_passed_to_the_agents_job(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    made_backup(story, vm)
    made_backup(story, vm, bandwidth_mib_s=700)
    give_policy(story, [vm], bandwidth_mib_s=900)
    accept_backup(story, vm, repo="")
    story.settle()
    assert sorted(bandwidths(story, vm)) == [0, 700, 900]


def figure(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"trimtab_backup_{name}", labels)


def verified(story: FleetStory, backup: Backup) -> None:
    story.db.write(lambda session: backup_service.accept_verify(session, backup, actor=story.actor, now=story.clock.now()))
    story.settle()


def test_the_figures_say_how_old_the_worst_good_and_verified_backups_are_and_what_is_shared(story: FleetStory) -> None:
    repo = ready_repo(story)
    db, web, _without_policy = (story.running_vm(name) for name in ("db", "web", "bare"))
    give_policy(story, [db, web], max_age_s=10_000)
    for vm in (db, web):
        write_to(story, vm.id, 0, bytes(range(256)) * 1024)
    first = made_backup(story, db)
    verified(story, first)
    story.clock.advance(3000)
    other = made_backup(story, web)
    story.clock.advance(500)
    verified(story, other)
    story.clock.advance(500)
    second = made_backup(story, db)
    story.clock.advance(7000)

    measure(story)

    now = story.clock.now()
    rows = [story.db.read(lambda session, one=one: backups.get(session, one.id)) for one in (first, other, second)]
    taken = [(now - one.taken_at).total_seconds() for one in rows if one.taken_at is not None]
    read = [(now - one.verified_at).total_seconds() for one in rows if one.verified_at is not None]
    assert taken[1] > taken[2] > 7000, "the worst is web's"
    assert figure("worst_seconds", what="last_good") == taken[1]
    assert read[0] > read[1] > 7000
    assert figure("worst_seconds", what="last_verified") == read[0]
    assert figure("worst_seconds", what="widest_gap") == taken[0] - taken[2]
    assert [figure("vms", state=state) for state in ("with_policy", "overdue", "without_backup")] == [2, 0, 1]
    size, stored = sum(one.size_bytes for one in rows), sum(one.stored_bytes for one in rows)
    assert figure("repository_dedup_ratio", repository=repo.name) == size / stored
    assert size / stored > 3
    assert figure("repository_bytes", repository=repo.name, of="disks") == size
    assert figure("repository_bytes", repository=repo.name, of="stored") == stored
    assert figure("repository_backups", repository=repo.name) == 3


def booted(story: FleetStory, backup: Backup) -> Backup:
    def work(session: Any) -> Operation:
        wishes = {"pattern": "", "tcp_port": 0, "timeout_s": 60, "actor": story.actor, "now": story.clock.now()}
        return backup_restore.boot_test(session, backup, project=story.project, **wishes)

    story.db.write(work)
    story.settle()
    return story.db.read(lambda session: backups.get(session, backup.id))


def test_the_figures_say_what_was_booted_how_long_that_took_and_what_the_last_backups_read(story: FleetStory) -> None:
    ready_repo(story)
    db, web, bare = (story.running_vm(name) for name in ("db", "web", "bare"))
    give_policy(story, [db, web], max_age_s=10_000)
    write_to(story, db.id, 0, random.Random(2).randbytes(2 * CHUNK))
    measure(story)
    assert [figure("worst_seconds", what=what) for what in ("last_booted", "recovery")] == [0, 0]
    assert [figure("last_bytes", of=what) for what in ("size", "dirty", "read", "stored")] == [0, 0, 0, 0]
    older = booted(story, made_backup(story, db))
    story.clock.advance(2000)
    newer = booted(story, made_backup(story, web))
    write_to(story, db.id, 3 * CHUNK, b"more" * 1000)
    last, without_policy = made_backup(story, db), made_backup(story, bare)
    story.clock.advance(100)
    measure(story)
    now = story.clock.now()
    ages = [(now - one.booted_at).total_seconds() for one in (older, newer) if one.booted_at is not None]
    assert ages[0] > ages[1] + 1900
    assert figure("worst_seconds", what="last_booted") == ages[0]
    assert older.recovery_ms > 0
    assert figure("worst_seconds", what="recovery") == max(older.recovery_ms, newer.recovery_ms) / 1000
    newest = (last, newer, without_policy)
    assert last.base_id == older.id
    assert 0 < last.dirty_bytes <= last.read_bytes < older.read_bytes
    assert last.stored_bytes < older.stored_bytes
    shown = {what: figure("last_bytes", of=what) for what in ("size", "dirty", "read", "stored")}
    assert shown == {
        "size": sum(one.size_bytes for one in newest),
        "dirty": sum(one.dirty_bytes for one in newest),
        "read": sum(one.read_bytes for one in newest),
        "stored": sum(one.stored_bytes for one in newest),
    }


def measure(story: FleetStory) -> None:
    BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger).measure(story.term)


def test_doctor_reads_from_the_rows_who_was_not_backed_up_in_time(story: FleetStory) -> None:
    ready_repo(story)
    db, web, never = (story.running_vm(name) for name in ("db", "web", "never"))
    give_policy(story, [db, web, never], max_age_s=10_000)
    old = made_backup(story, db)
    story.clock.advance(9000)
    made_backup(story, web)
    assert overdue(story) == {}, "nobody is late yet"
    story.clock.advance(2000)
    found = overdue(story)
    assert {vm: (kind, since) for vm, (kind, _, since) in found.items()} == {
        "vm default/db": ("backup-overdue", old.taken_at),
        "vm default/never": ("backup-missing", story.vm(never.id).backup_asked_at),
    }
    assert "its last good backup is 3:0" in found["vm default/db"][1]


def overdue(story: FleetStory) -> dict[str, tuple[str, str, Any]]:
    patient = story.db.read(lambda session: doctor.read(session, now=story.clock.now()))
    found = [one for one in doctor.diagnose(patient) if one.kind.startswith("backup-")]
    return {one.subject: (one.kind, one.message, one.since) for one in found}
