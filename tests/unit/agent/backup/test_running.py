"""One backup after the other of a vm that is written, killed, reverted, grown and given disks: the last one is always what it was."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests.unit.agent.backup.kit import MemoryBlobs, new_repository, reopen, restore, subject
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository.manifests import Consistency, Manifest
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.running import FIRST, BackupRequest, DiskToBackUp, checkpoint_name, run_backup
from trimtab_agent.hypervisor.simulated_backups import SimulatedBackups, SimulatedDisk, SimulatedVm
from trimtab_protos.errors import Conflict, TrimtabError

CHUNK = 256 * 1024
SIZE = 6 * CHUNK + 512


class Bed:
    """A vm with one disk, its host and a repository."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.blobs = MemoryBlobs()
        self.repository = new_repository(self.blobs, clock=self.clock)
        self.host = SimulatedBackups(self.clock)
        self.vm = SimulatedVm({"vda": SimulatedDisk(bytearray(SIZE))})
        self.host.vms["vm-1"] = self.vm
        self.generation = {"vda": 1}
        self.count = 0
        self.dice = random.Random(4)

    @property
    def vda(self) -> SimulatedDisk:
        return self.vm.disks["vda"]

    def request(self, *, backup_id: str = "", needs_filesystem: bool = False) -> BackupRequest:
        self.count += 1
        disks = [DiskToBackUp(name, f"vol-{name}", self.generation[name]) for name in self.vm.disks]
        return BackupRequest(backup_id or f"bk-{self.count:03}", subject(), disks, needs_filesystem=needs_filesystem)

    def back_up(self, request: BackupRequest | None = None) -> Manifest:
        self.clock.advance(60)
        return run_backup(self.repository, self.host, request or self.request(), on_progress=lambda _done, _total: None)

    def write(self, name: str = "vda", at: int | None = None, length: int = 5000) -> None:
        disk = self.vm.disks[name]
        offset = self.dice.randrange(len(disk.content) - length) if at is None else at
        disk.write(offset, self.dice.randbytes(length))

    def check(self, manifest: Manifest) -> None:
        for name, disk in self.vm.disks.items():
            assert restore(self.repository, manifest.backup_id, name=name) == bytes(disk.content), name


def test_the_first_is_full_and_the_next_reads_what_changed() -> None:
    bed = Bed()
    bed.write(at=0)
    first = bed.back_up()
    assert (first.disks[0].full_reason, first.disks[0].read_bytes) == (FIRST, CHUNK)
    bed.write(at=3 * CHUNK)
    second = bed.back_up()
    assert (second.disks[0].full_reason, second.disks[0].read_bytes, second.base_id) == ("", CHUNK, "bk-001")
    bed.check(second)
    assert list(bed.vda.checkpoints) == [checkpoint_name("bk-002")], "older checkpoints cost the guest"


def test_a_backup_that_broke_off_is_made_up_for_by_the_next() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.back_up()
    bed.write(at=CHUNK)
    bed.write(at=2 * CHUNK)
    bed.vda.reads_left = 1
    with pytest.raises(TrimtabError) as lost:
        bed.back_up()
    assert lost.value.code == "disk-export-lost"
    bed.vda.reads_left = None
    bed.write(at=4 * CHUNK)
    third = bed.back_up()
    assert third.base_id == "bk-001"
    assert third.disks[0].read_bytes == 3 * CHUNK
    bed.check(third)


def test_an_increment_begins_at_the_last_listed_backup_not_at_the_newest_checkpoint() -> None:
    """An agent that was killed could not drop the checkpoint of the backup that it never listed."""
    bed = Bed()
    bed.write(at=0)
    bed.back_up()
    bed.write(at=CHUNK)
    bed.vda.checkpoints["tt-bk-killed"] = set()
    bed.write(at=2 * CHUNK)
    manifest = bed.back_up()
    assert manifest.disks[0].read_bytes == 2 * CHUNK
    bed.check(manifest)


def test_a_stopped_vm_is_backed_up_as_it_lies_and_increments_go_on_from_the_older_checkpoint() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.back_up()
    bed.write(at=CHUNK)
    bed.vm.is_running = False
    stopped = bed.back_up()
    assert (stopped.disks[0].full_reason, stopped.disks[0].read_bytes) == ("", CHUNK)
    assert list(bed.vda.checkpoints) == [stopped.disks[0].checkpoint] == ["tt-bk-001"], "nothing was marked, nothing dropped"
    bed.vm.is_running = True
    bed.write(at=3 * CHUNK)
    after = bed.back_up()
    assert (after.base_id, after.disks[0].full_reason, after.disks[0].read_bytes) == (stopped.backup_id, "", 2 * CHUNK)
    bed.check(after)


def test_a_stopped_vm_without_a_checkpoint_leaves_none_to_build_on_and_the_next_says_so() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.vm.is_running = False
    stopped = bed.back_up()
    assert (stopped.disks[0].full_reason, stopped.disks[0].checkpoint) == (FIRST, "")
    bed.vm.is_running = True
    bed.write(at=CHUNK)
    after = bed.back_up()
    assert "left no checkpoint" in after.disks[0].full_reason
    bed.check(after)


