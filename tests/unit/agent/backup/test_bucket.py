"""The repository in a bucket, against an S3 server on loopback."""

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from socket import create_server

import pytest

from tests.unit.agent.backup.kit import Disk, back_up, new_repository, reopen, restore
from tests.unit.agent.manual_clock import ManualClock
from tests.unit.agent.waiting import until_now
from trimtab_agent.backup.repository.bucket import BucketBlobs
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_protos.errors import AlreadyExists, NotFound, Unavailable

SERVER = "from moto.server import main; import sys; main(sys.argv[1:])"


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        assert server.poll() is None, "the S3 server ended"
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/backups", method="PUT"), timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    try:
        until_now(answers, what="the S3 server", deadline_s=60)
        yield url
    finally:
        server.terminate()
        server.wait(20)


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
