"""Backups over the API: a repository is not made before its key came back, no key is ever told again, and refusals say what to do."""

import base64
import hashlib
import json
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.api.kit import Api
from trimtab_controller.store import schema

P1 = "/v1/projects/p1"
REPOS = "/v1/backup-repos"


async def create(api: Api, name: str = "main", **fields: Any) -> dict[str, Any]:
    answer = await api.call("admin", "POST", REPOS, json={"name": name, "url": f"file:///srv/{name}", **fields})
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def ready(api: Api, name: str = "main") -> None:
    """Say that the repository was opened, as its operation does."""
    made = await create(api, name)
    table = schema.backup_repo
    await api.write(lambda session: session.execute(table.update().where(table.c.id == made["repo"]["id"]).values(state="ready")))


async def test_a_repository_is_not_made_before_its_key_came_back(api: Api) -> None:
    made = await create(api)
    assert (made["repo"]["state"], made["operation"]) == ("unconfirmed", None)
    assert made["key"].startswith("ttk1-")
    other = await create(api, "other")
    wrong = await api.call("admin", "POST", f"{REPOS}/main:confirm", json={"key": other["key"]})
    assert (wrong.status_code, wrong.json()["code"]) == (403, "repository-key-wrong")
    other_letter = "c" if made["key"].endswith("b") else "b"
    mistyped = await api.call("admin", "POST", f"{REPOS}/main:confirm", json={"key": made["key"][:-1] + other_letter})
    assert mistyped.json()["code"] == "repository-key-malformed"
    confirmed = await api.call(
        "admin", "POST", f"{REPOS}/main:confirm", json={"key": made["key"].upper().replace("TTK1", "ttk1")}
    )
    assert confirmed.status_code == 202, confirmed.text
    assert confirmed.json()["operation"]["kind"] == "backup_repo.create"
    assert confirmed.json()["repo"]["state"] == "opening"


async def test_a_key_is_shown_once_and_is_in_no_row_and_in_no_other_answer(api: Api) -> None:
    secret = "s3-secret-that-nobody-may-see"
    body = {"name": "main", "url": "s3://bucket/prefix", "access_key_id": "AK", "secret_access_key": secret}
    headers = {"Idempotency-Key": "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"}
    made = (await api.call("admin", "POST", REPOS, json=body, headers=headers)).json()
    letters = made["key"].split("-")[1]
    again = await api.call("admin", "POST", REPOS, json=body, headers=headers)
    shown = await api.call("admin", "GET", f"{REPOS}/main")
    assert (again.json()["repo"]["id"], again.json()["key"]) == (made["repo"]["id"], "")
    rows = []
    for table in schema.metadata.sorted_tables:
        rows += await api.rows(table)
    for text in (again.text, shown.text, json.dumps(rows, default=str)):
        assert letters not in text
        assert secret not in text


async def test_a_key_is_rotated_only_once_the_next_one_came_back(api: Api) -> None:
    await ready(api)
    shown = await api.call("admin", "POST", f"{REPOS}/main:rotate-key")
    assert shown.status_code == 201, shown.text
    first = shown.json()
    assert (first["operation"], first["repo"]["next_key_id"] != "") == (None, True)
    second = (await api.call("admin", "POST", f"{REPOS}/main:rotate-key")).json()
    stale = await api.call("admin", "POST", f"{REPOS}/main:confirm-key", json={"key": first["key"]})
    assert (stale.status_code, stale.json()["code"]) == (403, "repository-key-wrong"), "the one that was shown last counts"
    confirmed = await api.call("admin", "POST", f"{REPOS}/main:confirm-key", json={"key": second["key"]})
    assert confirmed.status_code == 202, confirmed.text
    assert confirmed.json()["operation"]["kind"] == "backup_repo.rotate_key"
    late = await api.call("admin", "POST", f"{REPOS}/main:rotate-key")
    assert (late.status_code, late.json()["code"]) == (409, "key-rotation-running")
    letters = second["key"].split("-")[1]
    rows = [row for table in schema.metadata.sorted_tables for row in await api.rows(table)]
    assert letters not in json.dumps(rows, default=str), "it is sealed wherever it lies"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"url": "http://elsewhere"}, "url"),
        ({"url": "file:///srv/../etc"}, "url"),
        ({"url": "s3://bucket", "host": "node1"}, "host"),
        ({"host": "nowhere"}, "host"),
        ({"key": "ttk1-abc"}, "key"),
    ],
)
async def test_what_is_wrong_with_a_repository_is_named(api: Api, fields: dict[str, str], field: str) -> None:
    answer = await api.call("admin", "POST", REPOS, json={"name": "main", "url": "file:///srv/backup", **fields})
    assert answer.status_code in {400, 404, 422}, answer.text
    assert field in answer.json()["detail"], answer.text