def test_a_repeat_of_a_listed_backup_returns_it() -> None:
    bed = Bed()
    request = bed.request()
    first = bed.back_up(request)
    bed.write()
    assert bed.back_up(request) == first


@pytest.mark.parametrize("what", ["killed", "reverted", "replaced", "shrunk"])
def test_what_forbids_an_increment_makes_it_full_with_its_reason(what: str) -> None:
    bed = Bed()
    bed.write()
    bed.back_up()
    reason = {
        "killed": "does not know the checkpoint",
        "reverted": "reverted or restored",
        "replaced": "another volume",
        "shrunk": "became smaller",
    }[what]
    request = bed.request()
    match what:
        case "killed":
            bed.vm.lose_checkpoints()
        case "reverted":
            request = BackupRequest("bk-9", subject(), [DiskToBackUp("vda", "vol-vda", 2)])
        case "replaced":
            request = BackupRequest("bk-9", subject(), [DiskToBackUp("vda", "vol-other", 1)])
        case "shrunk":
            del bed.vda.content[2 * CHUNK :]
    manifest = bed.back_up(request)
    assert reason in manifest.disks[0].full_reason
    bed.check(manifest)


def test_a_disk_that_was_added_is_read_in_full_and_the_others_are_not() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.back_up()
    bed.vm.disks["vdb"], bed.generation["vdb"] = SimulatedDisk(bytearray(3 * CHUNK)), 1
    bed.write("vdb", at=0)
    manifest = bed.back_up()
    assert [disk.full_reason for disk in manifest.disks] == ["", "the disk was added after bk-001"]
    bed.check(manifest)
    del bed.vm.disks["vda"]
    bed.check(bed.back_up())


def test_a_disk_that_grew_stays_incremental() -> None:
    bed = Bed()
    bed.write(at=SIZE - 5000)
    bed.back_up()
    bed.vda.content.extend(bytes(2 * CHUNK))
    manifest = bed.back_up()
    assert manifest.disks[0].full_reason == ""
    bed.check(manifest)


def test_the_downgrade_is_stated_and_may_be_refused() -> None:
    bed = Bed()
    assert bed.back_up().consistency is Consistency.FILESYSTEM
    bed.vm.has_guest_agent = False
    manifest = bed.back_up()
    assert (manifest.consistency, manifest.notes["downgrade"]) == (Consistency.CRASH, "the guest has no agent")
    with pytest.raises(Conflict) as refused:
        bed.back_up(bed.request(needs_filesystem=True))
    assert refused.value.code == "backup-not-quiesced"
    assert "qemu-guest-agent" in refused.value.message
    assert len(bed.repository.list_backups().manifests) == 2


def test_a_cancel_lists_nothing_and_leaves_no_checkpoint() -> None:
    bed = Bed()
    bed.write()

    def cancel(_done: int, _total: int) -> None:
        raise Conflict("job-cancelled", "cancelled")

    with pytest.raises(Conflict):
        run_backup(bed.repository, bed.host, bed.request(), on_progress=cancel)
    assert bed.repository.list_backups().manifests == []
    assert bed.vda.checkpoints == {}
    assert bed.blobs.names("sessions/") == []


def test_the_definition_of_the_vm_is_part_of_it() -> None:
    bed = Bed()
    bed.back_up()
    with open_backup(bed.repository, "vm-1", "bk-001") as reader:
        assert reader.attachment("domain.xml") == b"<domain/>"


STEPS = ("write", "zero", "backup", "fail", "stray", "kill", "revert", "grow", "add", "remove", "forget")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(STEPS), min_size=3, max_size=16), st.integers(0, 1000))
def test_after_any_history_the_last_backup_is_the_disk(steps: list[str], seed: int) -> None:
    bed = Bed()
    bed.dice = random.Random(seed)
    for step in ["write", "backup", *steps, "backup"]:
        name = bed.dice.choice(list(bed.vm.disks))
        disk = bed.vm.disks[name]
        match step:
            case "write":
                bed.write(name)
            case "zero":
                disk.write(CHUNK, bytes(CHUNK))
            case "backup":
                bed.check(bed.back_up())
            case "fail":
                disk.reads_left = bed.dice.randrange(3)
                try:
                    bed.check(bed.back_up())
                except TrimtabError as error:
                    assert error.code == "disk-export-lost"  # noqa: PT017
                disk.reads_left = None
            case "stray":
                disk.checkpoints[f"tt-stray-{bed.count}"] = set()
            case "kill":
                bed.vm.lose_checkpoints()
            case "revert":
                disk.content[:] = bed.dice.randbytes(len(disk.content))
                bed.generation[name] += 1
            case "grow":
                disk.content.extend(bytes(bed.dice.choice([512, CHUNK, 70_000 // 512 * 512])))
            case "add" if "vdb" not in bed.vm.disks:
                bed.vm.disks["vdb"] = SimulatedDisk(bytearray(2 * CHUNK))
                bed.generation["vdb"] = bed.generation.get("vdb", 0) + 1
            case "remove":
                bed.vm.disks.pop("vdb", None)
            case "forget":
                for manifest in bed.repository.list_backups().manifests[-1:]:
                    bed.repository.forget("vm-1", manifest.backup_id)
    assert reopen(bed.blobs).list_backups().unreadable == {}
