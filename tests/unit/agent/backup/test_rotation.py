"""Keys change under whatever breaks off: one of both keys opens the repository at every instant, and nothing becomes unreadable."""

import contextlib
import json
from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import (
    FLEET,
    KEY,
    Disk,
    FaultyBlobs,
    MemoryBlobs,
    back_up,
    new_repository,
    reopen,
    restore,
    subject,
)
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.access import Access, Repositories
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.rotation import rotate
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_agent.backup.repository.writer import begin_backup
from trimtab_protos.errors import Conflict, PermissionDenied, TrimtabError

NEXT = RepositoryKey(bytes(range(1, 33)))


class Killed(BaseException):
    """The process that rotates dies here."""


def scene() -> tuple[MemoryBlobs, str, bytes]:
    blobs = MemoryBlobs()
    repository, disk = new_repository(blobs), Disk(6, seed=3)
    disk.write(0)
    disk.write(4)
    back_up(repository, disk, "bk-1")
    return blobs, repository.config.repository_id, bytes(disk.content)


def generations(blobs: MemoryBlobs) -> list[tuple[int, str]]:
    found = [json.loads(blobs.blobs[name]) for name in blobs.names("keys/")]
    return [(one["generation"], one["key_id"]) for one in found]


@pytest.mark.parametrize("kind", ["fail", "lost", "kill before", "kill after"])
def test_a_rotation_that_ends_at_any_call_is_finished_by_the_next_and_loses_nothing(kind: str) -> None:
    counted = FaultyBlobs(scene()[0], lambda _verb, _name: "pass")
    rotate(counted, reopen(counted).config.repository_id, old=KEY, new=NEXT)
    for call in range(counted.calls):
        blobs, repository_id, content = scene()
        seen = iter(range(1000))
        at = {"now": False}

        def fault(_verb: str, _name: str, seen: object = seen, call: int = call, at: dict[str, bool] = at) -> str:
            if at["now"]:
                raise Killed  # the call before was done, and nobody lives to see it
            at["now"] = next(seen) == call and kind == "kill after"  # type: ignore[call-overload]
            return "pass"

        def fault_once(_verb: str, _name: str, seen: object = seen, call: int = call) -> str:
            if next(seen) != call:  # type: ignore[call-overload]
                return "pass"
            if kind == "kill before":
                raise Killed
            return kind

        with contextlib.suppress(TrimtabError, Killed):
            rotate(FaultyBlobs(blobs, fault if kind == "kill after" else fault_once), repository_id, old=KEY, new=NEXT)
        opened = [key for key in (KEY, NEXT) if _opens(blobs, key)]
        assert len(opened) == 1, "exactly one of both keys counts at any instant"
        assert restore(reopen(blobs, key=opened[0]), "bk-1") == content

        rotate(blobs, repository_id, old=KEY, new=NEXT)

        assert generations(blobs) == [(2, NEXT.id), (2, NEXT.id)], "both copies, and none that the old key opens"
        assert not _opens(blobs, KEY)
        repository = reopen(blobs, key=NEXT)
        assert (repository.keyring.newest_version, restore(repository, "bk-1")) == (2, content)
        assert verify_all(repository).damaged_records == 0


def _opens(blobs: MemoryBlobs, key: RepositoryKey) -> bool:
    try:
        reopen(blobs, key=key).close()
    except PermissionDenied:
        return False
    return True


def test_of_two_rotations_one_wins_and_a_third_key_changes_nothing() -> None:
    blobs, repository_id, _content = scene()
    third = RepositoryKey.new()
    meanwhile = FaultyBlobs(blobs, lambda _verb, _name: "pass")

    def fault(verb: str, _name: str) -> str:
        if verb == "put_new" and len(blobs.names("keys/")) == 2:
            rotate(blobs, repository_id, old=KEY, new=third)
            assert generations(blobs) == [(2, third.id), (2, third.id)]
        return "pass"

    meanwhile.fault = fault
    with pytest.raises(Conflict) as lost:
        rotate(meanwhile, repository_id, old=KEY, new=NEXT)
    assert lost.value.code == "keyring-changed-meanwhile"
    with pytest.raises(PermissionDenied):
        rotate(blobs, repository_id, old=KEY, new=NEXT)
    assert _opens(blobs, third)


def test_a_data_key_goes_with_the_last_blob_that_needs_it_and_never_while_anybody_writes() -> None:
    clock = ManualClock()
    blobs = MemoryBlobs()
    disk = Disk(6, seed=3)
    disk.write(0)
    back_up(new_repository(blobs, clock=clock), disk, "bk-1")
    repository = reopen(blobs, clock=clock)
    rotate(blobs, repository.config.repository_id, old=KEY, new=NEXT)
    for chunk in range(6):
        disk.write(chunk)
    after = reopen(blobs, clock=clock, key=NEXT)
    back_up(after, disk, "bk-2", base_id="bk-1")
    assert prune(after, grace_s=0).retired_data_keys == [], "bk-1 is sealed with it"
    after.forget("vm-1", "bk-1")
    # A writer that lives, whatever it has done: it may have begun before the rotation.
    with begin_backup(reopen(blobs, clock=clock, key=NEXT), subject(), "bk-3", base_id=None):
        clock.advance(10)
        for _ in range(3):
            assert prune(after, grace_s=0).retired_data_keys == []
    clock.advance(4000)
    for _ in range(3):
        found = prune(after, grace_s=0)
        if found.retired_data_keys:
            break
    assert found.retired_data_keys == [1]
    again = reopen(blobs, clock=clock, key=NEXT)
    assert set(again.keyring.data_keys) == {2}
    assert restore(again, "bk-2") == bytes(disk.content)
    assert verify_all(again).damaged_records == 0
    assert generations(blobs) == [(3, NEXT.id), (3, NEXT.id)]


def test_a_host_that_was_told_of_the_old_key_needs_the_new_one_and_the_one_that_rotated_has_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/backup"
    old, other = (Repositories(ManualClock(), holder=name) for name in ("host1", "host2"))
    access = Access(url=url, key=KEY.text, fleet_id=FLEET)
    old.grant("repo-1", access, create=True)
    other.grant("repo-1", access, create=False)
    old.rotate("repo-1", access, NEXT.text)
    old.rotate("repo-1", access, NEXT.text)
    old.open("repo-1").close()
    with pytest.raises(PermissionDenied):
        other.open("repo-1")
