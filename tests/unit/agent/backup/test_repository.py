"""The repository: what comes back is what was put in, and whoever may not read it reads nothing."""

import json
import os
import resource
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.agent.backup import independent_reader
from tests.unit.agent.backup.kit import CHUNK, FLEET, KEY, Disk, MemoryBlobs, back_up, new_repository, reopen, restore, subject
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.rebuild import rebuild_index
from trimtab_agent.backup.repository.repository import CONFIG, create_repository, open_repository
from trimtab_agent.backup.repository.rotation import rotate
from trimtab_agent.backup.repository.verify import verify_all, verify_backup
from trimtab_agent.backup.repository.writer import begin_backup
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NoCapacity, NotFound, PermissionDenied


def test_a_backup_restores_byte_identical_and_an_increment_stores_only_the_change() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = Disk(3000, tail=1234)
    for chunk in (0, 1, 5, 1023, 1024, 2047, 2999, 3000):
        disk.write(chunk)
    first = bytes(disk.content)
    back_up(repository, disk, "bk-1")
    disk.write(5)
    disk.write(1, bytes(CHUNK))  # becomes a hole
    stored_before = sum(len(blob) for name, blob in blobs.blobs.items() if name.startswith("packs/"))

    second = back_up(repository, disk, "bk-2", base_id="bk-1")

    assert restore(repository, "bk-1") == first
    assert restore(repository, "bk-2") == bytes(disk.content)
    added = sum(len(blob) for name, blob in blobs.blobs.items() if name.startswith("packs/")) - stored_before
    assert added < CHUNK + 1024 * 32 + 1000, "one chunk, one page"
    assert second.disks[0].read_bytes == 2 * CHUNK


def test_vms_of_one_repository_share_chunks() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    template = Disk(64, seed=1)
    for chunk in range(64):
        template.write(chunk)
    back_up(repository, template, "bk-1", vm="vm-1")
    size = sum(map(len, blobs.blobs.values()))

    back_up(repository, template, "bk-2", vm="vm-2")

    assert sum(map(len, blobs.blobs.values())) - size < CHUNK
    assert restore(repository, "bk-2", vm="vm-2") == bytes(template.content)


def test_nothing_readable_is_stored(tmp_path: Path) -> None:
    disk = Disk(4)
    disk.write(0, b"the secret of the guest " * 200)
    blobs = MemoryBlobs()
    back_up(new_repository(blobs), disk, "bk-1", files={"domain.xml": b"<domain>secret</domain>"})
    everything = b"".join(blobs.blobs.values())
    assert b"secret" not in everything
    assert b"domain.xml" not in everything
    assert KEY.secret not in everything
    assert KEY.secret.hex().encode() not in everything


def test_another_process_finds_all_with_the_key_alone() -> None:
    blobs = MemoryBlobs()
    disk = Disk(10)
    disk.write(3)
    back_up(new_repository(blobs), disk, "bk-1", files={"domain.xml": b"<domain/>", "nvram": bytes(600_000)})

    stranger = open_repository(blobs, RepositoryKey.parse(KEY.text), fleet_id=None, clock=ManualClock())

    [manifest] = stranger.list_backups().manifests
    assert (manifest.backup_id, manifest.subject.vm_name, manifest.consistency) == ("bk-1", "name of vm-1", Consistency.CRASH)
    assert restore(stranger, "bk-1") == bytes(disk.content)
    with open_backup(stranger, "vm-1", "bk-1") as reader:
        assert reader.attachment("domain.xml") == b"<domain/>"
        assert reader.attachment("nvram") == bytes(600_000)
    assert blobs.names("sessions/") == [], "a reader of another fleet writes nothing"


def test_a_wrong_key_is_refused_and_says_which_is_wanted() -> None:
    blobs = MemoryBlobs()
    new_repository(blobs)
    other = RepositoryKey.new()
    with pytest.raises(PermissionDenied) as refused:
        reopen(blobs, key=other)
    assert refused.value.code == "repository-key-wrong"
    assert KEY.id in refused.value.message
    assert other.id in refused.value.message


