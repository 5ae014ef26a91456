"""When the copy of a migration's disk is given up: only one that has bytes left and does not move."""

import pytest

from trimtab_agent.hypervisor.kvm.stuck_copy import STANDS_STILL_AFTER_S, DiskCopy

LATE_S = STANDS_STILL_AFTER_S + 1


def looked_at(*seen: tuple[float, int, int]) -> bool:
    """Return the last answer of a copy that was seen so: (at, bytes done, bytes left)."""
    copy, answers = DiskCopy(moved_s=0.0), list[bool]()
    for now_s, done, left in seen:
        answers.append(copy.stands_still({"disk_processed": done, "disk_remaining": left}, now_s))
    assert not any(answers[:-1])
    return answers[-1]


def test_a_copy_that_does_not_move_is_given_up_after_its_time() -> None:
    assert not looked_at((1, 5, 9), (STANDS_STILL_AFTER_S, 5, 9))
    assert looked_at((1, 5, 9), (2 + STANDS_STILL_AFTER_S, 5, 9))


def test_one_that_moves_however_slowly_is_left_alone() -> None:
    assert not looked_at((1, 5, 9), (LATE_S, 6, 8), (LATE_S + STANDS_STILL_AFTER_S, 6, 8))


def test_disks_that_are_there_while_memory_is_on_its_way_are_left_alone() -> None:
    assert not looked_at((1, 14, 0), (10 * LATE_S, 14, 0))
    assert not looked_at((1, 14, 0), (10 * LATE_S, 14, 0), (10 * LATE_S + 1, 14, 3))
    assert looked_at((1, 14, 0), (10 * LATE_S, 14, 0), (11 * LATE_S + 1, 14, 3))


@pytest.mark.parametrize("statistics", [{}, {"memory_processed": 5}])
def test_a_migration_without_a_disk_has_nothing_to_give_up(statistics: dict[str, int]) -> None:
    copy = DiskCopy(moved_s=0.0)
    assert not copy.stands_still(statistics, 10 * LATE_S)
