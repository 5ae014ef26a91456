"""What is done about a post-copy whose connection broke, by what QEMU says of it."""

import pytest

from trimtab_agent.hypervisor.kvm.torn_migration import STANDS_STILL_AFTER_S, Step, TornMigration

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
