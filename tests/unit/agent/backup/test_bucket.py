"""The repository in a bucket, against an S3 server on loopback."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.s3_server import free_port, s3_server
from tests.unit.agent.backup.kit import FLEET, KEY, Disk, back_up, new_repository, reopen, restore
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.access import Access, blobs_of
from trimtab_agent.backup.repository.bucket import BucketBlobs
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_protos.errors import AlreadyExists, NotFound, Unavailable


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


def bucket(endpoint: str, prefix: str) -> BucketBlobs:
    return BucketBlobs("backups", prefix, endpoint=endpoint, access_key_id="k", secret_access_key="s", allow_http=True)


def test_a_bucket_keeps_the_promises_of_a_store(endpoint: str) -> None:
    blobs = bucket(endpoint, "promises")
    blobs.put_new("packs/x", [b"a", b"bc"])
    with pytest.raises(AlreadyExists):
        blobs.put_new("packs/x", [b"other"])
    assert blobs.get("packs/x") == b"abc"
    assert blobs.get_range("packs/x", 1, 1) == b"b"
    blobs.put("sessions/s", b"1")
    blobs.put("sessions/s", b"22")
    assert [(entry.name, entry.size_bytes) for entry in blobs.list("sessions/")] == [("sessions/s", 2)]
    assert [entry.name for entry in blobs.list("pack/")] == []
    blobs.delete("packs/x")
    blobs.delete("packs/x")
    with pytest.raises(NotFound):
        blobs.get("packs/x")
    with pytest.raises(NotFound):
        blobs.get_range("packs/x", 0, 1)


def test_backups_live_in_a_bucket(endpoint: str) -> None:
    blobs, clock = bucket(endpoint, "fleet/main"), ManualClock()
    repository = new_repository(blobs, clock=clock)
    disk = Disk(200, tail=9)
    for chunk in range(0, 200, 3):
        disk.write(chunk)
    back_up(repository, disk, "bk-1", files={"domain.xml": b"<domain/>"})
    disk.write(0)
    back_up(repository, disk, "bk-2", base_id="bk-1")
    repository.forget("vm-1", "bk-1")
    for _ in range(2):
        prune(repository, grace_s=0)

    fresh = reopen(bucket(endpoint, "fleet/main"), clock=clock)

    assert verify_all(fresh).damaged_backups == []
    assert restore(fresh, "bk-2") == bytes(disk.content)
    assert bucket(endpoint, "").list("sessions/") == [], "a prefix keeps repositories apart"


def test_a_bucket_needs_no_endpoint_where_it_is_one_of_aws_and_no_keys_where_the_host_has_some() -> None:
    access = Access(url="s3://backups/fleet", key=KEY.text, fleet_id=FLEET, access_key_id="k", secret_access_key="s")
    for one in (access, replace(access, access_key_id="", secret_access_key="")):
        assert blobs_of(one).where == "s3://backups/fleet"


def test_a_server_that_is_down_is_said() -> None:
    blobs = BucketBlobs(
        "backups",
        endpoint=f"http://127.0.0.1:{free_port()}",
        access_key_id="k",
        secret_access_key="s",
        allow_http=True,
        retries=0,
    )
    with pytest.raises(Unavailable) as down:
        blobs.get("config.json")
    assert down.value.code == "repository-unreachable"