def test_a_mistyped_key_is_told_from_a_wrong_one() -> None:
    text = KEY.text
    assert RepositoryKey.parse(text.upper().replace("-", " ").replace("TTK1 ", "ttk1-")) == KEY
    with pytest.raises(InvalidRequest, match="mistyped"):
        RepositoryKey.parse(text[:-1] + ("b" if text[-1] != "b" else "c"))
    with pytest.raises(InvalidRequest, match="letters of 56"):
        RepositoryKey.parse(text[:-3])


def test_another_fleet_may_read_and_not_write() -> None:
    blobs = MemoryBlobs()
    new_repository(blobs)
    with pytest.raises(PermissionDenied) as refused:
        reopen(blobs, fleet="fleet-2")
    assert refused.value.code == "repository-of-another-fleet"
    with pytest.raises(PermissionDenied):
        begin_backup(reopen(blobs, fleet=None), subject(), "bk-1")


def test_a_repository_of_a_project_refuses_the_vms_of_others() -> None:
    repository = new_repository(MemoryBlobs(), project="project-1")
    with pytest.raises(PermissionDenied) as refused:
        begin_backup(repository, subject(project="project-2"), "bk-1")
    assert refused.value.code == "repository-of-another-project"


def test_a_place_is_made_a_repository_once_and_a_creation_that_broke_off_can_be_repeated() -> None:
    blobs = MemoryBlobs()
    with pytest.raises(NotFound, match="trimtab backup repo create"):
        reopen(blobs)
    create_repository(blobs, KEY, fleet_id=FLEET, project_id="", clock=ManualClock())
    with pytest.raises(AlreadyExists):
        create_repository(blobs, KEY, fleet_id=FLEET, project_id="", clock=ManualClock())
    for name in blobs.names("keys/"):
        blobs.delete(name)
    create_repository(blobs, KEY, fleet_id=FLEET, project_id="", clock=ManualClock())
    reopen(blobs)


def test_a_config_that_was_edited_is_refused() -> None:
    blobs = MemoryBlobs()
    new_repository(blobs)
    document = json.loads(blobs.blobs[CONFIG])
    blobs.blobs[CONFIG] = json.dumps({**document, "fleet_id": "fleet-2"}).encode()
    with pytest.raises(Conflict, match="has changed since the repository was created"):
        reopen(blobs, fleet="fleet-2")


def test_keys_rotate_and_old_backups_stay_readable() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = Disk(4)
    disk.write(0)
    first = bytes(disk.content)
    back_up(repository, disk, "bk-1")
    opened_before = reopen(blobs)

    new_key = RepositoryKey.new()
    assert rotate(blobs, repository.config.repository_id, old=KEY, new=new_key).data_key_version == 2
    disk.write(1)
    back_up(reopen(blobs, key=new_key), disk, "bk-2", base_id="bk-1")

    assert restore(reopen(blobs, key=new_key), "bk-1") == first
    assert restore(reopen(blobs, key=new_key), "bk-2") == bytes(disk.content)
    with pytest.raises(PermissionDenied):
        reopen(blobs)
    with pytest.raises(PermissionDenied):
        opened_before.refresh()


def test_one_damaged_copy_of_the_keyring_locks_nobody_out() -> None:
    blobs = MemoryBlobs()
    new_repository(blobs)
    first, second = blobs.names("keys/")
    blobs.blobs[first] = b"{"
    reopen(blobs)
    blobs.blobs[second] = blobs.blobs[second].replace(b'"sealed": "', b'"sealed": "00')
    with pytest.raises(Conflict, match="no copy of generation 1"):
        reopen(blobs)


def test_every_single_flipped_bit_is_found_and_the_next_increment_repairs_it() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = Disk(40)
    for chunk in range(40):
        disk.write(chunk)
    back_up(repository, disk, "bk-1")
    back_up(repository, disk, "bk-2", base_id="bk-1")
    [chunks_pack] = [name for name in blobs.names("packs/") if len(blobs.blobs[name]) > 20 * CHUNK]
    blobs.flip_bit(chunks_pack, 17 * CHUNK)

    report = verify_all(repository)
    assert report.damaged_records == 1
    assert {health.backup_id for health in report.damaged_backups} == {"bk-1", "bk-2"}
    with pytest.raises(Conflict) as refused:
        restore(repository, "bk-1")
    assert refused.value.code == "chunk-damaged"

    repaired = back_up(reopen(blobs), disk, "bk-3", base_id="bk-2")

    assert repaired.disks[0].read_bytes == CHUNK
    fresh = reopen(blobs)
    assert verify_all(fresh).damaged_backups == []
    for backup_id in ("bk-1", "bk-2", "bk-3"):
        assert restore(fresh, backup_id) == bytes(disk.content)


