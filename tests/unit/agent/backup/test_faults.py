"""Storage that fails, loses answers, or hangs on to a dead writer: at every single call of a backup, a prune and a restore."""

from collections.abc import Callable

import pytest

from tests.unit.agent.backup.kit import (
    Disk,
    FaultyBlobs,
    MemoryBlobs,
    back_up,
    new_repository,
    reopen,
    restore,
)
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_protos.errors import Conflict, TrimtabError


class Scene:
    """Two backups, one of them forgotten, and a disk that has changed since."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobs()
        self.clock = ManualClock()
        repository = new_repository(self.blobs, clock=self.clock)
        self.disk = Disk(1030, tail=5)
        for chunk in (0, 3, 1025, 1030):
            self.disk.write(chunk)
        back_up(repository, self.disk, "bk-1")
        self.disk.write(3)
        self.content = {"bk-2": bytes(self.disk.content)}
        back_up(repository, self.disk, "bk-2", base_id="bk-1")
        repository.forget("vm-1", "bk-1")
        prune(repository, grace_s=0)
        self.disk.write(1025)
        self.content["bk-3"] = bytes(self.disk.content)

    def back_up(self, blobs: BlobStore) -> None:
        back_up(reopen(blobs, clock=self.clock), self.disk, "bk-3", base_id="bk-2")

    def prune(self, blobs: BlobStore) -> None:
        prune(reopen(blobs, clock=self.clock), grace_s=0)

    def restore(self, blobs: BlobStore) -> None:
        assert restore(reopen(blobs, clock=self.clock), "bk-2") == self.content["bk-2"]

    def check(self) -> None:
        self.clock.advance(4000)
        repository = reopen(self.blobs, clock=self.clock)
        listed = [manifest.backup_id for manifest in repository.list_backups().manifests]
        assert listed in (["bk-2"], ["bk-2", "bk-3"])
        for _ in range(2):
            prune(repository, grace_s=0)
        report = verify_all(repository)
        assert report.damaged_records == 0
        for backup_id in listed:
            assert restore(repository, backup_id) == self.content[backup_id]
        self.disk.dirty = {1025}
        back_up(repository, self.disk, "bk-4", base_id="bk-2")
        assert restore(repository, "bk-4") == bytes(self.disk.content)


DEEDS: dict[str, Callable[[Scene, BlobStore], None]] = {
    "backup": Scene.back_up,
    "prune": Scene.prune,
    "restore": Scene.restore,
}


@pytest.mark.parametrize("kind", ["fail", "lost"])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_fault_at_any_call_loses_nothing_that_was_listed(deed: str, kind: str) -> None:
    counted = FaultyBlobs(Scene().blobs, lambda _verb, _name: "pass")
    DEEDS[deed](Scene(), counted)
    errors_seen = 0
    for call in range(counted.calls if counted.calls else 60):
        scene = Scene()
        seen = iter(range(10_000))
        faulty = FaultyBlobs(scene.blobs, lambda _verb, _name, seen=seen, call=call: kind if next(seen) == call else "pass")  # type: ignore[misc]
        try:
            DEEDS[deed](scene, faulty)
        except TrimtabError:
            errors_seen += 1
        scene.check()
    assert errors_seen, "the faults were met"


def test_a_commit_whose_answer_was_lost_is_found_listed() -> None:
    scene = Scene()
    faulty = FaultyBlobs(scene.blobs, lambda verb, name: "lost" if verb == "put_new" and name.startswith("backups/") else "pass")
    scene.back_up(faulty)
    assert restore(reopen(scene.blobs), "bk-3") == scene.content["bk-3"]


def test_a_commit_of_which_nothing_is_known_is_not_reported_as_either() -> None:
    scene = Scene()
    faulty = FaultyBlobs(scene.blobs, lambda _verb, name: "fail" if name == "backups/vm-1/bk-3" else "pass")
    with pytest.raises(TrimtabError) as unknown:
        scene.back_up(faulty)
    assert unknown.value.code == "backup-commit-unknown"


def test_only_one_prunes_and_a_dead_pruner_is_followed() -> None:
    scene = Scene()

    class Dead(BaseException):
        pass

    is_dead = False

    def fault(verb: str, name: str) -> str:
        nonlocal is_dead
        is_dead = is_dead or (verb == "delete" and name.startswith("condemned/"))
        if is_dead:
            raise Dead
        return "pass"

    with pytest.raises(Dead):
        scene.prune(FaultyBlobs(scene.blobs, fault))
    with pytest.raises(Conflict) as busy:
        scene.prune(scene.blobs)
    assert busy.value.code == "prune-is-running"
    assert "host1" in busy.value.message
    scene.clock.advance(3700)
    scene.prune(scene.blobs)
    scene.check()
