"""What is done about a post-copy whose connection broke, by what QEMU says of it."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import libvirt
import pytest

from trimtab_agent.hypervisor.kvm import migration, monitor
from trimtab_agent.hypervisor.kvm.torn_migration import STANDS_STILL_AFTER_S, Step, TornMigration
from trimtab_protos.messages import JobProgress, MigrationOptions

ACTIVE, PAUSED = "postcopy-active", "postcopy-paused"


def test_memory_that_moves_is_left_alone_for_as_long_as_it_takes() -> None:
    torn = TornMigration(moved_s=100.0)
    for second in range(100, 400, 2):
        assert torn.look(ACTIVE, second, float(second)) is Step.LET_GO_ON
    assert torn.moved_s == 398.0


def test_a_connection_that_stands_still_is_ended_and_begun_anew() -> None:
    torn = TornMigration(moved_s=100.0)
    steps = [torn.look(ACTIVE, 5, 100.0), torn.look(ACTIVE, 5, 104.0), torn.look(ACTIVE, 5, 100.1 + STANDS_STILL_AFTER_S)]
    assert steps == [Step.LET_GO_ON, Step.LET_GO_ON, Step.END_HERE]
    assert torn.look(PAUSED, 5, 110.0) is Step.RESUME
    assert torn.moved_s == 100.0, "nothing moved: the time until memory is given up goes on"


@pytest.mark.parametrize("status", ["postcopy-recover-setup", "failed", PAUSED])
def test_what_qemu_has_ended_is_resumed(status: str) -> None:
    assert TornMigration(moved_s=0.0).look(status, 0, 1.0) is Step.RESUME


def test_what_qemu_has_completed_waits_for_libvirt_and_is_over_once_the_guest_left() -> None:
    torn = TornMigration(moved_s=0.0)
    assert torn.look("completed", 9, 1.0) is Step.LET_GO_ON
    assert torn.look("", 0, 2.0) is Step.IS_OVER


class TornDomain:
    """A source whose QEMU waits for a connection, while libvirt waits for a target that answers nobody."""

    def state(self) -> list[int]:
        return [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED]

    def isActive(self) -> int:
        return 1

    def jobStats(self, _flags: int) -> dict[str, Any]:
        return {}


class Watcher:
    cancelled = threading.Event()

    def report(self, progress: JobProgress) -> None:
        pass


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU says that it waits for a connection, and whoever waits for memory is soon tired of it."""
    answer = json.dumps({"return": {"status": PAUSED, "ram": {"transferred": 7}}})
    way = SimpleNamespace(qemuMonitorCommand=lambda *_asked: answer, VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT=0)
    monkeypatch.setattr(monitor, "libvirt_qemu", way)
    monkeypatch.setattr(migration, "REPORT_EVERY_S", 0.01)
    monkeypatch.setattr(migration, "RESUME_FOR_S", 0.05)


def follow(move: migration._Move) -> bool:
    return migration._follow(TornDomain(), move, MigrationOptions(), Watcher())


@pytest.mark.usefixtures("hurried")
def test_a_migration_that_libvirt_never_ends_is_given_up_once_nothing_moved_for_long() -> None:
    move = migration._Move()
    assert (follow(move), move.ended.is_set()) == (False, False)


@pytest.mark.usefixtures("hurried")
def test_one_that_was_begun_anew_and_hangs_again_is_given_up_too() -> None:
    broken, resumed = migration._Move(error=libvirt.libvirtError("broke")), migration._Move()
    broken.ended.set()

    def again() -> migration._Move:
        follow(resumed)
        return resumed

    found = migration._resume(TornDomain(), broken, again, vm_id="vm-1", libvirt_uri="qemu+tcp://127.0.0.1:1/system")
    assert (found is resumed, found.ended.is_set()) == (True, False)


@pytest.mark.usefixtures("hurried")
def test_a_target_that_refuses_for_longer_than_all_the_time_there_is_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libvirt holds the first migration for half a minute, and refuses the next once more (seen with 9.0 on a loaded host)."""
    monkeypatch.setattr(migration, "RESUME_EVERY_S", 0.0)
    monkeypatch.setattr(migration, "end_connection_there", lambda *_asked: threading.Event().wait(0.1))
    broken, refused, goes_on = (migration._Move(error=libvirt.libvirtError(why)) for why in ("broke", "refused", "goes on"))
    goes_on.error = None
    for move in (broken, refused, goes_on):
        move.ended.set()
    answers = iter([refused, refused, goes_on])
    found = migration._resume(
        TornDomain(), broken, lambda: next(answers), vm_id="vm-1", libvirt_uri="qemu+tcp://127.0.0.1:1/system"
    )
    assert found is goes_on


@pytest.mark.usefixtures("hurried")
def test_memory_is_given_up_after_some_tries_once_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "RESUME_EVERY_S", 0.0)
    monkeypatch.setattr(migration, "RESUME_FOR_S", 0.0)
    broken, tries = migration._Move(error=libvirt.libvirtError("broke")), 0
    broken.ended.set()

    def again() -> migration._Move:
        nonlocal tries
        tries += 1
        return broken

    assert migration._resume(TornDomain(), broken, again, vm_id="vm-1", libvirt_uri="qemu+tcp://127.0.0.1:1/system") is broken
    assert tries == migration.TRIES_AT_LEAST
