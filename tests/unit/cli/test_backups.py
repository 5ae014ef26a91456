"""What the command says of backups: who is protected how well, and what a prune took or would take."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, operation, page

STATUS = "/v1/projects/default/backup-status"
PRUNE = "/v1/backup-repos/main:prune"
KEY = "ttk1-" + "a" * 58
COUNTED = {"removed_bytes": 0, "condemned_bytes": 3 << 20, "kept_bytes": 5 << 30}


def ago(**time: float) -> str:
    return (datetime.now(UTC) - timedelta(**time)).isoformat()


def protection(name: str, **fields: object) -> dict[str, object]:
    nothing = dict.fromkeys(("last_good_at", "last_verified_at", "last_booted_at", "loss_window_s", "widest_gap_s", "next_at"))
    told = dict.fromkeys(("policy", "last_good", "last_verified", "last_booted", "problem"), "")
    return {"vm": name, "vm_id": f"vm-{name}", "recovery_ms": 0, **nothing, **told, **fields}


def test_status_says_what_would_be_lost_what_was_proven_and_what_is_wrong(trimtab: Trimtab, controller: FakeController) -> None:
    db = protection(
        "db",
        policy="nightly",
        last_good="bk-3",
        last_good_at=ago(hours=5, minutes=2),
        last_verified="bk-2",
        last_verified_at=ago(days=2),
        last_booted="bk-1",
        last_booted_at=ago(days=3),
        loss_window_s=5 * 3600 + 120,
    )
    bare = protection("bare", problem="no policy and no backup")
    controller.on("GET", STATUS, page(db, token="t1"), page(bare))
    found = trimtab("backup", "status")
    assert (found.code, found.err) == (0, "")
    head, first, second = (line.split("  ") for line in found.out.splitlines())
    assert said(head) == ["VM", "POLICY", "WOULD LOSE", "LAST GOOD", "VERIFIED", "BOOTED", "PROBLEM"]
    assert said(first) == ["db", "nightly", "5h 2m", "5h ago", "2d ago", "3d ago"]
    assert said(second) == ["bare", "everything", "no policy and no backup"]


def said(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells if cell.strip()]


@pytest.mark.parametrize(
    ("options", "counted", "sentence"),
    [
        (["--dry-run"], COUNTED, "dry run: 3 MiB would be condemned, 0 B removed, 5 GiB kept"),
        ([], COUNTED, "0 B removed, 3 MiB go with a later prune, 5 GiB kept"),
        ([], {**COUNTED, "removed_bytes": 1 << 20}, "1 MiB removed, 3 MiB go with a later prune, 5 GiB kept"),
    ],
)
def test_prune_says_what_it_took_and_a_dry_run_what_it_would(
    trimtab: Trimtab, controller: FakeController, options: list[str], counted: dict[str, int], sentence: str
) -> None:
    controller.on("POST", PRUNE, Answer({"operation": operation("queued")}, status=202))
    controller.on("GET", "/v1/operations/op-01:wait", Answer(operation("done", result=counted)))
    found = trimtab("backup", "prune", "--repo", "main", "--wait", *options)
    assert (found.code, found.out) == (0, sentence + "\n")
    assert controller.asked("POST", PRUNE)[0].document == ({"dry_run": True} if options else {})


def test_a_bucket_is_made_a_repository_once_its_key_came_back(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path
) -> None:
    secret, key_file = tmp_path / "secret", tmp_path / "main.key"
    secret.write_text("of the bucket\n")
    controller.on("POST", "/v1/backup-repos", Answer({"repo": {"name": "main"}, "key": KEY, "operation": None}, status=201))
    controller.on("POST", "/v1/backup-repos/main:confirm", Answer({"operation": operation("queued")}, status=202))
    line = "backup repo create main --url s3://backups/fleet/main --endpoint http://s3.example --region eu --access-key-id AK --allow-http"
    found = trimtab(*line.split(), "--secret-file", str(secret), "--key-file", str(key_file), "--no-wait")
    assert found.code == 0, found.err
    assert controller.asked("POST", "/v1/backup-repos")[0].document == {
        "name": "main",
        "url": "s3://backups/fleet/main",
        "endpoint": "http://s3.example",
        "region": "eu",
        "access_key_id": "AK",
        "secret_access_key": "of the bucket",
        "allow_http": True,
    }
    assert controller.asked("POST", "/v1/backup-repos/main:confirm")[0].document == {"key": KEY}
    assert KEY in key_file.read_text()
    assert KEY not in found.out + found.err


def test_prune_takes_the_only_repository_and_asks_which_of_several(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/backup-repos", page({"name": "main"}), page({"name": "main"}, {"name": "other"}))
    controller.on("POST", PRUNE, Answer({"operation": operation("queued")}, status=202))
    assert trimtab("backup", "prune", "--dry-run", "--no-wait").code == 0
    refused = trimtab("backup", "prune", "--dry-run", "--no-wait")
    assert (refused.code, "--repo NAME" in refused.err) == (2, True)
    assert len(controller.asked("POST", PRUNE)) == 1


def test_a_policy_is_listed_with_what_it_demands_of_a_guest(trimtab: Trimtab, controller: FakeController) -> None:
    demanding = [
        {"name": "plain"},
        {"name": "quiet", "needs_filesystem": True},
        {"name": "strict", "needs_filesystem": True, "needs_application": True},
    ]
    controller.on("GET", "/v1/projects/default/backup-policies", page(*demanding))
    rows = trimtab("backup", "policy", "list", "-o", "wide").out.splitlines()
    assert "DEMANDS" in rows[0]
    shown = [row[rows[0].index("DEMANDS") :].split("  ")[0].strip() for row in rows[1:]]
    assert shown == ["", "filesystem", "application"]
