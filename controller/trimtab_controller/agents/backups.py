"""What may be asked of a host about backups: the second half of `AgentClient`.

A repository's key is opened from its seal here, at the last moment before it is sent over mutual TLS; nothing above ever has it in
the clear. Jobs are followed and cancelled as all others are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from trimtab_controller.agents.jobs import Job, job_of
from trimtab_controller.agents.sending import Sender
from trimtab_controller.core.model import BackupRepo
from trimtab_protos.agent.v1 import backup_service_pb2 as pb
from trimtab_protos.agent.v1 import domain_pb2, storage_pb2
from trimtab_protos.agent.v1 import instant_service_pb2 as instant_pb
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import PermissionDenied
from trimtab_protos.messages import BackupSummary, CommandKey, DomainSpec, PoolSpec, VolumeSpec

# Storage that is far away or sleeps; the agent gives up by itself before.
OPEN_DEADLINE_S = 30.0
PRUNE_GRACE_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskWish:
    name: str
    volume_id: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOrder:
    """One backup as it is asked of a host."""

    repo_id: str
    backup_id: str
    vm_id: str
    vm_name: str
    project_id: str
    disks: tuple[DiskWish, ...]
    notes: Mapping[str, str]
    wants_freeze: bool = True
    needs_filesystem: bool = False
    needs_application: bool = False
    bandwidth_mib_s: int = 0
    # Of a vm that is backed up at one instant with others: held still until `release_instant`, for so long at most.
    instant_id: str = ""
    hold_max_ms: int = 0
    # Where what guests overwrite meanwhile of disks that are no files is kept.
    scratch_pool: PoolSpec | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """state: none, held, released, expired or abandoned; `taken_ms` by the host's clock."""

    state: str
    taken_ms: int
    held_ms: int


@dataclass(frozen=True, slots=True)
class OpenedRepository:
    repository_id: str
    fleet_id: str
    project_id: str


@dataclass(frozen=True, slots=True)
class RotatedKey:
    generation: int
    data_key_version: int
    repository_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDisk:
    """A disk of a listed backup, as a host finds it."""

    repo_id: str
    vm_id: str
    backup_id: str
    disk: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a disk as a file: its bytes, or how many bytes of zeros come instead; and the file's size."""

    content: bytes
    zeros: int
    size_bytes: int


class BackupAgents(Protocol):
    def serve_backup(
        self,
        host_id: str,
        key: CommandKey,
        disk: BackupDisk,
        *,
        volume: VolumeSpec,
        pool: PoolSpec,
        makes_volume: bool = False,
        state_for_vm_id: str = "",
    ) -> None: ...

    def start_fill(
        self,
        host_id: str,
        key: CommandKey,
        disk: BackupDisk,
        *,
        volume: VolumeSpec,
        pool: PoolSpec,
        domain: DomainSpec,
        bandwidth_mib_s: int,
    ) -> Job: ...

    def read_backup(self, host_id: str, disk: BackupDisk, format: str, offset: int, length: int) -> Piece: ...

    def open_repository(self, host_id: str, key: CommandKey, repo: BackupRepo, *, create: bool = False) -> OpenedRepository: ...

    def rotate_key(self, host_id: str, key: CommandKey, repo: BackupRepo) -> RotatedKey: ...

    def list_backups(self, host_id: str, repo_id: str) -> tuple[tuple[BackupSummary, ...], tuple[str, ...]]: ...

    def start_backup(self, host_id: str, key: CommandKey, order: BackupOrder) -> Job: ...

    def await_instant(self, host_id: str, instant_id: str, vm_id: str, *, timeout_s: float) -> Held: ...

    def release_instant(self, host_id: str, instant_id: str, vm_id: str) -> Held: ...

    def start_restore(
        self,
        host_id: str,
        key: CommandKey,
        *,
        repo_id: str,
        vm_id: str,
        backup_id: str,
        disk: str,
        volume: VolumeSpec,
        pool: PoolSpec,
        state_for_vm_id: str = "",
    ) -> Job: ...

    def start_verify(
        self, host_id: str, key: CommandKey, *, repo_id: str, vm_id: str, backup_id: str, judges_others: bool
    ) -> Job: ...

    def start_prune(
        self, host_id: str, key: CommandKey, *, repo_id: str, forget: Sequence[tuple[str, str]], is_dry_run: bool
    ) -> Job: ...

    def start_replication(self, host_id: str, key: CommandKey, *, repo_id: str, to_repo_id: str, bandwidth_mib_s: int) -> Job: ...


