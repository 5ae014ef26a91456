"""A bitmap of a stopped disk is believed only where it says all that changed, asked of real images."""

import shutil
import subprocess
from pathlib import Path

import pytest

from trimtab_agent.backup.source import DiskWish
from trimtab_agent.hypervisor.kvm.cold_backups import drop_marks, marks_of, stopped_instant, why_not_all
from trimtab_agent.hypervisor.kvm.disk_sources import DiskSource
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys

MIB = 1 << 20
CHECKPOINT = "tt-bk-1"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def write(file: Path, at_mib: int) -> None:
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {at_mib}M 64k", str(file))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with a checkpoint, and 64 KiB that were written since."""
    file = tmp_path / "vol-1.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(file), "64M")
    run("qemu-img", "bitmap", "--add", str(file), CHECKPOINT)
    write(file, 1)
    return file


def over(file: Path) -> Path:
    """Lay an empty layer over the disk, as a snapshot of a stopped vm does."""
    layer = file.with_name("vol-1.layer.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(file), str(layer))
    return layer


def changed_in(file: Path, socket: Path, *, base: str = CHECKPOINT, checkpoint: str = "tt-bk-2") -> tuple[list[int], str]:
    """Return what is told to have changed since `base`, in MiB, and why all is read."""
    wishes, sources = [DiskWish("vda", base)], {"vda": DiskSource("qcow2", str(file))}
    with stopped_instant(wishes, sources, socket, VolumeKeys(), checkpoint=checkpoint) as instant:
        [served] = instant.disks
        if not served.bitmap:
            return [], served.denied
        told = served.content.extents(served.bitmap, offset=0, length=64 * MIB)
        return [extent.offset // MIB for extent in told if extent.flags & 1], ""


def test_what_changed_is_read_from_the_disk_whatever_libvirt_of_this_host_knows(disk: Path, tmp_path: Path) -> None:
    assert changed_in(disk, tmp_path / "s.sock") == ([1], "")


def test_a_disk_that_went_back_behind_trimtabs_back_is_read_whole(disk: Path, tmp_path: Path) -> None:
    """Its file, or the storage below, was put back to an earlier state: the older bitmap came back with it, and with it alone one would
    believe that the disk still holds what was written after that state and is in the last backup."""
    earlier = disk.with_name("copy")
    shutil.copy(disk, earlier)
    write(disk, 9)
    assert changed_in(disk, tmp_path / "s.sock", checkpoint="tt-bk-2") == ([1, 9], "")
    shutil.copy(earlier, disk)
    changed, why = changed_in(disk, tmp_path / "s.sock", base="tt-bk-2", checkpoint="tt-bk-3")
    assert (changed, "not in an earlier state of the disk" in why) == ([], True), why


def test_what_a_tool_of_qemus_writes_to_a_stopped_disk_is_told_and_a_return_to_an_image_snapshot_is_not_possible(
    disk: Path, tmp_path: Path
) -> None:
    assert changed_in(disk, tmp_path / "s.sock", checkpoint="tt-bk-2")[1] == ""
    run("qemu-img", "snapshot", "-c", "by-hand", str(disk))
    write(disk, 5)
    back = subprocess.run(["qemu-img", "snapshot", "-a", "by-hand", str(disk)], check=False, capture_output=True, timeout=60)
    assert back.returncode != 0, "QEMU refuses what no bitmap would tell"
    assert changed_in(disk, tmp_path / "s.sock", base="tt-bk-2", checkpoint="tt-bk-3") == ([5], "")


def test_older_checkpoints_go_once_a_backup_is_listed_and_its_own_where_it_is_not(disk: Path, tmp_path: Path) -> None:
    changed_in(disk, tmp_path / "s.sock", checkpoint="tt-bk-2")
    run("qemu-img", "bitmap", "--add", str(disk), "somebodys")
    sources = [DiskSource("qcow2", str(disk)), DiskSource("raw", "/nowhere")]
    drop_marks(sources, lambda name: name.startswith("tt-") and name != "tt-bk-2")
    assert marks_of(disk) == ("tt-bk-2", "somebodys")
    drop_marks(sources, lambda name: name == "tt-bk-2")
    assert marks_of(disk) == ("somebodys",)


def test_a_disk_that_cannot_be_marked_is_read_whole_next_time_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "old.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", str(file), "64M")
    wishes, sources = [DiskWish("vda")], {"vda": DiskSource("qcow2", str(file))}
    with stopped_instant(wishes, sources, tmp_path / "s.sock", VolumeKeys(), checkpoint="tt-bk-1") as instant:
        assert instant.checkpoint == ""
        assert "the next one reads all" in instant.notes["unmarked"]


def test_a_disk_that_was_laid_over_since_is_read_whole(disk: Path, tmp_path: Path) -> None:
    layer = over(disk)
    write(layer, 9)  # of which the bitmap below knows nothing
    changed, why = changed_in(layer, tmp_path / "s.sock")
    assert (changed, "laid over by a snapshot" in why) == ([], True)


def test_a_disk_that_was_laid_over_while_it_ran_is_read_whole_too(disk: Path) -> None:
    layer = over(disk)
    run("qemu-img", "bitmap", "--add", str(layer), CHECKPOINT)  # as libvirt does, for what changes from then on
    assert "laid over by a snapshot" in why_not_all(layer, CHECKPOINT)


def test_a_bitmap_above_what_the_disk_was_cloned_from_is_enough(disk: Path) -> None:
    clone = over(disk)
    run("qemu-img", "bitmap", "--add", str(clone), "tt-bk-2")
    assert why_not_all(clone, "tt-bk-2") == ""


def test_a_bitmap_that_is_not_there_and_one_whose_qemu_was_killed_are_told_apart(disk: Path) -> None:
    assert "the disk does not carry tt-bk-9" in why_not_all(disk, "tt-bk-9")
    # A QEMU that has the disk open for writing has marked its bitmaps, and dies.
    script = f"open -o driver=qcow2 {disk}\nwrite -P 1 0 64k\nabort\n"
    subprocess.run(["qemu-io"], input=script, text=True, check=False, capture_output=True, timeout=60)
    assert why_not_all(disk, CHECKPOINT) == f"its checkpoint cannot be read: the QEMU that kept {CHECKPOINT} was killed"
