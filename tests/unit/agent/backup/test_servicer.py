"""Backups through the agent's own service: real gRPC, journal and jobs over simulated disks."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tests.unit.agent.backup.kit import KEY
from tests.unit.agent.factories import LOCAL, command_key, volume_spec
from tests.unit.agent.waiting import until
from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.simulated import SimulatedHost
from trimtab_agent.hypervisor.simulated_backups import SimulatedBackups, SimulatedDisk, SimulatedVm
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_protos import status
from trimtab_protos.agent.v1 import agent_service_pb2, command_pb2, storage_pb2
from trimtab_protos.agent.v1 import backup_service_pb2 as pb
from trimtab_protos.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from trimtab_protos.agent.v1.backup_service_pb2_grpc import BackupServiceStub
from trimtab_protos.codec import to_proto
from trimtab_protos.errors import Conflict, InvalidRequest, PermissionDenied, Unavailable

SIZE = 700_000
SUCCEEDED, FAILED = command_pb2.JOB_STATE_SUCCEEDED, command_pb2.JOB_STATE_FAILED


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fleet = SimulatedFleet()
        self.resources = SharedResources()
        self.backups = SimulatedBackups(self.fleet.clock)
        self.disk = SimulatedDisk(bytearray(SIZE))
        self.disk.write(1000, b"what the guest knows" * 50)
        self.backups.vms["vm-1"] = SimulatedVm({"vda": self.disk})
        self.agent: Agent | None = None
        self.count = 0

    async def start(self) -> None:
        listen = f"unix:{self.directory}/agent.sock"
        self.agent = await start_simulated_agent(
            self.fleet,
            SimulatedHost(host_id="host-1"),
            resources=self.resources,
            credentials=None,
            listen_address=listen,
            backups=self.backups,
        )
        agent = self.agent
        await until(lambda: agent.replay.is_rebuilt, what="the journal's rebuild")
        self.channel = grpc.aio.insecure_channel(listen)

    async def stop(self) -> None:
        assert self.agent is not None
        await self.channel.close()
        await stop_simulated_agent(self.agent)

    async def call(self, verb: str, request: Any) -> Any:
        stub = (
            AgentServiceStub(self.channel) if hasattr(AgentServiceStub(self.channel), verb) else BackupServiceStub(self.channel)
        )
        try:
            return await getattr(stub, verb)(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, peer="agent") from error

    def key(self, subject_id: str = "vm-1") -> command_pb2.CommandKey:
        self.count += 1
        return to_proto(command_key(operation_id=f"op-{self.count}", subject_id=subject_id), command_pb2.CommandKey)

    async def open(self, **access: Any) -> pb.OpenRepositoryResponse:
        wanted = {"url": f"file://{self.directory}/repository", "key": KEY.text, "fleet_id": "fleet-1", **access}
        request = pb.OpenRepositoryRequest(
            key=self.key("repo-1"), name="repo-1", access=pb.RepositoryAccess(**wanted), create=True
        )
        response: pb.OpenRepositoryResponse = await self.call("OpenRepository", request)
        return response

    async def run(self, verb: str, request: Any) -> agent_service_pb2.Job:
        await self.call(verb, request)
        wanted = agent_service_pb2.GetJobRequest(
            operation_id=request.key.operation_id, step=request.key.step, direction=request.key.direction
        )
        job = (await self.call("GetJob", wanted)).job

        async def look() -> bool:
            nonlocal job
            job = (await self.call("GetJob", wanted)).job
            return bool(job.state != command_pb2.JOB_STATE_RUNNING)

        for _ in range(2000):
            if await look():
                return job
        raise AssertionError("the job did not end")

    def backup(self, backup_id: str, **more: Any) -> pb.StartBackupRequest:
        return pb.StartBackupRequest(
            key=self.key(),
            repository="repo-1",
            backup_id=backup_id,
            vm_id="vm-1",
            vm_name="web1",
            project_id="project-1",
            disks=[pb.DiskToBackUp(name="vda", volume_id="vol-1", generation=1)],
            wants_freeze=True,
            **more,
        )

    def restore(self, backup_id: str) -> pb.StartRestoreRequest:
        volume = volume_spec("vol-new", size_bytes=SIZE)
        return pb.StartRestoreRequest(
            key=self.key("vol-new"),
            repository="repo-1",
            vm_id="vm-1",
            backup_id=backup_id,
            disk="vda",
            volume=to_proto(volume, storage_pb2.VolumeSpec),
            pool=to_proto(LOCAL, storage_pb2.PoolSpec),
        )


def _every_row(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [row for table in tables for row in connection.execute(f"SELECT * FROM {table}")]


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    yield world
    await world.stop()
    world.resources.close()
    world.fleet.close()


async def test_a_vm_is_backed_up_verified_restored_and_pruned(world: World) -> None:
    opened = await world.open()
    assert opened.fleet_id == "fleet-1"
    first = await world.run("StartBackup", world.backup("bk-1"))
    assert (first.state, first.backup.consistency, first.backup.disks[0].full_reason) == (SUCCEEDED, "filesystem", "first backup")
    world.disk.write(5, b"changed")
    second = await world.run("StartBackup", world.backup("bk-2"))
    assert (second.backup.base_id, second.backup.disks[0].full_reason) == ("bk-1", "")

    verified = await world.run("StartVerify", pb.StartVerifyRequest(key=world.key("repo-1"), repository="repo-1"))
    assert verified.verify.read_bytes > 0
    assert list(verified.verify.damaged) == []
    restored = await world.run("StartRestore", world.restore("bk-2"))
    assert restored.restore.root == second.backup.disks[0].root
    assert world.backups.volumes["vol-new"] == bytes(world.disk.content)

    forgotten = [pb.ForgottenBackup(vm_id="vm-1", backup_id="bk-1")]
    pruned = await world.run("StartPrune", pb.StartPruneRequest(key=world.key("repo-1"), repository="repo-1", forget=forgotten))
    assert pruned.prune.condemned_bytes > 0
    listed = await world.call("ListBackups", pb.ListBackupsRequest(repository="repo-1"))
    assert [(backup.backup_id, backup.vm_name) for backup in listed.backups] == [("bk-2", "web1")]


async def test_the_key_is_never_on_the_disk_of_the_host_and_is_asked_for_after_a_restart(world: World) -> None:
    await world.open(secret_access_key="of-the-bucket")
    await world.run("StartBackup", world.backup("bk-1"))
    journal = world.resources.journal.submit(lambda connection: [repr(row) for row in _every_row(connection)]).result()
    kept = [path.read_bytes() for path in world.directory.rglob("*") if path.is_file()]
    assert any("vm-1" in row for row in journal), "the job is in the journal"
    for secret in (KEY.text.encode(), KEY.secret, b"of-the-bucket"):
        assert all(secret not in content for content in (*kept, *(row.encode() for row in journal)))

    await world.stop()
    await world.start()
    job = await world.run("StartBackup", world.backup("bk-2"))
    assert (job.state, job.error.code) == (FAILED, "repository-not-open")
    await world.open()
    assert (await world.run("StartBackup", world.backup("bk-2"))).state == SUCCEEDED


async def test_what_cannot_be_is_refused_at_once(world: World) -> None:
    with pytest.raises(InvalidRequest, match="file:///folder"):
        await world.open(url="ftp://somewhere")
    with pytest.raises(InvalidRequest, match="no folder for a repository"):
        await world.open(url="file:///etc/backup")
    with pytest.raises(InvalidRequest, match="looks like ttk1"):
        await world.open(key="secret")
    await world.open()
    with pytest.raises(PermissionDenied) as other:
        await world.open(fleet_id="fleet-2")
    assert other.value.code == "repository-of-another-fleet"
    with pytest.raises(InvalidRequest, match="names no disk"):
        await world.call("StartBackup", pb.StartBackupRequest(key=world.key(), repository="repo-1"))
    with pytest.raises(Unavailable):
        await world.call("ListBackups", pb.ListBackupsRequest(repository="repo-9"))


async def test_a_vm_that_does_not_run_or_is_busy_fails_with_its_reason(world: World) -> None:
    await world.open()
    world.backups.vms["vm-1"].is_busy = True
    job = await world.run("StartBackup", world.backup("bk-1"))
    assert (job.state, job.error.code) == (FAILED, "vm-busy")
    assert Conflict.retryable is False
