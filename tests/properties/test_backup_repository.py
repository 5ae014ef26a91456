"""Any sequence of writes, backups, deaths, prunes, flipped bits and writers side by side: a listed backup restores byte-identical.

The store dies at any call, before or after doing it, as a host does; other hosts go on. With a flipped bit a restore may say that
the backup is damaged; it never returns other bytes.
"""

import random
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests.unit.agent.backup.kit import (
    Disk,
    Fault,
    FaultyBlobs,
    MemoryBlobs,
    back_up,
    new_repository,
    put_disk,
    reopen,
    restore,
    subject,
)
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobStore
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_agent.backup.repository.writer import BackupWriter, begin_backup
from trimtab_protos.errors import TrimtabError

CHUNKS = 1100  # two pages
CONTENTS = [bytes(4096), *(random.Random(seed).randbytes(4096) for seed in range(4))]
VMS = ("vm-1", "vm-2")
STEPS = ("write", "backup", "death", "begin", "commit", "forget", "prune", "prune-death", "flip", "verify", "hour")


class Died(BaseException):
    """The process ended here: nothing of it runs any more, not even its clean-up."""


class World:
    def __init__(self) -> None:
        self.blobs = MemoryBlobs()
        self.clock = ManualClock()
        new_repository(self.blobs, clock=self.clock)
        self.disks = {vm: Disk(CHUNKS, tail=10, seed=7) for vm in VMS}  # one seed: they share content
        self.last: dict[str, str] = {}
        self.content: dict[str, bytes] = {}
        self.forgotten: set[str] = set()
        self.open: dict[str, tuple[BackupWriter, Disk, str, set[int]]] = {}
        self.count = 0
        self.is_flipped = False

    def step(self, name: str, number: int) -> None:
        vm = VMS[number % 2]
        disk = self.disks[vm]
        match name:
            case "write":
                # Few places and few contents: what one backup drops, the next one or the other vm finds again.
                disk.write(number // 2 % 8 * 150, CONTENTS[number // 16 % len(CONTENTS)])
            case "backup" if vm not in self.open:
                self.back_up(vm, self.blobs)
            case "death" if vm not in self.open:
                with suppress(Died):
                    self.back_up(vm, FaultyBlobs(self.blobs, dies_at(number % 25)))
            case "begin" if vm not in self.open:
                self.begin(vm)
            case "commit" if vm in self.open:
                self.commit(vm)
            case "forget":
                self.forget(number)
            case "prune":
                self.prune(self.blobs)
            case "prune-death":
                with suppress(Died):
                    self.prune(FaultyBlobs(self.blobs, dies_at(number % 40)))
            case "flip":
                self.flip(number)
            case "verify":
                verify_all(reopen(self.blobs, clock=self.clock))
            case "hour":
                self.clock.advance(1900)

    def back_up(self, vm: str, blobs: BlobStore) -> None:
        backup_id = self.new_id(vm)
        repository = reopen(blobs, clock=self.clock)
        base = self.last.get(vm)
        try:
            back_up(repository, self.disks[vm], backup_id, base_id=base, vm=vm)
        except TrimtabError as error:
            if not errors.is_damage(error) and error.code not in {"backup-not-found"}:
                raise
            back_up(repository, self.disks[vm], self.new_id(vm), vm=vm)
        self.last[vm] = max(self.content)

    def begin(self, vm: str) -> None:
        disk = self.disks[vm]
        backup_id = self.new_id(vm)
        base = self.last.get(vm)
        repository = reopen(self.blobs, clock=self.clock)
        try:
            writer = begin_backup(repository, subject(vm), backup_id, base_id=base)
        except TrimtabError as error:
            self.expect_damage(error)
            return
        try:
            put_disk(writer, disk)
        except TrimtabError as error:
            self.expect_damage(error)
            writer.abort()
            return
        dirty, disk.dirty = disk.dirty, set()
        self.open[vm] = (writer, disk, backup_id, dirty)

    def expect_damage(self, error: TrimtabError) -> None:
        """The base is damaged, which is said; nothing begins."""
        if not self.is_flipped or not errors.is_damage(error):
            raise error

    def commit(self, vm: str) -> None:
        writer, disk, backup_id, dirty = self.open.pop(vm)
        with writer:
            [opened] = writer._disks
            try:
                writer.commit([writer.finish(opened)], created_ms=self.clock.now_ms(), consistency=Consistency.CRASH)
            except TrimtabError as error:
                if error.code != "backup-session-revoked":
                    raise
                disk.dirty |= dirty
                return
        self.last[vm] = backup_id

    def forget(self, number: int) -> None:
        repository = reopen(self.blobs, clock=self.clock)
        listed = [m for m in repository.list_backups().manifests if m.backup_id not in self.last.values()]
        if listed:
            victim = listed[number % len(listed)]
            repository.forget(victim.subject.vm_id, victim.backup_id)
            self.forgotten.add(victim.backup_id)

    def forget_all_but(self, backup_id: str) -> None:
        repository = reopen(self.blobs, clock=self.clock)
        for manifest in repository.list_backups().manifests:
            if manifest.backup_id != backup_id:
                repository.forget(manifest.subject.vm_id, manifest.backup_id)
                self.forgotten.add(manifest.backup_id)
                self.last = {vm: last for vm, last in self.last.items() if last != manifest.backup_id}

    def prune(self, blobs: BlobStore) -> None:
        try:
            prune(reopen(blobs, clock=self.clock), grace_s=0)
        except TrimtabError as error:
            allowed = {"prune-is-running"}  # by one that died
            if self.is_flipped:
                allowed |= {"repository-index-damaged", "repository-manifest-damaged", "chunk-damaged", "repository-damaged"}
            if error.code not in allowed:
                raise

    def flip(self, number: int) -> None:
        packs = self.blobs.names("packs/")
        if packs:
            self.blobs.flip_bit(packs[number % len(packs)], number * 7919)
            self.is_flipped = True

    def new_id(self, vm: str) -> str:
        self.count += 1
        backup_id = f"bk-{self.count:04}"
        self.content[backup_id] = bytes(self.disks[vm].content)
        return backup_id

    def check(self) -> None:
        repository = reopen(self.blobs, clock=self.clock)
        listing = repository.list_backups()
        assert listing.unreadable == {}
        listed = {manifest.backup_id for manifest in listing.manifests}
        assert set(self.last.values()) <= listed
        assert not listed & self.forgotten
        for manifest in listing.manifests:
            try:
                restored = restore(repository, manifest.backup_id, vm=manifest.subject.vm_id)
            except TrimtabError as error:
                if not self.is_flipped or not errors.is_damage(error):
                    raise
                continue
            assert restored == self.content[manifest.backup_id], manifest.backup_id


def dies_at(call: int) -> Fault:
    """The process dies at this call, before or after it, and at every later one."""
    seen = 0

    def fault(verb: str, name: str) -> str:
        nonlocal seen
        seen += 1
        if seen > call:
            raise Died
        return "pass"

    return fault


def play(steps: list[tuple[str, int]]) -> World:
    world = World()
    for name, number in steps:
        world.step(name, number)
    return world


def finish(world: World) -> None:
    world.check()
    for vm in list(world.open):
        world.commit(vm)
    world.check()
    if not world.is_flipped:
        world.clock.advance(4000)  # what died is silent now
        for _ in range(2):
            prune(reopen(world.blobs, clock=world.clock), grace_s=0)
        world.check()
        assert world.blobs.names("condemned/") == []
        assert world.blobs.names("sessions/") == []


NUMBERS = st.integers(0, 159)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(st.tuples(st.sampled_from(STEPS), NUMBERS), min_size=5, max_size=30))
def test_every_listed_backup_restores_byte_identical(steps: list[tuple[str, int]]) -> None:
    finish(play(steps))


