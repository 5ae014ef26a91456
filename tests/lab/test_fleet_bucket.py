"""Backups of a real guest in a bucket, asked for by the CLI and by a policy's schedule; brought back from the bucket and its key alone."""

from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.s3_server import BUCKET, s3_server

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

URL = f"s3://{BUCKET}/fleets/one"
SCHEDULE_S = 240.0
"""Two minutes of the schedule, and what the backups take."""


def listed(fleet: Fleet) -> list[dict[str, Any]]:
    """Return the backups, the oldest first."""
    found: list[dict[str, Any]] = fleet.ok("backup", "list", "-o", "json").json()
    return sorted(found, key=lambda one: str(one["created_at"]))


def test_a_policy_backs_a_guest_up_each_minute_into_a_bucket_and_it_comes_back_from_there(fleet: Fleet, tmp_path: Path) -> None:
    key_file, secret_file = tmp_path / "bucket.key", tmp_path / "secret"
    secret_file.write_text("wJalrXUtnFEMI/K7MDENG\n")
    with s3_server(fleet.lab.spec.machine_address) as endpoint:
        where = ("--url", URL, "--endpoint", endpoint, "--allow-http", "--region", "us-east-1", "--key-file", str(key_file))
        login = ("--access-key-id", "AKIATEST", "--secret-file", str(secret_file))
        fleet.ok("backup", "repo", "create", "bucket", *where, *login)
        fleet.create("minutely", pool="local")
        fleet.wait_for_ticks("minutely", 2)
        rules = ("--schedule", "* * * * *", "--repo", "bucket", "--verify", "read", "--keep-last", "10", "--max-age", "10m")
        fleet.ok("backup", "policy", "create", "each-minute", *rules)
        fleet.ok("vm", "update", "minutely", "--backup-policy", "each-minute")

        def verified() -> list[dict[str, Any]]:
            return [one for one in listed(fleet) if one["state"] == "ready" and one["level"] == "L1"]

        wait_until(lambda: len(verified()) >= 2, "two backups by the schedule", patience_s=SCHEDULE_S)
        fleet.ok("vm", "update", "minutely", "--backup-policy", "")
        fleet.ok("backup", "policy", "delete", "each-minute", "--yes")
        wait_until(
            lambda: all(one["state"] == "ready" and one["level"] == "L1" for one in listed(fleet)), "the last to be verified"
        )
        first, *_, last = listed(fleet)
        assert (first["base_id"], first["full_reason"]) == ("", "vda: first backup")
        assert last["base_id"], last
        assert last["read_bytes"] < first["read_bytes"], (first, last)
        assert "minutely" in fleet.ok("backup", "status").out
        would_go = fleet.ok("backup", "prune", "--repo", "bucket", "--dry-run", "-o", "json").json()
        assert len(listed(fleet)) >= 2, f"a dry run removes nothing: {would_go}"

        counted, _ = fleet.ticks("minutely")
        fleet.delete("minutely")
        fleet.ok("backup", "repo", "delete", "bucket", "--yes")
        assert listed(fleet) == []
        fleet.ok("backup", "repo", "create", "found", *where, *login, "--existing")
        fleet.ok("backup", "repo", "rebuild", "found")
        assert [one["id"] for one in listed(fleet)][-1] == last["id"]
        fleet.ok("backup", "restore", last["id"], "--as", "again")
        back, _ = fleet.wait_for_ticks("again", 1)
        assert 1 < back <= counted + 30, (back, counted)
        assert secret_file.read_text().strip() not in fleet.sh(
            fleet.vm("again")["host"], "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        )
        fleet.delete("again")
        fleet.ok("backup", "repo", "delete", "found", "--yes")