def test_a_damaged_page_or_a_lost_pack_is_found_and_repaired() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    disk = Disk(40)
    for chunk in range(40):
        disk.write(chunk)
    back_up(repository, disk, "bk-1")
    for name in blobs.names("packs/"):
        blobs.delete(name)
    report = verify_backup(reopen(blobs), "vm-1", "bk-1")
    assert [health.damaged_disks for health in report.backups] == [["vda"]]
    assert [health.backup_id for health in verify_all(reopen(blobs)).damaged_backups] == ["bk-1"]

    back_up(reopen(blobs), disk, "bk-2", base_id="bk-1")

    fresh = reopen(blobs)
    assert restore(fresh, "bk-2") == bytes(disk.content)
    assert restore(fresh, "bk-1") == bytes(disk.content), "the same chunks have the same ids"


def test_the_index_is_rebuilt_from_the_packs_alone() -> None:
    blobs = MemoryBlobs()
    disk = Disk(40)
    disk.write(7)
    back_up(new_repository(blobs), disk, "bk-1")
    [index] = blobs.names("index/")
    blobs.flip_bit(index, 300)
    repository = reopen(blobs)
    with pytest.raises(Conflict, match="repo rebuild"):
        restore(repository, "bk-1")

    assert rebuild_index(repository) == {}

    assert restore(reopen(blobs), "bk-1") == bytes(disk.content)
    assert index not in blobs.names("index/")
    for name in blobs.names("index/"):
        blobs.delete(name)
    reader_of_another_fleet = reopen(blobs, fleet=None)
    rebuild_index(reader_of_another_fleet)
    assert restore(reader_of_another_fleet, "bk-1") == bytes(disk.content)
    assert blobs.names("index/") == []


def test_a_manifest_put_in_anothers_place_is_refused() -> None:
    blobs = MemoryBlobs()
    repository = new_repository(blobs)
    back_up(repository, Disk(4), "bk-1")
    blobs.blobs["backups/vm-2/bk-1"] = blobs.blobs["backups/vm-1/bk-1"]
    listing = repository.list_backups()
    assert [manifest.subject.vm_id for manifest in listing.manifests] == ["vm-1"]
    assert list(listing.unreadable) == ["backups/vm-2/bk-1"]


def test_a_disk_that_grew_is_backed_up_from_its_base_and_one_that_shrank_is_refused() -> None:
    repository = new_repository(MemoryBlobs())
    disk = Disk(4, tail=100)
    for chunk in range(5):
        disk.write(chunk)
    back_up(repository, disk, "bk-1")
    disk.content.extend(bytes(3 * CHUNK))
    back_up(repository, disk, "bk-2", base_id="bk-1")
    assert restore(repository, "bk-2") == bytes(disk.content)
    del disk.content[2 * CHUNK :]
    with pytest.raises(Conflict) as refused:
        back_up(repository, disk, "bk-3", base_id="bk-2")
    assert refused.value.code == "base-does-not-fit"


def test_random_reads_return_what_the_disk_had() -> None:
    repository = new_repository(MemoryBlobs())
    disk = Disk(30, tail=77, seed=3)
    for chunk in range(0, 31, 2):
        disk.write(chunk)
    back_up(repository, disk, "bk-1")
    with open_backup(repository, "vm-1", "bk-1") as reader:
        opened = reader.disk("vda")
        for _ in range(200):
            offset = disk.random.randrange(len(disk.content))
            length = disk.random.randrange(len(disk.content) - offset + 1)
            assert opened.read(offset, length) == disk.content[offset : offset + length]
        for chunk in range(disk.chunk_count):
            assert opened.is_content(chunk, disk.chunk(chunk))
            assert not opened.is_content(chunk, disk.chunk(chunk - 1)), "neighbours differ: every other one is a hole"
        assert [opened.first_content(first, 31) for first in (0, 1, 30)] == [0, 2, 30]
        assert opened.first_content(29, 30) is None
        with pytest.raises(ValueError, match="outside of a disk"):
            opened.read(len(disk.content), 1)


