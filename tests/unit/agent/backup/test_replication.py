"""A second repository holds what the first one lists, byte for byte, under keys of its own, whatever broke off on the way."""

import contextlib

import pytest

from tests.unit.agent.backup.kit import Disk, FaultyBlobs, MemoryBlobs, back_up, new_repository, reopen, restore
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.replication import replicate
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_protos.errors import Conflict, TrimtabError

OTHER = RepositoryKey(bytes(range(100, 132)))


def nothing(_done: int, _total: int) -> None:
    pass


def filled() -> tuple[MemoryBlobs, dict[str, bytes]]:
    """Return a repository with a full, two increments and another vm's backup, and what each of them holds."""
    blobs, disk, contents = MemoryBlobs(), Disk(60, tail=512), {}
    repository = new_repository(blobs)
    for chunk in range(40):
        disk.write(chunk)
    for number in (1, 2, 3):
        back_up(
            repository, disk, f"bk-{number}", base_id=f"bk-{number - 1}" if number > 1 else None, files={"domain.xml": b"<x/>"}
        )
        contents[f"bk-{number}"] = bytes(disk.content)
        disk.write(number)
        disk.write(50, bytes(4096))
    return blobs, contents


def test_every_backup_is_there_and_only_what_changed_was_read_for_increments() -> None:
    source, contents = filled()
    copy = MemoryBlobs()
    target = new_repository(copy, key=OTHER)
    count, read = replicate(reopen(source), target, on_progress=nothing)
    assert count == 3
    assert read < 2 * 41 * 4096, "the second and third backup cost what they changed"
    again = reopen(copy, key=OTHER)
    assert {name: restore(again, name) for name in contents} == contents
    assert not verify_all(again).damaged_records
    assert [one.created_ms for one in again.list_backups().manifests] == [
        one.created_ms for one in reopen(source).list_backups().manifests
    ]
    assert replicate(reopen(source), again, on_progress=nothing) == (0, 0)


@pytest.mark.parametrize("breaks_at", range(4, 60, 7))
def test_a_run_that_broke_off_lists_nothing_half_and_is_gone_on_with(breaks_at: int) -> None:
    source, contents = filled()
    copy = MemoryBlobs()
    new_repository(copy, key=OTHER)
    calls = [0]

    def fault(_verb: str, _name: str) -> str:
        calls[0] += 1
        return "fail" if calls[0] >= breaks_at else "pass"

    with contextlib.suppress(TrimtabError):
        replicate(reopen(source), reopen(FaultyBlobs(copy, fault), key=OTHER), on_progress=nothing)
    after = reopen(copy, key=OTHER)
    for listed in after.list_backups().manifests:
        assert restore(after, listed.backup_id) == contents[listed.backup_id]
    replicate(reopen(source), after, on_progress=nothing)
    assert {name: restore(reopen(copy, key=OTHER), name) for name in contents} == contents


def test_a_damaged_chunk_is_never_copied_and_a_repository_not_into_itself() -> None:
    source, _contents = filled()
    with pytest.raises(Conflict, match="into itself"):
        replicate(reopen(source), reopen(source), on_progress=nothing)
    pack = max(source.names("packs/"), key=lambda name: len(source.blobs[name]))
    source.flip_bit(pack, 5000)
    copy = MemoryBlobs()
    target = new_repository(copy, key=OTHER)
    with pytest.raises(TrimtabError):
        replicate(reopen(source), target, on_progress=nothing)
    assert reopen(copy, key=OTHER).list_backups().manifests == []
