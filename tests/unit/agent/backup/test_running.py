"""One backup after the other of a vm that is written, killed, reverted, grown and given disks: the last one is always what it was."""

import random
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.unit.agent.backup.kit import Fault, FaultyBlobs, MemoryBlobs, new_repository, reopen, restore, subject
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

    def request(self, *, backup_id: str = "", **needs: bool) -> BackupRequest:
        self.count += 1
        disks = [DiskToBackUp(name, f"vol-{name}", self.generation[name]) for name in self.vm.disks]
        return BackupRequest(backup_id or f"bk-{self.count:03}", subject(), disks, **needs)

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


def test_a_stopped_vm_is_backed_up_as_it_lies_and_increments_go_on_from_there() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.back_up()
    bed.write(at=CHUNK)
    bed.vm.is_running = False
    stopped = bed.back_up()
    assert (stopped.disks[0].full_reason, stopped.disks[0].read_bytes) == ("", CHUNK)
    assert list(bed.vda.checkpoints) == [stopped.disks[0].checkpoint] == ["tt-bk-002"], "its own, older ones cost the guest"
    bed.vm.is_running = True
    bed.write(at=3 * CHUNK)
    after = bed.back_up()
    assert (after.base_id, after.disks[0].full_reason, after.disks[0].read_bytes) == (stopped.backup_id, "", CHUNK)
    bed.check(after)


def test_the_first_backup_of_a_stopped_vm_is_one_to_build_on() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.vm.is_running = False
    stopped = bed.back_up()
    assert (stopped.disks[0].full_reason, stopped.disks[0].checkpoint) == (FIRST, "tt-bk-001")
    bed.vm.is_running = True
    bed.write(at=CHUNK)
    after = bed.back_up()
    assert (after.disks[0].full_reason, after.disks[0].read_bytes) == ("", CHUNK)
    bed.check(after)


def test_a_damaged_page_of_the_base_costs_reading_and_no_backup() -> None:
    bed = Bed()
    bed.write(at=0)
    bed.write(at=4 * CHUNK)
    first = bed.back_up()
    for id in first.disks[0].pages.values():
        for place in bed.repository.index.places(id):
            bed.blobs.flip_bit(place.pack, place.entry.offset + place.entry.length - 1)
    bed.repository = reopen(bed.blobs, clock=bed.clock)
    bed.write(at=CHUNK)
    bed.check(bed.back_up())
    bed.repository = reopen(bed.blobs, clock=bed.clock)
    bed.write(at=2 * CHUNK)
    bed.check(bed.back_up())


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


def test_applications_are_held_or_that_they_were_not_is_stated_and_may_be_refused() -> None:
    bed = Bed()
    demanding = {"needs_application": True}
    bed.vm.hook_exits = 0
    assert bed.back_up(bed.request(**demanding)).consistency is Consistency.APPLICATION
    bed.vm.hook_exits, bed.vm.hook_says = 4, "the log is full"
    manifest = bed.back_up()
    told = "the guest's hook failed with exit code 4: the log is full"
    assert (manifest.consistency, manifest.notes["downgrade"]) == (Consistency.FILESYSTEM, told)
    assert refusal(bed, **demanding) == ("backup-not-hooked", told)
    bed.vm.hook_exits = None
    assert refusal(bed, **demanding) == ("backup-not-hooked", "the guest has no hook")
    bed.vm.has_guest_agent = False
    assert refusal(bed, **demanding) == ("backup-not-quiesced", "the guest has no agent")
    bed.vm.is_running = False
    assert bed.back_up(bed.request(**demanding)).consistency is Consistency.FILESYSTEM, "nothing in it runs"
    assert len(bed.repository.list_backups().manifests) == 3
    assert bed.vm.hooked == ["freeze", "thaw"] * 3


def refusal(bed: Bed, **needs: bool) -> tuple[str, str]:
    with pytest.raises(Conflict) as refused:
        bed.back_up(bed.request(**needs))
    return refused.value.code, refused.value.message.partition("did not give it: ")[2].partition(";")[0]


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


STEPS = (
    "write", "write", "zero", "backup", "broken-export", "stray", "kill", "die", "abort", "stop", "start", "migrate", "revert", "grow",
    "snapshot", "add", "remove", "forget", "copy-file", "put-back",
)  # fmt: skip


class Died(BaseException):
    """The agent's process ended here: nothing of it runs any more, not even its clean-up."""