@pytest.mark.parametrize("seed", range(24))
def test_a_long_life_without_bad_bits_loses_nothing(seed: int) -> None:
    """Weighted towards what is hard: forgetting and pruning beside writers that are still open."""
    dice = random.Random(seed)
    names = (
        ["write"] * 6 + ["backup"] * 3 + ["begin"] * 2 + ["commit", "forget", "forget", "prune", "prune", "death", "prune-death"]
    )
    names += ["hour"] if seed % 3 == 0 else []
    finish(play([(dice.choice(names), dice.randrange(160)) for _ in range(70)]))


X, Y = 16, 32  # two contents of the first chunk of vm-1; one more is the same for vm-2


def test_prune_waits_for_a_writer_that_relies_on_what_was_forgotten() -> None:
    """A writer finds a chunk that only an old backup has; the old backup is forgotten and pruned before the writer commits."""
    world = play([("write", X), ("backup", 0), ("write", Y), ("backup", 0), ("write", X), ("begin", 0), ("forget", 0)])
    for _ in range(3):
        world.step("prune", 0)
    world.commit("vm-1")
    world.check()
    for _ in range(2):
        world.step("prune", 0)  # marks again: what was condemned is needed now
    world.check()


def test_a_writer_that_knows_of_a_condemnation_relies_on_none_of_it() -> None:
    world = play([("write", X), ("backup", 0), ("write", Y), ("backup", 0), ("forget", 0), ("prune", 0), ("write", X)])
    world.begin("vm-1")
    world.step("prune", 0)
    world.commit("vm-1")
    world.check()


def test_a_base_whose_packs_are_about_to_go_is_not_taken_on_trust() -> None:
    """The base relies on a condemned pack, since its writer had not seen the condemnation, and is forgotten while it is the base."""
    world = play([("write", X), ("backup", 0), ("write", Y), ("backup", 0), ("write", X + 1), ("begin", 1), ("forget", 0)])
    world.step("prune", 0)
    world.commit("vm-2")
    assert world.blobs.names("condemned/")
    world.begin("vm-2")
    world.forget_all_but(world.last["vm-1"])
    world.step("prune", 0)
    world.commit("vm-2")
    world.check()


def test_a_writer_that_prune_took_for_dead_lists_nothing() -> None:
    world = play(
        [("write", 16), ("backup", 0), ("write", 32), ("begin", 0), ("hour", 0), ("hour", 0), ("prune", 0), ("prune", 0)]
    )
    world.commit("vm-1")
    world.check()
    assert world.last["vm-1"] == "bk-0001"
    world.back_up("vm-1", world.blobs)
    world.check()


def test_what_no_backup_needs_is_removed_and_nothing_else() -> None:
    world = World()
    for _ in range(20):
        world.disks["vm-1"].write(3)  # new bytes in one place
        world.step("backup", 0)
    size = sum(map(len, world.blobs.blobs.values()))
    for number in range(30):
        world.step("forget", number)
    for _ in range(3):
        world.step("prune", 0)
    world.check()
    remaining = sum(map(len, world.blobs.blobs.values()))
    assert remaining < size / 2
    repository = reopen(world.blobs, clock=world.clock)
    assert prune(repository, is_dry_run=True).condemned_packs == 0
    assert verify_all(repository).damaged_backups == []
