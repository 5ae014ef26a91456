"""Which vms come back from a backup by themselves once their disks are lost, and why others do not."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from trimtab_controller.core.lost_disks import AFTER, Lost, judge

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
LOST = Lost(
    vm_name="db",
    proof="power_off",
    fenced_at=NOW - AFTER,
    is_wanted=True,
    has_policy=True,
    is_all_local=True,
    has_snapshots=False,
    backup_id="bk-1",
    backup_at=NOW - timedelta(hours=1),
    disks_match=True,
)


def test_what_is_lost_and_backed_up_comes_back_when_its_host_had_its_time() -> None:
    assert judge(LOST, now=NOW).is_due
    assert not judge(LOST, now=NOW - timedelta(seconds=1)).is_due


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"has_policy": False}, ""),
        ({"proof": "lease"}, "nothing proves"),
        ({"is_all_local": False}, "only some of its disks"),
        ({"has_snapshots": True}, "snapshots or clones"),
        ({"backup_id": ""}, "no whole backup"),
        ({"is_all_files": False}, "trimtab backup restore bk-1 --as NAME"),
        ({"disks_match": False}, "other disks than backup bk-1"),
    ],
)
def test_what_does_not_come_back_says_why(changed: dict[str, object], why: str) -> None:
    answer = judge(replace(LOST, **changed), now=NOW)  # type: ignore[arg-type]
    assert (answer.is_due, why in answer.why) == (False, True), answer
