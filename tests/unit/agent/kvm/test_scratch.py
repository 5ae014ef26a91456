"""When a backup has to end for want of room, and what is told then; real guests: `tests/lab/test_kvm_backup_changes.py`."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm.scratch import Room, Usage, rooms_of, watched, why_end
from trimtab_protos.errors import NoCapacity, NotFound, Unavailable

MIB = 1 << 20


def room(free_mib: int, *files: Path) -> Room:
    return Room(Path("/srv/pool"), files, free_mib * MIB)


def usage(taken_mib: int, free_mib: int) -> Usage:
    return Usage(taken_mib * MIB, free_mib * MIB)


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (usage(0, 1000), usage(0, 1000), ""),
        (usage(400, 600), usage(400, 600), ""),
        (usage(499, 501), usage(501, 499), "501.0 MiB of at most 500.0 MiB are taken"),
        # What was written since the last look is written twice more before the end takes effect.
        (usage(400, 600), usage(430, 570), ""),
        (usage(400, 600), usage(434, 566), "434.0 MiB of at most 500.0 MiB are taken"),
        # Others fill it: their disks are on the same file system.
        (usage(100, 251), usage(100, 250), ""),
        (usage(100, 251), usage(100, 249), "249.0 MiB are left in /srv/pool, and 250.0 MiB are kept for others"),
        (usage(100, 300), usage(130, 270), "270.0 MiB are left"),
    ],
)
def test_a_backup_takes_half_of_what_was_free_and_leaves_a_quarter(before: Usage, now: Usage, why: str) -> None:
    assert why_end(room(1000), before, now).startswith(why)
    assert bool(why_end(room(1000), before, now)) == bool(why)


def test_what_is_left_to_others_on_a_large_disk_is_a_gibibyte() -> None:
    assert room(100_000).kept_free_bytes == 1024 * MIB
    assert room(100_000).cap_bytes == 50_000 * MIB


def test_files_of_one_file_system_share_its_room_and_none_begins_without_any(tmp_path: Path) -> None:
    files = [tmp_path / name for name in (".vol-1.scratch", ".vol-2.scratch")]
    [shared] = rooms_of(map(str, files))
    assert shared.files == tuple(files)
    assert shared.look().taken_bytes == 0, "neither is there yet"
    files[1].write_bytes(b"x" * MIB)
    assert shared.look().taken_bytes == MIB
    with pytest.raises(NoCapacity, match=r"0.0 MiB are left in .*none begins with less than 8.0 MiB") as refused:
        rooms_of(["/proc/.vol-1.scratch"])  # a file system that has no room at all
    assert refused.value.code == "scratch-full"
    with pytest.raises(NotFound, match="look for room"):
        rooms_of([str(tmp_path / "gone" / ".vol-1.scratch")])


class Job:
    """A job that is ended by the first call, and whose guest needs so many more until it goes on."""

    def __init__(self, *, still_after: int = 0) -> None:
        self.still_after, self.calls = still_after, 0
        self.ended = threading.Event()

    def settle(self) -> bool:
        self.calls += 1
        self.ended.set()
        if self.calls == 1:
            raise Unavailable("hypervisor-down", "libvirt does not answer")
        return self.calls > self.still_after + 1


def read_until_lost(job: Job) -> None:
    assert job.ended.wait(60)
    raise Unavailable("disk-export-lost", "the export of the disk broke off")


def is_paused_after(looks: int) -> Callable[[], bool]:
    answers = iter([False] * looks)
    return lambda: next(answers, True)


@pytest.mark.parametrize(
    ("free_mib", "stands_still"), [(0, is_paused_after(10**6)), (10**6, is_paused_after(2)), (10**6, is_paused_after(0))]
)
def test_what_breaks_off_since_the_job_was_ended_is_told_as_want_of_room(
    tmp_path: Path, free_mib: int, stands_still: Callable[[], bool]
) -> None:
    """The file takes more than it may; or the guest was faster than the looks, and is let go on."""
    (file := tmp_path / "file").write_bytes(b"x")
    job, scratch = Job(still_after=2), Room(tmp_path, (file,), free_mib * MIB)
    with (
        pytest.raises(NoCapacity, match="nothing was backed up, and the guest goes on") as told,
        watched([scratch], stood_still=False, stands_still=stands_still, settle=job.settle),
    ):
        read_until_lost(job)
    assert told.value.code == "scratch-full"
    assert job.calls == 4, "until the guest went on"


def test_what_breaks_off_by_itself_stays_what_it_is(tmp_path: Path) -> None:
    job, scratch = Job(), Room(tmp_path, (tmp_path / "file",), 1)
    with (
        pytest.raises(Unavailable, match="broke off"),
        watched([scratch], stood_still=False, stands_still=lambda: False, settle=job.settle),
    ):
        raise Unavailable("disk-export-lost", "the export of the disk broke off")
    assert job.calls == 0


def test_a_guest_that_an_error_had_paused_before_is_backed_up_as_it_stands(tmp_path: Path) -> None:
    job, looks, seen = Job(), iter(range(3)), threading.Event()

    def stands_still() -> bool:
        if next(looks, None) is None:
            seen.set()
        return True

    with watched([Room(tmp_path, (tmp_path / "file",), 1)], stood_still=True, stands_still=stands_still, settle=job.settle):
        assert seen.wait(60)
    assert job.calls == 0


def test_a_backup_that_needs_no_scratch_is_not_watched() -> None:
    with watched([], stood_still=False, stands_still=lambda: True, settle=Job().settle):
        assert "scratch" not in [thread.name for thread in threading.enumerate()]