async def test_what_a_bucket_needs_is_kept_with_its_secret_sealed_and_half_of_its_keys_is_refused(api: Api) -> None:
    bucket = {"endpoint": "http://s3.example", "region": "eu", "access_key_id": "AK", "allow_http": True}
    made = await create(api, url="s3://backups/fleet/main", secret_access_key="of-the-bucket", **bucket)
    row = sa.select(schema.backup_repo).where(schema.backup_repo.c.id == made["repo"]["id"])
    kept = await api.write(lambda session: session.execute(row).one())
    assert (kept.kind, kept.url, dict(kept.settings)) == ("bucket", "s3://backups/fleet/main", bucket)
    assert kept.wrapped_secret
    assert "of-the-bucket" not in str(kept)
    for half in ({"access_key_id": "AK"}, {"secret_access_key": "s"}):
        refused = await api.call("admin", "POST", REPOS, json={"name": "other", "url": "s3://other", **half})
        assert (refused.status_code, "given together" in refused.json()["detail"]) == (400, True)


async def test_a_dry_run_of_prune_is_accepted_as_one_and_a_prune_as_none(api: Api) -> None:
    await ready(api)
    for body, is_dry_run in (({"dry_run": True}, True), ({}, False), ({"dry_run": False}, False)):
        accepted = await api.call("admin", "POST", f"{REPOS}/main:prune", json=body)
        assert accepted.status_code == 202, accepted.text
        row = sa.select(schema.operation.c.params).where(schema.operation.c.id == accepted.json()["operation"]["id"])
        assert (await api.write(lambda session, row=row: session.scalar(row)))["is_dry_run"] is is_dry_run
        await api.write(lambda session: session.execute(schema.operation.update().values(state="done", ended_at=api.clock.now())))


async def test_a_schedule_that_cannot_be_parsed_is_refused_with_one_that_can(api: Api) -> None:
    await ready(api)
    body = {"name": "nightly", "schedule": "0 25 * * *", "keep_daily": 7}
    refused = await api.call("p1-operator", "POST", f"{P1}/backup-policies", json=body)
    assert refused.json()["code"] == "schedule-malformed"
    assert "0 2 * * *" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"verify": "boot", "verify_tcp": 70000}, "verify_tcp"),
        ({"verify": "boot", "verify_tcp": "22"}, "verify_tcp"),
        ({"verify": "read", "verify_tcp": 22}, "verify_tcp"),
        ({"verify": "boot", "verify_pattern": "("}, "verify_pattern"),
    ],
)
async def test_what_a_boot_test_cannot_wait_for_is_named(api: Api, fields: dict[str, Any], field: str) -> None:
    await ready(api)
    body = {"name": "proven", "schedule": "0 2 * * *", **fields}
    refused = await api.call("p1-operator", "POST", f"{P1}/backup-policies", json=body)
    assert (refused.status_code, field in refused.json()["detail"]) == (400, True), refused.text


async def test_a_policy_keeps_what_its_boot_tests_wait_for(api: Api) -> None:
    await ready(api)
    body = {"name": "proven", "schedule": "0 2 * * *", "verify": "boot", "verify_tcp": 22, "verify_pattern": "login:"}
    made = await api.call("p1-operator", "POST", f"{P1}/backup-policies", json=body)
    assert (made.status_code, made.json()["verify_tcp"], made.json()["verify_pattern"]) == (201, 22, "login:"), made.text


async def test_a_policy_keeps_what_it_demands_of_its_guests(api: Api) -> None:
    await ready(api)
    for demanded in ("needs_filesystem", "needs_application"):
        body = {"name": demanded.replace("_", "-"), "schedule": "0 2 * * *", demanded: True}
        made = (await api.call("p1-operator", "POST", f"{P1}/backup-policies", json=body)).json()
        assert [one for one in ("needs_filesystem", "needs_application") if made[one]] == [demanded]


