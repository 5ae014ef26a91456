"""Backups share chunks: the verification of one tells of every other that needs what it found damaged, and when none does any more."""

from pathlib import Path

from tests.unit.agent.backup.kit import (
    CHUNK,
    FLEET,
    KEY,
    Disk,
    FaultyBlobs,
    MemoryBlobs,
    back_up,
    new_repository,
    reopen,
    restore,
)
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository.chunk_index import Location
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.repository import Repository, create_repository
from trimtab_agent.backup.repository.sealing import Kind
from trimtab_agent.backup.repository.verify import VerifyReport, verify_backup


def shared_disk(repository: Repository) -> Disk:
    """Back two vms of equal disks up, one of them before and after a change, and a third that shares nothing; return the shared disk."""
    disk, other = Disk(40), Disk(40, seed=1)
    for chunk in range(40):
        disk.write(chunk)
        other.write(chunk)
    back_up(repository, disk, "bk-1")
    disk.write(30)
    back_up(repository, disk, "bk-2", base_id="bk-1")
    back_up(repository, disk, "bk-3", vm="vm-2")
    back_up(repository, other, "bk-4", vm="vm-3")
    return disk


def place_of(repository: Repository, content: bytes) -> Location:
    place = repository.index.find(repository.identifier.of(Kind.CHUNK, content))
    assert place is not None
    return place


def flip(repository: Repository, blobs: MemoryBlobs, content: bytes) -> None:
    """Flip a bit in the stored form of a chunk."""
    place = place_of(repository, content)
    blobs.flip_bit(place.pack, place.entry.offset + place.entry.length // 2)


def others(report: VerifyReport) -> list[str]:
    assert report.are_others_judged
    return sorted(health.backup_id for health in report.others)


def test_the_verification_of_one_backup_names_every_other_that_needs_what_is_damaged_until_it_is_stored_anew() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = shared_disk(repository)
    quiet = verify_backup(repository, "vm-1", "bk-1")
    assert (quiet.others, quiet.are_others_judged) == ([], False), "nobody pays for a judgement where nothing is damaged"
    flip(repository, blobs, disk.chunk(7))
    flip(repository, blobs, disk.chunk(9))

    found = verify_backup(reopen(blobs), "vm-1", "bk-2")

    assert (found.damaged_records, [health.backup_id for health in found.damaged_backups]) == (2, ["bk-2"])
    named = {(health.vm_id, health.backup_id): list(health.damaged_disks) for health in found.others}
    assert named == {("vm-1", "bk-1"): ["vda"], ("vm-2", "bk-3"): ["vda"]}
    whole = verify_backup(reopen(blobs), "vm-3", "bk-4")
    assert whole.damaged_backups == []
    assert others(whole) == ["bk-1", "bk-2", "bk-3"], "by what an earlier reading wrote down"

    back_up(reopen(blobs), disk, "bk-5", base_id="bk-3", vm="vm-2")

    repaired = verify_backup(reopen(blobs), "vm-2", "bk-5")
    assert (repaired.damaged_backups, others(repaired)) == ([], [])
    assert restore(reopen(blobs), "bk-2") == bytes(disk.content)


def test_who_asks_hears_of_the_others_though_no_note_of_damage_is_left() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = shared_disk(repository)
    blobs.delete(place_of(repository, disk.chunk(7)).pack)
    lost = verify_backup(reopen(blobs), "vm-1", "bk-1")
    assert (len(lost.damaged_backups), others(lost)) == (1, ["bk-2", "bk-3"])
    back_up(reopen(blobs), disk, "bk-5", base_id="bk-3", vm="vm-2")

    unasked = verify_backup(reopen(blobs), "vm-2", "bk-5")
    asked = verify_backup(reopen(blobs), "vm-2", "bk-5", judges_others=True)

    assert (unasked.damaged_backups, unasked.are_others_judged, blobs.names("damaged/")) == ([], False, [])
    assert others(asked) == ["bk-1"], "one chunk of it is on no disk any more"
    assert restore(reopen(blobs), "bk-2") == bytes(disk.content)
    prune(reopen(blobs), grace_s=0)
    assert others(verify_backup(reopen(blobs), "vm-2", "bk-5", judges_others=True)) == ["bk-1"]
    reopen(blobs).forget("vm-1", "bk-1")
    prune(reopen(blobs), grace_s=0)
    prune(reopen(blobs), grace_s=0)
    assert not reopen(blobs).has_gaps, "the lost pack is listed no longer"


def test_damage_that_cannot_be_written_down_is_judged_all_the_same() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = shared_disk(repository)
    flip(repository, blobs, disk.chunk(3))
    flip(repository, blobs, disk.chunk(25))
    full = FaultyBlobs(blobs, lambda verb, name: "fail" if verb == "put_new" and name.startswith("damaged/") else "pass")
    found = verify_backup(reopen(full), "vm-1", "bk-1")
    assert (found.damaged_records, others(found), blobs.names("damaged/")) == (2, ["bk-2", "bk-3"], [])


def test_a_flipped_bit_in_a_folder_is_known_of_all_and_forgotten_once_prune_took_the_damaged_copy_away(tmp_path: Path) -> None:
    clock = ManualClock()
    blobs = FolderBlobs(tmp_path)
    create_repository(blobs, KEY, fleet_id=FLEET, project_id="", clock=clock)
    repository = reopen(blobs, clock=clock)
    disk = shared_disk(repository)
    place = place_of(repository, disk.chunk(7))
    pack = tmp_path / place.pack
    content = bytearray(pack.read_bytes())
    content[place.entry.offset + CHUNK // 2] ^= 4
    pack.chmod(0o600)
    pack.write_bytes(content)
    assert others(verify_backup(reopen(blobs, clock=clock), "vm-2", "bk-3")) == ["bk-1", "bk-2"]

    disk.write(30, bytes(CHUNK))
    back_up(reopen(blobs, clock=clock), disk, "bk-5", base_id="bk-2")
    reopen(blobs, clock=clock).forget("vm-1", "bk-1")
    assert others(verify_backup(reopen(blobs, clock=clock), "vm-2", "bk-3")) == []
    prune(reopen(blobs, clock=clock), grace_s=0)
    prune(reopen(blobs, clock=clock), grace_s=0)
    last = verify_backup(reopen(blobs, clock=clock), "vm-2", "bk-3", judges_others=True)
    assert (last.damaged_backups, others(last)) == ([], [])
