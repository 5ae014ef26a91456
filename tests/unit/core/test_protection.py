"""What a vm would lose now, and whether its policy allows that; what may run beside its backup."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from trimtab_controller.core.background import BESIDE_BACKUP, Beside, beside_backup
from trimtab_controller.core.model import Backup
from trimtab_controller.core.protection import judge
from trimtab_controller.operations.registry import all_sagas

NOW = datetime(2026, 1, 10, tzinfo=UTC)


def backup(hours_ago: float, **fields: Any) -> Backup:
    given: dict[str, Any] = {
        "id": f"bk-{hours_ago}",
        "state": "ready",
        "level": 0,
        "verified_at": None,
        "booted_at": None,
        "held_until": None,
        "deleted_at": None,
        "taken_at": NOW - timedelta(hours=hours_ago),
        "created_at": NOW,
        "manifest": {},
    }
    texts = ("project_id", "repo_id", "vm_id", "vm_name", "consistency", "base_id", "full_reason", "downgrade", "problem")
    numbers = ("size_bytes", "dirty_bytes", "read_bytes", "stored_bytes", "recovery_ms")
    return Backup(**{**dict.fromkeys(texts, ""), **dict.fromkeys(numbers, 0), **given, **fields})


def problem(*backups: Backup, max_age_h: int = 24, has_policy: bool = True, asked_h: float | None = 48) -> str:
    asked_at = NOW - timedelta(hours=asked_h) if asked_h is not None else None
    return judge(backups, max_age_s=max_age_h * 3600, has_policy=has_policy, asked_at=asked_at, now=NOW).problem


def test_the_loss_window_counts_from_the_newest_whole_backup() -> None:
    found = judge(
        [backup(30, level=1, verified_at=NOW), backup(10, level=3, booted_at=NOW), backup(20), backup(1, state="damaged")],
        max_age_s=0,
        has_policy=True,
        asked_at=None,
        now=NOW,
    )
    assert (found.loss_window_s, found.widest_gap_s) == (10 * 3600, 10 * 3600)
    assert [one.id for one in (found.last_good, found.last_verified, found.last_booted) if one] == ["bk-10"] * 3


@pytest.mark.parametrize(
    ("told", "seen"),
    [
        (problem(backup(1)), ""),
        (problem(backup(30)), "at most 1 day"),
        (problem(backup(30), max_age_h=0), ""),
        (problem(), "no backup yet"),
        (problem(asked_h=1), ""),
        (problem(asked_h=None), ""),
        (problem(backup(1, state="damaged")), "every backup of it is damaged"),
        (problem(has_policy=False), "no policy and no backup"),
        (problem(backup(1, taken_at=None, state="running")), "no backup yet"),
    ],
)
def test_what_is_wrong_is_said(told: str, seen: str) -> None:
    assert seen in told
    assert bool(told) == bool(seen)


def test_the_table_names_only_operations_that_there_are_and_refuses_what_it_does_not_name() -> None:
    assert BESIDE_BACKUP.keys() <= all_sagas().keys()
    assert beside_backup("something.new") is Beside.REFUSED


def test_the_published_table_says_what_the_code_does() -> None:
    document = (Path(__file__).parents[3] / "docs/backups.md").read_text()
    rows = re.findall(r"^\| (.+) \| (both go on|whichever comes second is refused|end the backup)", document, re.MULTILINE)
    verdicts = {"both go on": Beside.RUNS, "whichever comes second is refused": Beside.REFUSED, "end the backup": Beside.ENDS}
    published = {verb: verdicts[verdict] for verbs, verdict in rows for verb in verbs.split(", ")}
    assert published.pop("snapshots") is published.pop("another backup") is Beside.REFUSED, (
        "refused since the code does not name them"
    )
    coded = {kind.removeprefix("vm.").replace(".", " ").replace("_", "-"): beside for kind, beside in BESIDE_BACKUP.items()}
    assert published == coded