async def test_a_policy_is_given_to_a_vm_and_stays_while_it_has_it(api: Api) -> None:
    await ready(api)
    body = {"name": "nightly", "schedule": "0  2 * * *", "keep_daily": 7, "max_age_s": 90000}
    made = await api.call("p1-operator", "POST", f"{P1}/backup-policies", json=body)
    assert (made.status_code, made.json()["schedule"], made.json()["repo"]) == (201, "0 2 * * *", "main"), made.text
    await api.make_vm("web1")
    changed = await api.call("p1-operator", "PATCH", f"{P1}/vms/web1", json={"backup_policy": "nightly"})
    assert changed.json()["backup_policy"] == "nightly", changed.text
    busy = await api.call("p1-operator", "DELETE", f"{P1}/backup-policies/nightly")
    assert (busy.status_code, busy.json()["code"]) == (409, "backup-policy-in-use")
    in_use = await api.call("admin", "DELETE", f"{REPOS}/main")
    assert in_use.json()["code"] == "backup-repo-in-use"
    status = await api.call("p1-viewer", "GET", f"{P1}/backup-status")
    (vm,) = status.json()["items"]
    assert (vm["vm"], vm["policy"], vm["loss_window_s"], vm["problem"]) == ("web1", "nightly", None, "")
    api.clock.turn(days=2)
    (late,) = (await api.call("p1-viewer", "GET", f"{P1}/backup-status")).json()["items"]
    assert "maximum age" in late["problem"]
    await api.call("p1-operator", "PATCH", f"{P1}/vms/web1", json={"backup_policy": ""})
    assert (await api.call("p1-operator", "DELETE", f"{P1}/backup-policies/nightly")).status_code == 204


async def test_a_backup_is_refused_while_its_vm_is_nowhere_or_its_repository_is_not_ready(api: Api) -> None:
    await create(api)
    await api.make_vm("web1")
    missing = await api.call("p1-operator", "POST", f"{P1}/backups", json={"vm": "web1"})
    assert missing.json()["code"] == "repo-missing"
    unconfirmed = await api.call("p1-operator", "POST", f"{P1}/backups", json={"vm": "web1", "repo": "main"})
    assert unconfirmed.json()["code"] == "repository-not-ready"
    assert "repo confirm main" in unconfirmed.json()["detail"]
    await ready(api, "second")
    nowhere = await api.call("p1-operator", "POST", f"{P1}/backups", json={"vm": "web1", "repo": "second"})
    assert nowhere.json()["code"] == "vm-not-placed"


async def test_a_disk_is_read_out_only_by_who_may_and_only_once_that_is_on_record(api: Api) -> None:
    await ready(api)
    vm = await api.make_vm("web1")
    (repo,) = await api.rows(schema.backup_repo)
    now, manifest = api.clock.now(), {"disks": [{"name": "vda", "size_bytes": 4096}]}

    def listed(session: Session) -> None:
        backup = {"id": "bk-01", "project_id": api.ids["p1"], "vm_id": vm["id"], "vm_name": "web1", "repo_id": repo["id"]}
        more = {"state": "ready", "manifest": manifest, "created_at": now, "taken_at": now}
        session.execute(schema.backup.insert().values(**backup, **more))

    await api.write(listed)
    api.consoles.files["vda", "qcow2"] = bytes(range(256)) * 8
    file = f"{P1}/backups/bk-01/file"
    assert (await api.call("p1-viewer", "GET", file)).status_code == 403
    early = await api.call("p1-operator", "GET", file)
    assert (early.status_code, early.json()["code"]) == (409, "backup-not-exported")
    asked = await api.call("p1-operator", "POST", f"{P1}/backups/bk-01:export")
    assert asked.json()["operation"]["kind"] == "backup.export"
    done = schema.operation.update().values(state="done", result={"host_id": "host-1"})
    await api.write(lambda session: session.execute(done))
    got = b""
    while len(got) < 2048:
        piece = (await api.call("p1-operator", "GET", file, params={"disk": "vda", "offset": len(got)})).json()
        content = base64.b64decode(piece["content_base64"])
        assert hashlib.sha256(content).hexdigest() == piece["sha256"]
        got += content
    assert got == api.consoles.files["vda", "qcow2"]
    other = await api.call("p1-operator", "GET", file, params={"disk": "vdb"})
    assert (other.status_code, "it has vda" in other.json()["detail"]) == (404, True)