class BackupVerbs(Sender):
    """`BackupAgents` over whatever sends a message: mixed into the gRPC client."""

    _open_seal: Callable[[str, str], str]

    def open_repository(self, host_id: str, key: CommandKey, repo: BackupRepo, *, create: bool = False) -> OpenedRepository:
        try:
            return self._open(host_id, key, repo, repo.wrapped_key, create=create)
        except PermissionDenied as refused:
            # A rotation changes the lock first and the row afterwards: in between only the next key opens it.
            if not repo.is_next_key_saved or refused.code != "repository-key-wrong":
                raise
            other = replace(key, step=f"{key.step}/next")  # another request, so under another key of a command
            return self._open(host_id, other, repo, repo.wrapped_next_key, create=False)

    def rotate_key(self, host_id: str, key: CommandKey, repo: BackupRepo) -> RotatedKey:
        access, new_key = self._access(repo, repo.wrapped_key), self._open_seal(repo.wrapped_next_key, repo.id)
        request = pb.RotateKeyRequest(name=repo.id, access=access, new_key=new_key)
        rotated = self._command(host_id, "RotateKey", request, key, timeout_s=OPEN_DEADLINE_S)
        return RotatedKey(rotated.generation, rotated.data_key_version, rotated.repository_id)

    def _open(self, host_id: str, key: CommandKey, repo: BackupRepo, wrapped: str, *, create: bool) -> OpenedRepository:
        request = pb.OpenRepositoryRequest(name=repo.id, access=self._access(repo, wrapped), create=create)
        opened = self._command(host_id, "OpenRepository", request, key, timeout_s=OPEN_DEADLINE_S)
        return OpenedRepository(opened.repository_id, opened.fleet_id, opened.project_id)

    def _access(self, repo: BackupRepo, wrapped_key: str) -> pb.RepositoryAccess:
        settings = repo.settings
        return pb.RepositoryAccess(
            url=repo.url,
            key=self._open_seal(wrapped_key, repo.id),
            fleet_id=repo.fleet_id,
            project_id=repo.project_id,
            endpoint=settings.get("endpoint", ""),
            region=settings.get("region", ""),
            access_key_id=settings.get("access_key_id", ""),
            secret_access_key=self._open_seal(repo.wrapped_secret, repo.id) if repo.wrapped_secret else "",
            allow_http=bool(settings.get("allow_http", False)),
        )

    def list_backups(self, host_id: str, repo_id: str) -> tuple[tuple[BackupSummary, ...], tuple[str, ...]]:
        request = pb.ListBackupsRequest(repository=repo_id)
        found = self._call(host_id, "ListBackups", request, timeout_s=OPEN_DEADLINE_S)
        return tuple(from_proto(one, BackupSummary) for one in found.backups), tuple(found.unreadable_manifests)

    def start_backup(self, host_id: str, key: CommandKey, order: BackupOrder) -> Job:
        request = pb.StartBackupRequest(
            repository=order.repo_id,
            backup_id=order.backup_id,
            vm_id=order.vm_id,
            vm_name=order.vm_name,
            project_id=order.project_id,
            disks=[pb.DiskToBackUp(name=disk.name, volume_id=disk.volume_id, generation=disk.generation) for disk in order.disks],
            wants_freeze=order.wants_freeze,
            needs_filesystem=order.needs_filesystem,
            needs_application=order.needs_application,
            bandwidth_mib_s=order.bandwidth_mib_s,
            notes=dict(order.notes),
            instant_id=order.instant_id,
            hold_max_ms=order.hold_max_ms,
            scratch_pool=to_proto(order.scratch_pool, storage_pb2.PoolSpec) if order.scratch_pool is not None else None,
        )
        # A disk of a stopped vm is opened with its pool's secret; the job that needs it has nobody to ask.
        self._give_secrets(host_id, order.vm_id)
        return job_of(self._command(host_id, "StartBackup", request, key).job)

    def await_instant(self, host_id: str, instant_id: str, vm_id: str, *, timeout_s: float) -> Held:
        request = pb.AwaitInstantRequest(instant_id=instant_id, vm_id=vm_id, timeout_ms=int(timeout_s * 1000))
        found = self._call(host_id, "AwaitInstant", request, timeout_s=timeout_s + 5.0)
        return Held(found.state, found.taken_ms, found.held_ms)

    def release_instant(self, host_id: str, instant_id: str, vm_id: str) -> Held:
        request = pb.ReleaseInstantRequest(instant_id=instant_id, vm_id=vm_id)
        found = self._call(host_id, "ReleaseInstant", request, timeout_s=5.0)
        return Held(found.state, found.taken_ms, found.held_ms)

    def start_restore(
        self,
        host_id: str,
        key: CommandKey,
        *,
        repo_id: str,
        vm_id: str,
        backup_id: str,
        disk: str,
        volume: VolumeSpec,
        pool: PoolSpec,
        state_for_vm_id: str = "",
    ) -> Job:
        # A pool's secret is needed by the job, whose own end would come too late to ask for it.
        self._give_secrets(host_id, key.subject_id)
        request = pb.StartRestoreRequest(
            repository=repo_id,
            vm_id=vm_id,
            backup_id=backup_id,
            disk=disk,
            volume=to_proto(volume, storage_pb2.VolumeSpec),
            pool=to_proto(pool, storage_pb2.PoolSpec),
            state_for_vm_id=state_for_vm_id,
        )
        return job_of(self._command(host_id, "StartRestore", request, key).job)

    def serve_backup(
        self,
        host_id: str,
        key: CommandKey,
        disk: BackupDisk,
        *,
        volume: VolumeSpec,
        pool: PoolSpec,
        makes_volume: bool = False,
        state_for_vm_id: str = "",
    ) -> None:
        request = instant_pb.ServeBackupRequest(
            disk=_disk_ref(disk),
            volume=to_proto(volume, storage_pb2.VolumeSpec),
            pool=to_proto(pool, storage_pb2.PoolSpec),
            makes_volume=makes_volume,
            state_for_vm_id=state_for_vm_id,
        )
        self._command(host_id, "ServeBackup", request, key, timeout_s=OPEN_DEADLINE_S)

    def start_fill(
        self,
        host_id: str,
        key: CommandKey,
        disk: BackupDisk,
        *,
        volume: VolumeSpec,
        pool: PoolSpec,
        domain: DomainSpec,
        bandwidth_mib_s: int,
    ) -> Job:
        request = instant_pb.StartFillRequest(
            disk=_disk_ref(disk),
            volume=to_proto(volume, storage_pb2.VolumeSpec),
            pool=to_proto(pool, storage_pb2.PoolSpec),
            domain=to_proto(domain, domain_pb2.DomainSpec),
            bandwidth_mib_s=bandwidth_mib_s,
        )
        return job_of(self._command(host_id, "StartFill", request, key).job)

    def read_backup(self, host_id: str, disk: BackupDisk, format: str, offset: int, length: int) -> Piece:
        request = instant_pb.ReadBackupRequest(disk=_disk_ref(disk), format=format, offset=offset, length=length)
        piece = self._call(host_id, "ReadBackup", request, timeout_s=OPEN_DEADLINE_S)
        return Piece(piece.content, piece.zeros, piece.size_bytes)

    def start_verify(
        self, host_id: str, key: CommandKey, *, repo_id: str, vm_id: str, backup_id: str, judges_others: bool
    ) -> Job:
        request = pb.StartVerifyRequest(repository=repo_id, vm_id=vm_id, backup_id=backup_id, judges_others=judges_others)
        return job_of(self._command(host_id, "StartVerify", request, key).job)

    def start_prune(
        self, host_id: str, key: CommandKey, *, repo_id: str, forget: Sequence[tuple[str, str]], is_dry_run: bool
    ) -> Job:
        request = pb.StartPruneRequest(
            repository=repo_id,
            forget=[pb.ForgottenBackup(vm_id=vm_id, backup_id=backup_id) for vm_id, backup_id in forget],
            grace_s=PRUNE_GRACE_S,
            is_dry_run=is_dry_run,
        )
        return job_of(self._command(host_id, "StartPrune", request, key).job)

    def start_replication(self, host_id: str, key: CommandKey, *, repo_id: str, to_repo_id: str, bandwidth_mib_s: int) -> Job:
        request = pb.StartReplicationRequest(repository=repo_id, to_repository=to_repo_id, bandwidth_mib_s=bandwidth_mib_s)
        return job_of(self._command(host_id, "StartReplication", request, key).job)


def _disk_ref(disk: BackupDisk) -> instant_pb.BackupDiskRef:
    return instant_pb.BackupDiskRef(repository=disk.repo_id, vm_id=disk.vm_id, backup_id=disk.backup_id, disk=disk.disk)
