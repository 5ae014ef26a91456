"""A flipped bit in a repository, through every layer: whoever needs the chunk is marked, and good again once it is stored anew."""

import random
from pathlib import Path

import pytest

from tests.operations.backup_kit import accept_restore, give_policy, made_backup, ready_repo, write_to
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Backup, BackupRepo, Operation, Vm
from trimtab_controller.loops.backups import REREAD_EVERY, BackupLoop
from trimtab_controller.services import backups as backup_service
from trimtab_controller.store import backups, events, operations
from trimtab_protos.errors import Conflict

CHUNK = 256 * 1024
SHARED = random.Random(1).randbytes(CHUNK)


def accept_verification(story: FleetStory, backup: Backup) -> Operation:
    return story.db.write(lambda session: backup_service.accept_verify(session, backup, actor=story.actor, now=story.clock.now()))


def verify(story: FleetStory, backup: Backup) -> Operation:
    operation = accept_verification(story, backup)
    story.settle()
    ended = story.operation(operation.id)
    assert ended.state is OperationState.DONE, ended.error
    return ended


def rot(repo: BackupRepo) -> None:
    """Flip a bit in the chunk that was stored first: its pack is the largest by far."""
    packs = (Path(repo.url.removeprefix("file://")) / "packs").rglob("*")
    pack = max((path for path in packs if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[CHUNK // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)


def states(story: FleetStory, *found: Backup) -> list[str]:
    return [story.db.read(lambda session, one=one: backups.get(session, one.id)).state for one in found]


def told(story: FleetStory, kind: str) -> list[str]:
    """Return whom events of this kind are about, one entry for each event."""
    found = story.db.read(lambda session: events.page_after(session, 0, limit=1000, kind_prefix=kind))
    return [one.subject_id for one in found]


def shared_chunk(story: FleetStory) -> tuple[BackupRepo, Vm, Backup, Backup, Backup, Backup]:
    """Return the repository, the vm `db`, two backups of it, one of a vm that shares its chunk, and one of a vm that does not."""
    repo = ready_repo(story)
    db, web, lone = (story.running_vm(name) for name in ("db", "web", "lone"))
    write_to(story, db.id, 0, SHARED)
    first = made_backup(story, db)
    write_to(story, db.id, 3 * CHUNK, b"later")
    second = made_backup(story, db)
    write_to(story, web.id, 0, SHARED)
    write_to(story, lone.id, 0, b"something else")
    return repo, db, first, second, made_backup(story, web), made_backup(story, lone)


def test_a_flipped_bit_marks_every_backup_that_needs_the_chunk_and_each_is_good_again_once_the_next_run_stored_it_anew(
    story: FleetStory,
) -> None:
    repo, db, first, second, other, lone = shared_chunk(story)
    verify(story, other)
    rot(repo)

    operation = verify(story, second)

    assert states(story, first, second, other, lone) == ["damaged", "damaged", "damaged", "ready"]
    assert operation.result is not None
    assert operation.result["damaged_others"] == sorted([first.id, other.id])
    shown = story.db.read(lambda session: backups.get(session, other.id))
    assert "vda cannot be restored whole" in shown.problem
    assert second.id in shown.problem, "it names the verification that found it"
    assert shown.level == 1, "what was proven of it then stays known"
    assert sorted(told(story, "backup.damaged")) == sorted([first.vm_id, other.vm_id]), "once for each vm"
    with pytest.raises(Conflict) as refused:
        accept_restore(story, first, "again")
    assert refused.value.code == "backup-damaged"
    verify(story, first)
    assert len(told(story, "backup.damaged")) == 2, "what was known is not told again"

    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    loop.verify(story.term)
    story.settle()
    assert told(story, "backup.repaired") == [], "nothing was made since, so nothing is read again"
    story.clock.advance(60)
    repaired = made_backup(story, db)
    assert CHUNK <= repaired.read_bytes < repaired.size_bytes, "the chunk that nothing had changed was read again"
    loop.verify(story.term)
    story.settle()

    assert states(story, first, second, other, lone, repaired) == ["ready"] * 5
    assert told(story, "backup.repaired") == [first.vm_id], "the other one was read, which stood for all"
    restored = accept_restore(story, other, "again")
    story.settle()
    assert story.operation(restored.id).state is OperationState.DONE, story.operation(restored.id).error
    assert audit_invariants(story) == []


def test_what_nothing_repairs_is_not_read_again_after_each_backup(story: FleetStory) -> None:
    repo, db, first, second, other, lone = shared_chunk(story)
    rot(repo)
    for vm_id in (db.id, other.vm_id):
        write_to(story, vm_id, 0, random.Random(2).randbytes(CHUNK))
    verify(story, first)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    read: list[int] = []
    for _ in range(3):
        story.clock.advance(60)
        made_backup(story, story.vm(lone.vm_id))
        before = _verifications(story)
        for _ in range(2):
            loop.verify(story.term)
            story.settle()
        read.append(_verifications(story) - before)
    assert read == [1, 0, 0]
    story.clock.advance(REREAD_EVERY.total_seconds())
    loop.verify(story.term)
    story.settle()
    assert _verifications(story) - before == 1
    assert states(story, first, second, other, lone) == ["damaged", "damaged", "damaged", "ready"]


def _verifications(story: FleetStory) -> int:
    return len(story.db.read(lambda session: operations.page(session, limit=200, kind="backup.verify")))


def test_what_another_verification_marks_meanwhile_is_not_made_good_by_an_older_judgement(story: FleetStory) -> None:
    _, _, first, second, other, lone = shared_chunk(story)
    mark = {"state": "damaged", "problem": "by hand"}
    story.db.write(lambda session: backups.update(session, first.id, **mark))
    operation = accept_verification(story, lone)
    story.settle(until=lambda: "do choose" in story.journal(operation.id))
    story.db.write(lambda session: backups.update(session, other.id, **mark))
    story.settle()
    assert states(story, first, second, other, lone) == ["ready", "ready", "damaged", "ready"]


def test_retention_keeps_what_the_next_run_may_repair_and_lets_go_of_what_it_did_not(story: FleetStory) -> None:
    repo, db, first, second, _, _ = shared_chunk(story)
    give_policy(story, db, keep_last=10)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    rot(repo)
    write_to(story, db.id, 0, bytes(CHUNK))
    whole = made_backup(story, db)
    write_to(story, db.id, 0, SHARED)
    last = made_backup(story, db)
    verify(story, last)
    assert states(story, first, second, whole, last) == ["damaged", "damaged", "ready", "damaged"]
    loop.retain(story.term)
    story.settle()
    made = made_backup(story, db)
    loop.retain(story.term)
    story.settle()
    assert listed(story, db) == [first.id, second.id, whole.id, last.id, made.id], (
        "one whole backup is no reason to lose the others"
    )
    loop.verify(story.term)
    story.settle()
    assert states(story, first, second, whole, last, made) == ["ready"] * 5


def test_retention_lets_go_of_what_was_judged_again_and_is_damaged_still(story: FleetStory) -> None:
    repo, db, first, second, other, _ = shared_chunk(story)
    give_policy(story, db, keep_last=10)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    rot(repo)
    write_to(story, db.id, 0, bytes(CHUNK))
    write_to(story, other.vm_id, 0, bytes(CHUNK))
    verify(story, second)
    story.clock.advance(3600)
    made = made_backup(story, db)
    loop.retain(story.term)
    story.settle()
    assert listed(story, db) == [first.id, second.id, made.id]
    loop.verify(story.term)
    story.settle()
    loop.retain(story.term)
    story.settle()
    assert listed(story, db) == [made.id]


def listed(story: FleetStory, vm: Vm) -> list[str]:
    return [one.id for one in story.db.read(lambda session: backups.of_vms(session, [vm.id]))[vm.id]]
