"""The process that serves a backup: found by whoever comes later, ended by its socket, and told of nothing that can be read by others."""

from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import KEY, Disk, back_up, new_repository
from tests.unit.agent.waiting import until_now
from trimtab_agent.backup.access import Access, Repositories
from trimtab_agent.backup.export.exports import Exported, Exports, answers
from trimtab_agent.backup.export.process import export_name
from trimtab_agent.backup.nbd import NbdClient
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.sessions import live_leases
from trimtab_agent.clock import SystemClock
from trimtab_protos.errors import Conflict, NotFound, Unavailable

EXPORTED = Exported(repository="repo-1", vm_id="vm-1", backup_id="bk-1", disk="vda")
NAME = export_name("bk-1", "vda")


def exports_of(folder: Path, *, is_granted: bool = True) -> Exports:
    """Return what an agent that was just started has."""
    repositories = Repositories(SystemClock(), holder="host1")
    if is_granted:
        repositories.grant("repo-1", Access(url=f"file://{folder}", key=KEY.text, fleet_id="fleet-1"), create=False)
    return Exports(repositories, holder="host1")


def test_it_outlives_the_agent_that_started_it_and_is_ended_by_another(tmp_path: Path) -> None:
    folder, socket = tmp_path / "repository", tmp_path / "vol.nbd"
    folder.mkdir()
    disk = Disk(8, tail=512)
    for chunk in range(5):
        disk.write(chunk)
    blobs = FolderBlobs(folder)
    back_up(new_repository(blobs), disk, "bk-1")
    exports_of(folder).ensure(EXPORTED, socket, owner=None)
    try:
        assert socket.stat().st_mode & 0o077 == 0, "nobody else may connect"
        assert len(live_leases(blobs)) == 1, "prune waits for it"
        later = exports_of(folder, is_granted=False)
        later.ensure(EXPORTED, socket, owner=None)  # needs no key, since it is served already
        with NbdClient.connect(socket, NAME) as client:
            assert client.read(0, client.size_bytes) == disk.content
        with pytest.raises(NotFound):
            NbdClient.connect(socket, export_name("bk-2", "vda"))
    finally:
        exports_of(folder, is_granted=False).end(socket)
    assert not answers(socket, NAME)
    assert not socket.exists()
    until_now(lambda: not live_leases(blobs), what="its lease to end")


def test_what_keeps_it_from_starting_is_told(tmp_path: Path) -> None:
    folder, socket = tmp_path / "repository", tmp_path / "vol.nbd"
    folder.mkdir()
    back_up(new_repository(FolderBlobs(folder)), Disk(2), "bk-1")
    with pytest.raises(Unavailable, match="no key of the repository"):
        exports_of(folder, is_granted=False).ensure(EXPORTED, socket, owner=None)
    absent = Exported(repository="repo-1", vm_id="vm-1", backup_id="bk-9", disk="vda")
    with pytest.raises((NotFound, Conflict)):
        exports_of(folder).ensure(absent, socket, owner=None)
    assert not socket.exists()
