"""A backup over what was there before, through a real server of QEMU's: afterwards it is the disk, to the last byte of the volume."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import CHUNK, Disk, MemoryBlobs, back_up, new_repository
from trimtab_agent.backup.nbd import NbdClient
from trimtab_agent.backup.repository.reader import DiskReader, open_backup
from trimtab_agent.backup.restoring import network_volume, restore_over
from trimtab_protos.errors import Conflict

CHUNKS = 96


def lent(file: Path, is_writable: bool) -> AbstractContextManager[NbdClient]:
    """As QEMU opens a LUN: by options, without a format that it could find out by itself."""
    options = f"driver=raw,file.driver=file,file.filename={file}"
    return network_volume(options, socket=file.with_suffix(".sock"), is_writable=is_writable)


@pytest.fixture
def disk() -> Disk:
    """One with content at both ends and a hole between; its last chunk is a short one."""
    made = Disk(CHUNKS, tail=512)
    for chunk in (0, 1, CHUNKS - 3, CHUNKS):
        made.write(chunk)
    return made


@pytest.fixture
def backed_up(disk: Disk) -> Iterator[DiskReader]:
    repository = new_repository(MemoryBlobs())
    back_up(repository, disk, "bk-1")
    with open_backup(repository, "vm-1", "bk-1") as reader:
        yield reader.disk("vda")


def old(file: Path, size_bytes: int) -> Path:
    file.write_bytes(b"old " * (size_bytes // 4))
    return file


@pytest.mark.parametrize("more_bytes", [0, 40 * CHUNK], ids=["as large", "larger"])
def test_nothing_is_left_of_what_was_there_before(tmp_path: Path, disk: Disk, backed_up: DiskReader, more_bytes: int) -> None:
    file = old(tmp_path / "lun", len(disk.content) + more_bytes)
    told: list[tuple[int, int]] = []
    written = restore_over(
        backed_up, partial(lent, file), is_empty=False, on_progress=lambda done, total: told.append((done, total))
    )
    assert file.read_bytes() == bytes(disk.content) + bytes(more_bytes)
    assert told[-1] == (written, written)


def test_a_volume_that_is_too_small_keeps_what_it_holds(tmp_path: Path, backed_up: DiskReader) -> None:
    file = old(tmp_path / "lun", CHUNKS // 2 * CHUNK)
    with pytest.raises(Conflict) as refused:
        restore_over(backed_up, partial(lent, file), is_empty=False, on_progress=lambda _done, _total: None)
    assert refused.value.code == "volume-size-differs"
    assert file.read_bytes() == b"old " * (CHUNKS // 2 * CHUNK // 4)


def test_one_that_was_thought_empty_and_is_not_is_found_out(tmp_path: Path, disk: Disk, backed_up: DiskReader) -> None:
    file = old(tmp_path / "image", len(disk.content))
    with pytest.raises(Conflict) as refused:
        restore_over(backed_up, partial(lent, file), is_empty=True, on_progress=lambda _done, _total: None)
    assert refused.value.code == "restore-differs"
