"""A repository in a bucket, used by the hosts' agents over their own protocol: every verb, two writers, another key, a server that fails."""

from collections.abc import Iterator
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from tests.operations.backup_kit import (
    accept_backup,
    accept_restore,
    accept_rotation,
    backup_of,
    content_of,
    made_backup,
    ready_repo,
    write_to,
)
from tests.operations.kit import FleetStory
from tests.s3_server import BUCKET, Front, s3_server
from trimtab_agent.backup.repository.bucket import BucketBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.repository import open_repository
from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import BackupRepo, Operation
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backups as backup_service
from trimtab_controller.store import backup_repos, backups
from trimtab_protos.errors import PermissionDenied

CHUNK = 256 * 1024


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def front(server: str) -> Iterator[Front]:
    found = Front(server)
    yield found
    found.close()


@pytest.fixture
def story(matrix_story: FleetStory) -> FleetStory:
    """What is in a bucket is the same whatever the database."""
    return matrix_story


@pytest.fixture
def repo(story: FleetStory, front: Front) -> BackupRepo:
    repo_id = mint("repo")
    return ready_repo(
        story,
        url=f"s3://{BUCKET}/{repo_id}/main",
        repo_id=repo_id,
        endpoint=front.url,
        access_key_id="k",
        wrapped_secret=story.secrets.seal("s", place=repo_id),
        allow_http=True,
    )


def ended(story: FleetStory, operation: Operation) -> Operation:
    story.settle()
    found = story.operation(operation.id)
    assert found.state is OperationState.DONE, found.error
    return found


def objects(repo: BackupRepo, server: str, under: str) -> list[str]:
    store = S3Store(
        BUCKET,
        prefix=repo.url.removeprefix(f"s3://{BUCKET}/"),
        endpoint=server,
        region="us-east-1",
        access_key_id="k",
        secret_access_key="s",
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
    )
    return sorted(meta["path"] for batch in obstore.list(store, under) for meta in batch)


def test_two_hosts_write_to_a_bucket_at_once_and_what_they_wrote_comes_back(
    story: FleetStory, repo: BackupRepo, server: str
) -> None:
    vms = [story.running_vm(name, to_host_id=host_id) for name, host_id in zip(("db", "web"), story.host_ids, strict=False)]
    for vm in vms:
        write_to(story, vm.id, 0, b"same in both" * 30_000)
        write_to(story, vm.id, 3 * CHUNK, vm.id.encode() * 1000)
    began = [accept_backup(story, vm) for vm in vms]
    made = [backup_of(story, ended(story, operation)) for operation in began]
    assert {one.state for one in made} == {"ready"}
    before = [content_of(story, vm.id) for vm in vms]
    write_to(story, vms[0].id, 0, b"later")
    increment = made_backup(story, vms[0])
    assert (increment.base_id, increment.full_reason) == (made[0].id, "")
    elsewhere = [ended(story, accept_restore(story, one, f"{one.vm_name}2", to_host=story.host_ids[2])) for one in made]
    assert [content_of(story, one.subject_id) for one in elsewhere] == before
    assert len(objects(repo, server, "backups")) == 3


def test_what_no_backup_needs_leaves_the_bucket(story: FleetStory, repo: BackupRepo, server: str) -> None:
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, bytes(range(256)) * 4096)
    first = made_backup(story, vm)
    packs = set(objects(repo, server, "packs"))
    write_to(story, vm.id, 0, bytes(1 << 20))
    kept = made_backup(story, vm)

    def forget(session: Any) -> Operation | None:
        return backup_service.delete(session, first.id, project=story.project, actor=story.actor, now=story.clock.now())

    gone = story.db.write(forget)
    assert gone is not None
    ended(story, gone)
    pruned = None
    for _ in range(2):
        story.fleet.clock.advance(8 * 86400)
        story.clock.advance(8 * 86400)
        pruned = ended(story, story.db.write(lambda s: prune(s, story, repo)))
    assert pruned is not None
    assert packs - set(objects(repo, server, "packs")), "a pack of the first backup is gone"
    restored = ended(story, accept_restore(story, kept, "db2"))
    assert content_of(story, restored.subject_id) == content_of(story, vm.id)


def prune(session: Any, story: FleetStory, repo: BackupRepo) -> Operation:
    return repo_service.prune(session, repo.name, is_dry_run=False, actor=story.actor, now=story.clock.now())


def test_another_key_opens_a_bucket_and_the_former_one_does_not(story: FleetStory, repo: BackupRepo, front: Front) -> None:
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, b"before the rotation")
    old = made_backup(story, vm)
    former = story.secrets.open(repo.wrapped_key, place=repo.id)
    rotation, key = accept_rotation(story, repo.name)
    ended(story, rotation)
    assert story.secrets.open(story.db.read(lambda s: backup_repos.get(s, repo.id)).wrapped_key, place=repo.id) == key
    write_to(story, vm.id, CHUNK, b"and after")
    new = made_backup(story, vm)
    assert new.base_id == old.id
    for backup in (old, new):
        ended(story, accept_restore(story, backup, f"again-{backup.id[-4:]}"))
    blobs = BucketBlobs(BUCKET, repo.url.removeprefix(f"s3://{BUCKET}/"), endpoint=front.url, access_key_id="k",
                        secret_access_key="s", allow_http=True)  # fmt: skip
    fleet = {"fleet_id": story.secrets.fleet_id, "clock": story.fleet.clock}
    open_repository(blobs, RepositoryKey.parse(key), **fleet).close()
    with pytest.raises(PermissionDenied):
        open_repository(blobs, RepositoryKey.parse(former), **fleet)


@pytest.mark.parametrize("kind", ["packs", "backups"])
def test_a_server_that_fails_in_the_middle_of_a_backup_costs_a_repetition_and_nothing_else(
    story: FleetStory, repo: BackupRepo, front: Front, server: str, kind: str
) -> None:
    vm = story.running_vm("db")
    write_to(story, vm.id, 0, b"first" * 60_000)
    first = made_backup(story, vm)
    write_to(story, vm.id, CHUNK, b"second" * 60_000)

    def is_meant(method: str, path: str) -> bool:
        return method == "PUT" and f"/{kind}/" in path

    # Every repetition of the request too: the job fails, and is begun again.
    front.refuses = lambda method, path: is_meant(method, path) and len(front.refused) < 6
    second = made_backup(story, vm)
    assert len(front.refused) == 6
    front.loses = lambda method, path: is_meant(method, path) and not front.lost
    write_to(story, vm.id, 2 * CHUNK, b"third" * 60_000)
    third = made_backup(story, vm)
    assert len(front.lost) == 1, "it was written, and nobody was told"
    assert [second.base_id, third.base_id] == [first.id, second.id]
    assert len(objects(repo, server, "backups")) == 3
    restored = ended(story, accept_restore(story, third, "db2"))
    assert content_of(story, restored.subject_id) == content_of(story, vm.id)
    assert story.db.read(lambda session: backups.get(session, third.id)).level == 2
