"""The baseline of creates: the three commands of a create sent to the same simulated agents without a control plane.

Real gRPC with mutual TLS, keys, turns and leases as the agents ask for them; one row in SQLite, fsynced before the first command
and after the last, so that whoever sends them would know what it began.
"""

import sqlite3
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trimtab_controller import config, wiring
from trimtab_controller.agents.grpc_client import AgentAddress, GrpcAgentClient
from trimtab_controller.clock import mint
from trimtab_controller.store import hosts
from trimtab_controller.store.database import Database, Session
from trimtab_lab.simulated import SimulatedLab
from trimtab_protos.messages import CommandKey, Direction, DiskFormat, DiskSpec, DomainSpec, PoolSpec, PowerAction, VolumeSpec

THREADS = 16
POOL = PoolSpec(pool_id="pool-bare", path="/srv/bare", is_shared=False)


@dataclass(slots=True)
class OneRowEach:
    """A row per vm, written twice, each time with an fsync."""

    connection: sqlite3.Connection
    lock: threading.Lock

    @staticmethod
    def opened(path: Path) -> "OneRowEach":
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("CREATE TABLE vm (id TEXT PRIMARY KEY, state TEXT)")
        return OneRowEach(connection, threading.Lock())

    def write(self, vm_id: str, state: str) -> None:
        with self.lock:
            self.connection.execute("INSERT OR REPLACE INTO vm VALUES (?, ?)", (vm_id, state))


def create_bare(lab: SimulatedLab, count: int, directory: Path) -> float:
    """Make `count` guests run; return how many seconds that took."""
    settings = config.load(data_dir=lab.controller_directory)
    addresses = _addresses(settings)
    client = GrpcAgentClient(lookup=addresses.__getitem__, connect=wiring.ControllerChannels(settings))
    rows = OneRowEach.opened(directory / "bare.db")
    host_ids = sorted(addresses)[:8]  # as few as the scheduler fills with as many vms

    def create(index: int) -> None:
        vm_id, host_id = mint("vm"), host_ids[index % len(host_ids)]
        rows.write(vm_id, "begun")
        _command(client, host_id, vm_id)
        rows.write(vm_id, "running")

    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(create, range(count)))
    seconds = time.monotonic() - began
    client.close()
    rows.connection.close()
    return seconds


def _command(client: GrpcAgentClient, host_id: str, vm_id: str) -> None:
    operation_id, volume_id = mint("op"), mint("vol")

    def key(step: str) -> CommandKey:
        return CommandKey(operation_id=operation_id, step=step, direction=Direction.DO, turn=1, subject_id=vm_id, epoch=1)

    client.ensure_volume(host_id, key("volume"), VolumeSpec(
        volume_id=volume_id, pool_id=POOL.pool_id, format=DiskFormat.QCOW2, size_bytes=1 << 20), POOL)  # fmt: skip
    client.define_domain(host_id, key("define"), DomainSpec(
        vm_id=vm_id, uuid=str(uuid.uuid4()), name=vm_id, project="bare", machine="pc-q35-7.2", cpu_model="qemu64",
        vcpus=1, vcpus_max=1, memory_mib=256, memory_max_mib=256,
        disks=(DiskSpec(volume_id=volume_id, pool_id=POOL.pool_id, format=DiskFormat.QCOW2, index=0, boot_order=1),),
        pools=(POOL,)))  # fmt: skip
    client.change_power(host_id, key("start"), vm_id, PowerAction.START)


def _addresses(settings: config.Settings) -> dict[str, AgentAddress]:
    db = Database(settings.effective_database_url)

    def read(session: Session) -> Sequence[AgentAddress]:
        return [AgentAddress(host.id, *hosts.reach_agent(session, host.id)) for host in hosts.live(session)]

    found = db.read(read)
    db.close()
    return {one.host_id: one for one in found}