class History:
    """Steps in the life of a vm; each backup that a step reports is compared with the disks at once."""

    def __init__(self, seed: int) -> None:
        self.bed = Bed()
        self.bed.dice = random.Random(seed)
        self.compared = 0
        self.copied: dict[tuple[str, int], tuple[bytes, dict[str, set[int]]]] = {}

    def step(self, name: str) -> None:
        bed = self.bed
        disk_name = bed.dice.choice(list(bed.vm.disks))
        disk = bed.vm.disks[disk_name]
        match name:
            case "write" if bed.vm.is_running:
                bed.write(disk_name)
            case "zero" if bed.vm.is_running:
                disk.write(CHUNK, bytes(CHUNK))
            case "backup":
                self.back_up()
            case "broken-export":
                disk.reads_left = bed.dice.randrange(3)
                try:
                    self.back_up()
                except TrimtabError as error:
                    assert error.code == "disk-export-lost"  # noqa: PT017
                disk.reads_left = None
            case "die":
                self.die()
            case "abort":
                self.abort()
            case "stray":
                disk.checkpoints[f"tt-stray-{bed.count}"] = set()
            case "stop":  # in good order: bitmaps are stored with the disk
                bed.vm.is_running = False
            case "start":
                bed.vm.is_running = True
            case "kill":
                bed.vm.lose_checkpoints()
                bed.vm.is_running = bed.dice.random() < 0.5
            case "migrate":  # libvirt's record of checkpoints does not follow
                bed.vm.lose_checkpoints()
            case "revert":
                disk.content[:] = bed.dice.randbytes(len(disk.content))
                bed.generation[disk_name] += 1
            case _:
                self.change_disks(name, disk)

    def change_disks(self, name: str, disk: SimulatedDisk) -> None:
        bed = self.bed
        match name:
            case "grow":
                disk.content.extend(bytes(bed.dice.choice([512, CHUNK, 70_000 // 512 * 512])))
            case "snapshot":  # the guest goes on in a new layer; a layer that is merged carries its bits into the one below
                bed.vm.disks = {each: replace(found, content=bytearray(found.content)) for each, found in bed.vm.disks.items()}
            case "add" if "vdb" not in bed.vm.disks:
                bed.vm.disks["vdb"] = SimulatedDisk(bytearray(2 * CHUNK))
                bed.generation["vdb"] = bed.generation.get("vdb", 0) + 1
            case "remove":
                bed.vm.disks.pop("vdb", None)
            case "copy-file" if not bed.vm.is_running:
                self.copied[self.key_of(disk)] = bytes(disk.content), deepcopy(disk.checkpoints)
            case "put-back" if not bed.vm.is_running and self.key_of(disk) in self.copied:  # behind Trimtab's back
                content, checkpoints = self.copied[self.key_of(disk)]
                disk.content[:] = content
                disk.checkpoints = deepcopy(checkpoints)
            case "forget":
                for manifest in bed.repository.list_backups().manifests[-1:]:
                    bed.repository.forget("vm-1", manifest.backup_id)

    def key_of(self, disk: SimulatedDisk) -> tuple[str, int]:
        """Return a disk's name with the generation of its content, by which a revert or another volume of that name is known."""
        [name] = [name for name, found in self.bed.vm.disks.items() if found is disk]
        return name, self.bed.generation[name]

    def back_up(self) -> None:
        self.bed.check(self.bed.back_up())
        self.compared += 1

    def die(self) -> None:
        """The agent dies at any call of the repository; what it did not list is no backup, what it did list is a whole one."""
        bed = self.bed
        bed.clock.advance(60)
        request = bed.request()
        with suppress(Died):
            dying = reopen(FaultyBlobs(bed.blobs, dies_at(bed.dice.randrange(30))), clock=bed.clock)
            run_backup(dying, bed.host, request, on_progress=lambda _done, _total: None)
        bed.vm.is_busy = False  # libvirt ends the job with its client, or the next agent does
        bed.clock.advance(60)
        bed.repository = reopen(bed.blobs, clock=bed.clock)
        for manifest in bed.repository.list_backups().manifests:
            if manifest.backup_id == request.backup_id:
                bed.check(manifest)
                self.compared += 1

    def abort(self) -> None:
        count = self.bed.dice.randrange(3)

        def cancel(_done: int, _total: int) -> None:
            nonlocal count
            count -= 1
            if count < 0:
                raise Conflict("job-cancelled", "cancelled")

        self.bed.clock.advance(60)
        with suppress(Conflict):
            run_backup(self.bed.repository, self.bed.host, self.bed.request(), on_progress=cancel)


def dies_at(call: int) -> Fault:
    """The process dies at this call, and at every later one."""
    seen = 0

    def fault(_verb: str, _name: str) -> str:
        nonlocal seen
        seen += 1
        if seen > call:
            raise Died
        return "pass"

    return fault


def test_a_disk_that_is_put_back_to_an_earlier_state_while_it_is_off_is_backed_up_as_it_is_then() -> None:
    live(["stop", "copy-file", "start", "write", "stop", "backup", "put-back", "backup", "start", "write"], seed=1)


def live(steps: Sequence[str], seed: int) -> int:
    """Go through the steps, compare at the end too, and return how many backups were compared."""
    history = History(seed)
    for step in ["write", "backup", *steps, "backup"]:
        history.step(step)
    assert reopen(history.bed.blobs).list_backups().unreadable == {}
    return history.compared


@settings(max_examples=20)
@given(st.lists(st.sampled_from(STEPS), min_size=3, max_size=16), st.integers(0, 1000))
def test_after_any_history_the_last_backup_is_the_disk(steps: list[str], seed: int) -> None:
    live(steps, seed)