def held_open_below(folder: Path) -> list[str]:
    """Return the files in the folder that this process has open."""
    links = (Path(link) for link in os.listdir("/proc/self/fd"))
    targets = [os.readlink(f"/proc/self/fd/{link}") for link in links if os.path.islink(f"/proc/self/fd/{link}")]
    return [target for target in targets if target.startswith(str(folder))]


def test_a_repository_that_is_closed_holds_no_pack_open(tmp_path: Path) -> None:
    """One that another host prunes would keep its room for as long."""
    disk = Disk(30, tail=77)
    disk.write(3)
    with closing(new_repository(FolderBlobs(tmp_path))) as repository:
        back_up(repository, disk, "bk-1")
        assert restore(repository, "bk-1") == bytes(disk.content)
        assert held_open_below(tmp_path / "packs") != []
    assert held_open_below(tmp_path) == []


def test_a_folder_keeps_the_promises_of_a_store(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    disk = Disk(30, tail=77)
    for chunk in range(31):
        disk.write(chunk)
    repository = new_repository(blobs)
    back_up(repository, disk, "bk-1")
    assert restore(reopen(FolderBlobs(tmp_path)), "bk-1") == bytes(disk.content)
    assert list((tmp_path / ".aside").iterdir()) == []
    assert blobs.list("sessions/") == []
    blobs.put_new("packs/x", [b"a", b"bc"])
    with pytest.raises(AlreadyExists):
        blobs.put_new("packs/x", [b"other"])
    assert blobs.get_range("packs/x", 1, 10) == b"bc"
    blobs.delete("packs/x")
    with pytest.raises(NotFound):
        blobs.get_range("packs/x", 0, 1)
    with pytest.raises(ValueError, match="not a name"):
        blobs.get("../etc/passwd")


def test_a_full_target_is_said_and_leaves_what_was_listed(tmp_path: Path) -> None:
    repository = new_repository(FolderBlobs(tmp_path))
    disk = Disk(400)
    disk.write(0)
    before = bytes(disk.content)
    back_up(repository, disk, "bk-1")
    for chunk in range(400):
        disk.write(chunk)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # the kernel's own refusal, as from a full disk
    try:
        with pytest.raises(NoCapacity) as refused:
            back_up(repository, disk, "bk-2", base_id="bk-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == "repository-full"
    assert "trimtab backup prune" in refused.value.message
    assert restore(repository, "bk-1") == before
    back_up(repository, disk, "bk-3", base_id="bk-1")
    assert restore(repository, "bk-3") == bytes(disk.content)


def test_the_document_alone_suffices_to_write_a_reader(tmp_path: Path) -> None:
    """The reader imports nothing of ours; what it needs to know stands in docs/backup-format.md."""
    source = Path(independent_reader.__file__).read_text()
    assert "trimtab_agent" not in source
    repository = new_repository(FolderBlobs(tmp_path))
    disk = Disk(1500, tail=50, seed=5)
    for chunk in range(0, 1501, 4):
        disk.write(chunk, b"compressible" * 400 if chunk % 8 else None)
    first = bytes(disk.content)
    back_up(repository, disk, "bk-1", files={"domain.xml": b"<domain/>"})
    new_key = RepositoryKey.new()
    rotate(repository.blobs, repository.config.repository_id, old=KEY, new=new_key)
    disk.write(1)
    back_up(reopen(repository.blobs, key=new_key), disk, "bk-2", base_id="bk-1")
    shutil.rmtree(tmp_path / "index")

    reader = independent_reader.IndependentReader(tmp_path, new_key.text)

    old, new = reader.backups()
    assert (old["backup_id"], new["base_id"], old["subject"]["fleet_id"]) == ("bk-1", "bk-1", FLEET)
    assert reader.disk(old, "vda") == first
    assert reader.disk(new, "vda") == bytes(disk.content)
    assert reader.attachment(old, "domain.xml") == b"<domain/>"
