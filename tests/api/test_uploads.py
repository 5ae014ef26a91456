"""Uploads: streamed, bounded, checked, and never left behind."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.kit import Api, running_api
from trimtab_controller.store import schema

UPLOADS = "/v1/projects/p1/uploads"
CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def files(api: Api) -> list[str]:
    return sorted(path.name for path in api.uploads_dir.iterdir()) if api.uploads_dir.is_dir() else []


async def test_an_upload_is_stored_with_its_checksum_and_can_be_imported(api_on_each: Api) -> None:
    api = api_on_each
    made = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT, headers={"X-Content-SHA256": SHA256.upper()})
    assert made.status_code == 201, made.text
    upload = made.json()
    assert (upload["size_bytes"], upload["sha256"]) == (len(CONTENT), SHA256)
    path = api.uploads_dir / upload["upload_id"]
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600
    body = {"name": "micro", "format": "qcow2", "source": {"upload_id": upload["upload_id"]}, "labels": {"os": "linux"}}
    imported = await api.call("p1-operator", "POST", "/v1/projects/p1/images", json=body)
    assert imported.status_code == 202, imported.text
    assert imported.json()["image"]["state"] == "importing"
    (operation,) = await api.rows(schema.operation, kind="image.import")
    assert operation["params"] == {
        "image_id": imported.json()["image"]["id"],
        "pool_id": api.ids["local"],
        "source": {"upload_id": upload["upload_id"], "size_bytes": len(CONTENT)},
    }
    foreign = await api.call("p2-operator", "POST", "/v1/projects/p2/images", json=body)
    assert (foreign.status_code, foreign.json()["code"]) == (404, "upload-not-found")
    (record,) = await api.rows(schema.audit, verb="upload.create")
    assert record["resource"] == f"projects/p1/uploads/{upload['upload_id']}"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-Content-SHA256": "0" * 64}, 400, "checksum-mismatch"),
        ({"X-Content-SHA256": "short"}, 400, "checksum-wrong"),
        ({"Content-Length": "10"}, 400, "size-mismatch"),
        ({"Content-Length": str(len(CONTENT) + 1)}, 400, "size-mismatch"),
        ({"Content-Length": "-1"}, 411, "length-required"),
        ({"Content-Length": str(1 << 50)}, 413, "body-too-large"),
    ],
)
async def test_a_wrong_upload_leaves_nothing(api: Api, headers: dict[str, str], status: int, code: str) -> None:
    answer = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert files(api) == []
    assert await api.rows(schema.upload) == []


async def test_a_body_without_length_is_refused(api: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT

    answer = await api.call("p1-operator", "POST", UPLOADS, content=chunks())
    assert (answer.status_code, answer.json()["code"]) == (411, "length-required")
    empty = await api.call("p1-operator", "POST", UPLOADS, content=b"")
    assert empty.json()["code"] == "upload-empty"


async def test_a_client_that_hangs_up_leaves_nothing(api: Api) -> None:
    sent: list[Any] = []
    began = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not began.is_set():
            began.set()
            return {"type": "http.request", "body": CONTENT[:2_000_000], "more_body": True}
        async with asyncio.timeout(10):
            while not files(api):
                await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"authorization": f"Bearer {api.secrets['p1-operator']}", "content-length": str(len(CONTENT))}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": UPLOADS,
        "raw_path": UPLOADS.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.9", 1),
        "server": ("trimtab.test", 443),
    }
    await asyncio.wait_for(api.app(scope, receive, send), 20)
    assert files(api) == []
    assert await api.rows(schema.upload) == []


async def test_a_full_spool_says_so_and_takes_uploads_again_later(sqlite_url: str, tmp_path: Path) -> None:
    async with running_api(sqlite_url, tmp_path, spool_max_bytes=4_000_000, upload_ttl_s=100) as api:
        first = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT)
        assert first.status_code == 201
        second = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT)
        assert (second.status_code, second.json()["code"]) == (503, "spool-full")
        assert second.headers["retry-after"]
        assert second.json()["context"]["free_bytes"] == "1000000"
        api.clock.turn(seconds=101)
        late = {"name": "late", "format": "raw", "source": {"upload_id": first.json()["upload_id"]}}
        expired = await api.call("p1-operator", "POST", "/v1/projects/p1/images", json=late)
        assert expired.json()["code"] == "upload-not-found"
        await api.app.state.runtime.spool.sweep()
        assert files(api) == []
        assert await api.rows(schema.upload) == []
        assert (await api.call("p1-operator", "POST", UPLOADS, content=CONTENT)).status_code == 201


async def test_an_expired_upload_that_an_import_reads_is_kept(api: Api) -> None:
    made = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT)
    upload_id = made.json()["upload_id"]
    body = {"name": "micro", "format": "raw", "source": {"upload_id": upload_id}}
    assert (await api.call("p1-operator", "POST", "/v1/projects/p1/images", json=body)).status_code == 202
    api.clock.turn(days=2)
    await api.app.state.runtime.spool.sweep()
    assert files(api) == [upload_id]
    await api.end_operations()
    await api.app.state.runtime.spool.sweep()
    assert files(api) == []


async def test_what_a_dead_process_left_is_swept_in_the_end(api: Api) -> None:
    api.uploads_dir.mkdir()
    for name in ("up-" + "0" * 26, "up-" + "1" * 26 + ".partial"):
        (api.uploads_dir / name).write_bytes(b"x")
    await api.app.state.runtime.spool.sweep()
    assert len(files(api)) == 2
    api.clock.turn(days=3)
    await api.app.state.runtime.spool.sweep()
    assert files(api) == []


async def test_room_is_kept_free_on_the_disk(sqlite_url: str, tmp_path: Path) -> None:
    async with running_api(sqlite_url, tmp_path, spool_keep_free_bytes=1 << 60) as api:
        answer = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT)
        assert (answer.status_code, answer.json()["code"]) == (503, "spool-full")


@pytest.mark.parametrize("query", ["validate_only=true"])
async def test_a_dry_run_and_a_repeat_keep_no_second_copy(api: Api, query: str) -> None:
    dry = await api.call("p1-operator", "POST", f"{UPLOADS}?{query}", content=CONTENT)
    assert dry.status_code == 200
    assert files(api) == []
    headers = {"Idempotency-Key": "0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11"}
    first = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT, headers=headers)
    again = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT, headers=headers)
    assert again.json()["upload_id"] == first.json()["upload_id"]
    other = await api.call("p1-operator", "POST", UPLOADS, content=CONTENT[:-1], headers=headers)
    assert other.json()["code"] == "request-id-reused"
    assert files(api) == [first.json()["upload_id"]]
