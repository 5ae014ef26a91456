"""`AgentClient` over gRPC with mutual TLS: one channel per host, a deadline on every call, errors translated once.

Channels are made lazily in the process that uses them (never before a fork), rebuilt when the host's address or our certificate
changes, and kept in a bounded LRU. A server certificate must name the host's id: an address taken over by another machine is
refused by TLS before a byte of a command is sent.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc

from trimtab_controller.agents.adoption import AdoptionVerbs
from trimtab_controller.agents.backups import BackupVerbs
from trimtab_controller.agents.jobs import Job, job_of
from trimtab_controller.agents.packets import PacketVerbs
from trimtab_controller.agents.proofs import ProofVerbs
from trimtab_controller.agents.sending import no_key
from trimtab_controller.core.ids import kind_of
from trimtab_protos.agent.v1 import adoption_service_pb2 as adoption_pb
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import agent_service_pb2_grpc as pb_grpc
from trimtab_protos.agent.v1 import backup_service_pb2 as backup_pb
from trimtab_protos.agent.v1 import beacon_service_pb2 as beacon_pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2, storage_pb2
from trimtab_protos.agent.v1 import host_service_pb2 as host_pb
from trimtab_protos.agent.v1 import instant_service_pb2 as instant_pb
from trimtab_protos.agent.v1 import layer_service_pb2 as layer_pb
from trimtab_protos.agent.v1 import network_service_pb2 as network_pb
from trimtab_protos.agent.v1 import proof_service_pb2 as proof_pb
from trimtab_protos.agent.v1 import secret_service_pb2 as secret_pb
from trimtab_protos.agent.v1.adoption_service_pb2_grpc import AdoptionServiceStub
from trimtab_protos.agent.v1.backup_service_pb2_grpc import BackupServiceStub
from trimtab_protos.agent.v1.beacon_service_pb2_grpc import BeaconServiceStub
from trimtab_protos.agent.v1.host_service_pb2_grpc import HostServiceStub
from trimtab_protos.agent.v1.instant_service_pb2_grpc import InstantServiceStub
from trimtab_protos.agent.v1.layer_service_pb2_grpc import LayerServiceStub
from trimtab_protos.agent.v1.network_service_pb2_grpc import NetworkServiceStub
from trimtab_protos.agent.v1.proof_service_pb2_grpc import ProofServiceStub
from trimtab_protos.agent.v1.secret_service_pb2_grpc import SecretServiceStub
from trimtab_protos.beacon_slots import Intent
from trimtab_protos.codec import enum_number, from_proto, to_proto
from trimtab_protos.errors import Unavailable
from trimtab_protos.messages import (
    ChangeLeft,
    CommandKey,
    DiskFormat,
    DomainObservation,
    DomainSpec,
    HostFileSource,
    ImageSource,
    ImageSpec,
    Inventory,
    LayerMerge,
    LayerResult,
    MigrationOptions,
    MigrationSide,
    NetworkSpec,
    PeerSource,
    PoolObservation,
    PoolSpec,
    PowerAction,
    UploadSource,
    UrlSource,
    VolumeObservation,
    VolumeSource,
    VolumeSpec,
)
from trimtab_protos.status import from_rpc_error
from trimtab_protos.volume_messages import VolumeMove

DEADLINE_S = 10.0
# Reading everything of a host, or making a large file system answer.
SLOW_DEADLINE_S = 20.0
# Some 120 KiB each: a fleet of four thousand hosts keeps all of its channels (half a GiB), and small ones pay for what they have. With
# fewer than hosts, each call in turn would open one, at the price of two TLS handshakes of more than a millisecond.
CHANNELS_MAX = 4096
PAGE_SIZE = 500
BEACON_DEADLINE_S = 6.0
_STUBS: tuple[tuple[Any, Any, str], ...] = (
    (pb_grpc.AgentServiceStub, pb, "AgentService"),
    (LayerServiceStub, layer_pb, "LayerService"),
    (AdoptionServiceStub, adoption_pb, "AdoptionService"),
    (BackupServiceStub, backup_pb, "BackupService"),
    (NetworkServiceStub, network_pb, "NetworkService"),
    (BeaconServiceStub, beacon_pb, "BeaconService"),
    (HostServiceStub, host_pb, "HostService"),
    (InstantServiceStub, instant_pb, "InstantService"),
    (ProofServiceStub, proof_pb, "ProofService"),
    (SecretServiceStub, secret_pb, "SecretService"),
)
_STUB_OF = {
    method.name: number
    for number, (_stub, module, service) in enumerate(_STUBS)
    for method in module.DESCRIPTOR.services_by_name[service].methods
}
_Stubs = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """Where a host's agent answers and under which incarnation and lease it may be commanded, as last committed."""

    host_id: str
    address: str
    incarnation: str
    lease_number: int


KEY_MISSING = "volume-key-missing"


class GrpcAgentClient(AdoptionVerbs, BackupVerbs, PacketVerbs, ProofVerbs):
    """Thread-safe. `lookup` reads the host's row; `connect` opens a channel to (host_id, address); `open_seal` opens what was sealed
    for a row (see `secret_box.py`); `seals_of` reads the sealed keys of a vm's volumes, or of a volume.
    """

    def __init__(
        self,
        *,
        lookup: Callable[[str], AgentAddress],
        connect: Callable[[str, str], grpc.Channel],
        open_seal: Callable[[str, str], str] = no_key,
        seals_of: Callable[[str], Mapping[str, str]] = lambda _subject_id: {},
        on_call: Callable[[str, str, float], None] = lambda _verb, _outcome, _seconds: None,
    ) -> None:
        self._lookup = lookup
        self._connect = connect
        self._open_seal = open_seal
        self._seals_of = seals_of
        self._on_call = on_call
        self._lines: OrderedDict[tuple[str, str], tuple[grpc.Channel, _Stubs]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            lines, self._lines = list(self._lines.values()), OrderedDict()
        for channel, _stubs in lines:
            channel.close()

    def reconnect_all(self) -> None:
        """Drop every channel, so that the next calls present a renewed certificate."""
        self.close()

    # --- observing ---------------------------------------------------------------------------------------------------

    def get_fitness(self, host_id: str) -> Inventory:
        request = pb.GetInventoryRequest(only_fitness=True)
        response = self._call(host_id, "GetInventory", request, timeout_s=SLOW_DEADLINE_S)
        return from_proto(response.inventory, Inventory)

    def list_domains(self, host_id: str) -> tuple[DomainObservation, ...]:
        found: list[DomainObservation] = []
        token = ""
        while True:
            request = pb.ListDomainsRequest(page_size=PAGE_SIZE, page_token=token)
            response = self._call(host_id, "ListDomains", request, timeout_s=SLOW_DEADLINE_S)
            found.extend(from_proto(domain, DomainObservation) for domain in response.domains)
            token = response.next_page_token
            if not token:
                return tuple(found)

    def get_domain(self, host_id: str, vm_id: str) -> DomainObservation:
        return from_proto(self._call(host_id, "GetDomain", pb.GetDomainRequest(vm_id=vm_id)).domain, DomainObservation)

    def read_console(self, host_id: str, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        request = pb.ReadConsoleRequest(vm_id=vm_id, offset=offset, max_bytes=max_bytes)
        response = self._call(host_id, "ReadConsole", request, waits_for_agent=True)
        return response.content, response.next_offset

    # --- storage and networks ------------------------------------------------------------------------------------------

    def ensure_pool(self, host_id: str, key: CommandKey, pool: PoolSpec) -> PoolObservation:
        request = pb.EnsurePoolRequest(pool=_pool(pool))
        return from_proto(self._command(host_id, "EnsurePool", request, key, secrets_of=pool.pool_id).pool, PoolObservation)

    def check_marker(self, host_id: str, pool: PoolSpec, marker: str, *, write_content: str = "", remove: bool = False) -> str:
        request = pb.CheckPoolMarkerRequest(pool=_pool(pool), marker=marker, write_content=write_content, remove=remove)
        content: str = self._call(host_id, "CheckPoolMarker", request).content
        return content

    def remove_pool(self, host_id: str, key: CommandKey, pool_id: str) -> None:
        self._command(host_id, "RemovePool", pb.RemovePoolRequest(pool_id=pool_id), key)

    def ensure_volume(self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
        self._give_keys_first(host_id, key, (volume,))
        request = pb.EnsureVolumeRequest(volume=_volume(volume), pool=_pool(pool))
        return from_proto(self._command(host_id, "EnsureVolume", request, key).volume, VolumeObservation)

    def resize_volume(self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
        request = pb.ResizeVolumeRequest(volume=_volume(volume), pool=_pool(pool), vm_id=vm_id)
        return from_proto(self._command(host_id, "ResizeVolume", request, key).volume, VolumeObservation)

    def delete_volume(self, host_id: str, key: CommandKey, volume_id: str, format: DiskFormat, pool: PoolSpec) -> None:
        request = pb.DeleteVolumeRequest(volume_id=volume_id, pool=_pool(pool), format=_format(format))
        self._command(host_id, "DeleteVolume", request, key)

    def ensure_network(self, host_id: str, key: CommandKey, network: NetworkSpec) -> tuple[bool, str]:
        request = pb.EnsureNetworkRequest(network=to_proto(network, domain_pb2.NetworkSpec))
        response = self._command(host_id, "EnsureNetwork", request, key)
        return response.is_reachable, response.problem

    def remove_network(self, host_id: str, key: CommandKey, network_id: str) -> None:
        self._command(host_id, "RemoveNetwork", pb.RemoveNetworkRequest(network_id=network_id), key)

    def start_image_import(self, host_id: str, key: CommandKey, image: ImageSpec, pool: PoolSpec, source: ImageSource) -> Job:
        request = pb.StartImageImportRequest(image=to_proto(image, storage_pb2.ImageSpec), pool=_pool(pool))
        match source:
            case UploadSource():
                request.upload.CopyFrom(to_proto(source, storage_pb2.UploadSource))
            case UrlSource():
                request.url.CopyFrom(to_proto(source, storage_pb2.UrlSource))
            case HostFileSource():
                request.host_file.CopyFrom(to_proto(source, storage_pb2.HostFileSource))
            case PeerSource():
                request.peer.CopyFrom(to_proto(source, storage_pb2.PeerSource))
            case VolumeSource():
                request.volume.CopyFrom(to_proto(source, storage_pb2.VolumeSource))
        return job_of(self._command(host_id, "StartImageImport", request, key).job)

    def offer_image(
        self,
        host_id: str,
        key: CommandKey,
        *,
        image_id: str,
        format: DiskFormat,
        pool: PoolSpec,
        ticket: str,
        ttl_s: int,
        peer_host_id: str,
    ) -> str:
        request = pb.OfferImageRequest(
            image_id=image_id, pool=_pool(pool), format=_format(format), ticket=ticket, ttl_s=ttl_s, peer_host_id=peer_host_id
        )
        address: str = self._command(host_id, "OfferImage", request, key).address
        return address

    def delete_image(self, host_id: str, key: CommandKey, image_id: str, format: DiskFormat, pool: PoolSpec) -> None:
        request = pb.DeleteImageRequest(image_id=image_id, pool=_pool(pool), format=_format(format))
        self._command(host_id, "DeleteImage", request, key)

    # --- domains -------------------------------------------------------------------------------------------------------

    def define_domain(
        self, host_id: str, key: CommandKey, domain: DomainSpec, *, needs_volumes: bool = False
    ) -> DomainObservation:
        request = pb.DefineDomainRequest(domain=_domain(domain), needs_volumes=needs_volumes)
        response = self._command(host_id, "DefineDomain", request, key)
        return from_proto(response.domain, DomainObservation)

    def apply_domain(self, host_id: str, key: CommandKey, domain: DomainSpec) -> tuple[DomainObservation, tuple[ChangeLeft, ...]]:
        request = pb.ApplyDomainRequest(domain=_domain(domain))
        response = self._command(host_id, "ApplyDomain", request, key, timeout_s=SLOW_DEADLINE_S)
        return from_proto(response.domain, DomainObservation), tuple(from_proto(each, ChangeLeft) for each in response.left)

    def undefine_domain(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        *,
        kill_if_running: bool,
        pools: Sequence[PoolSpec],
        keep_state_files: bool,
    ) -> None:
        request = pb.UndefineDomainRequest(
            vm_id=vm_id,
            kill_if_running=kill_if_running,
            pools=[_pool(pool) for pool in pools],
            keep_state_files=keep_state_files,
        )
        self._command(host_id, "UndefineDomain", request, key)

    def change_power(self, host_id: str, key: CommandKey, vm_id: str, action: PowerAction) -> DomainObservation:
        number = enum_number(pb.PowerAction.DESCRIPTOR, action)
        response = self._command(host_id, "ChangePower", pb.ChangePowerRequest(vm_id=vm_id, action=number), key)  # type: ignore[arg-type]
        return from_proto(response.domain, DomainObservation)

    # --- migration -----------------------------------------------------------------------------------------------------

    def prepare_migration(
        self, host_id: str, key: CommandKey, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str
    ) -> tuple[str, str]:
        self._give_keys_first(host_id, key, copied_volumes)
        request = pb.PrepareMigrationRequest(
            domain=_domain(domain), copied_volumes=[_volume(volume) for volume in copied_volumes], source_host_id=source_host_id
        )
        response = self._command(host_id, "PrepareMigration", request, key)
        return response.libvirt_uri, response.migration_uri

    def start_migration(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        *,
        libvirt_uri: str,
        migration_uri: str,
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
        next_epoch: int,
        target_domain: DomainSpec,
    ) -> Job:
        request = pb.StartMigrationRequest(
            vm_id=vm_id,
            libvirt_uri=libvirt_uri,
            migration_uri=migration_uri,
            copied_disk_volume_ids=list(copied_volume_ids),
            options=to_proto(options, pb.MigrationOptions),
            next_epoch=next_epoch,
            target_domain=_domain(target_domain),
        )
        return job_of(self._command(host_id, "StartMigration", request, key).job)

    def settle_migration(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        side: MigrationSide,
        domain: DomainSpec,
        removed_volumes: Sequence[VolumeSpec],
    ) -> DomainObservation:
        request = pb.SettleMigrationRequest(
            vm_id=vm_id,
            side=enum_number(pb.MigrationSide.DESCRIPTOR, side),  # type: ignore[arg-type]
            domain=_domain(domain),
            removed_volumes=[_volume(volume) for volume in removed_volumes],
        )
        return from_proto(self._command(host_id, "SettleMigration", request, key).domain, DomainObservation)

    # --- layers --------------------------------------------------------------------------------------------------------

    def switch_layers(self, host_id: str, key: CommandKey, domain: DomainSpec, *, wants_freeze: bool) -> LayerResult:
        request = layer_pb.SwitchLayersRequest(domain=_domain(domain), wants_freeze=wants_freeze)
        response = self._command(host_id, "SwitchLayers", request, key, timeout_s=SLOW_DEADLINE_S)
        return from_proto(response.result, LayerResult)

    def delete_layer(self, host_id: str, key: CommandKey, volume_id: str, layer_id: str, pool: PoolSpec) -> None:
        request = layer_pb.DeleteLayerRequest(volume_id=volume_id, layer_id=layer_id, pool=_pool(pool))
        self._command(host_id, "DeleteLayer", request, key)

    def delete_memory(self, host_id: str, key: CommandKey, vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
        request = layer_pb.DeleteMemoryRequest(vm_id=vm_id, snapshot_id=snapshot_id, pool=_pool(pool))
        self._command(host_id, "DeleteMemory", request, key)

    def start_memory_snapshot(self, host_id: str, key: CommandKey, domain: DomainSpec, snapshot_id: str) -> Job:
        request = layer_pb.StartMemorySnapshotRequest(domain=_domain(domain), snapshot_id=snapshot_id)
        return job_of(self._command(host_id, "StartMemorySnapshot", request, key).job)

    def start_memory_restore(self, host_id: str, key: CommandKey, domain: DomainSpec, snapshot_id: str) -> Job:
        request = layer_pb.StartMemoryRestoreRequest(domain=_domain(domain), snapshot_id=snapshot_id)
        return job_of(self._command(host_id, "StartMemoryRestore", request, key).job)

    def start_merge(self, host_id: str, key: CommandKey, merge: LayerMerge, pool: PoolSpec, domain: DomainSpec | None) -> Job:
        request = layer_pb.StartMergeRequest(merge=to_proto(merge, storage_pb2.LayerMerge), pool=_pool(pool))
        if domain is not None:
            request.domain.CopyFrom(_domain(domain))
        return job_of(self._command(host_id, "StartMerge", request, key).job)

    def start_volume_copy(self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec) -> Job:
        self._give_keys_first(host_id, key, (volume,))
        request = layer_pb.StartVolumeCopyRequest(volume=_volume(volume), pool=_pool(pool))
        return job_of(self._command(host_id, "StartVolumeCopy", request, key).job)

    def start_volume_move(self, host_id: str, key: CommandKey, move: VolumeMove, domain: DomainSpec | None) -> Job:
        request = layer_pb.StartVolumeMoveRequest(move=to_proto(move, storage_pb2.VolumeMove), domain=_domain_or_none(domain))
        return job_of(self._command(host_id, "StartVolumeMove", request, key).job)

    def settle_volume_move(
        self, host_id: str, key: CommandKey, move: VolumeMove, domain: DomainSpec | None, *, is_recorded: bool
    ) -> bool:
        asked = to_proto(move, storage_pb2.VolumeMove)
        request = layer_pb.SettleVolumeMoveRequest(move=asked, domain=_domain_or_none(domain), is_recorded=is_recorded)
        is_moved: bool = self._command(host_id, "SettleVolumeMove", request, key, timeout_s=SLOW_DEADLINE_S).is_moved
        return is_moved

    # --- beacons -------------------------------------------------------------------------------------------------------

    def read_slots(self, host_id: str, pool: PoolSpec, of_host_ids: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        request = beacon_pb.ReadSlotsRequest(pool=_pool(pool), host_ids=list(of_host_ids))
        response = self._call(host_id, "ReadSlots", request, timeout_s=BEACON_DEADLINE_S)
        return {slot.host_id: (slot.beat, slot.intent) for slot in response.slots}

    def write_intent(self, host_id: str, pool: PoolSpec, for_host_id: str, intent: Intent) -> bytes:
        request = beacon_pb.WriteIntentRequest(
            pool=_pool(pool), host_id=for_host_id, term=intent.term, number=intent.number, lease_number=intent.lease_number
        )
        block: bytes = self._call(host_id, "WriteIntent", request, timeout_s=BEACON_DEADLINE_S).intent
        return block

    def reboot_host(self, host_id: str, key: CommandKey, boot_id: str, *, ends_guests: bool) -> bool:
        request = host_pb.RebootHostRequest(boot_id=boot_id, ends_guests=ends_guests)
        has_begun: bool = self._command(host_id, "RebootHost", request, key, timeout_s=SLOW_DEADLINE_S).has_begun
        return has_begun

    # --- jobs and membership -------------------------------------------------------------------------------------------

    def get_job(self, host_id: str, key: CommandKey) -> Job:
        request = pb.GetJobRequest(operation_id=key.operation_id, step=key.step, direction=_direction(key))
        return job_of(self._call(host_id, "GetJob", request).job)

    def cancel_job(self, host_id: str, key: CommandKey) -> Job:
        return job_of(self._command(host_id, "CancelJob", pb.CancelJobRequest(), key).job)

    def leave_fleet(self, host_id: str, key: CommandKey) -> tuple[str, ...]:
        response = self._command(host_id, "LeaveFleet", pb.LeaveFleetRequest(), key, timeout_s=SLOW_DEADLINE_S)
        return tuple(response.undone)

    # --- the wire ------------------------------------------------------------------------------------------------------

    def _command(
        self, host_id: str, verb: str, request: Any, key: CommandKey, *, timeout_s: float = DEADLINE_S, secrets_of: str = ""
    ) -> Any:
        """Send a mutating verb under `key`, stamped with the host's incarnation and lease as last committed. `secrets_of`: whose
        secrets it needs, where that is not the key's subject."""
        address = self._address(host_id)
        stamped = replace(key, incarnation=address.incarnation, lease_number=address.lease_number)
        request.key.CopyFrom(to_proto(stamped, command_pb2.CommandKey))
        try:
            return self._send(address, verb, request, timeout_s)
        except Unavailable as error:
            if error.code != KEY_MISSING:
                raise
        # It did nothing: its agent, or libvirt there, has begun anew since it was last given them, or never was.
        self._give_keys(address, secrets_of or key.subject_id)
        return self._send(address, verb, request, timeout_s)

    def _give_keys_first(self, host_id: str, key: CommandKey, volumes: Sequence[VolumeSpec]) -> None:
        """Before encrypted volumes are made: an agent too old to know what that is fails here, and makes no plain ones."""
        if any(volume.is_encrypted for volume in volumes):
            self._give_keys(self._address(host_id), key.subject_id)

    def _give_secrets(self, host_id: str, subject_id: str) -> None:
        if self._seals_of(subject_id):
            self._give_keys(self._address(host_id), subject_id)

    def _give_keys(self, address: AgentAddress, subject_id: str) -> None:
        """Open the keys of the subject's volumes, and of no other, at the last moment before they are sent over mutual TLS."""
        seals = self._seals_of(subject_id)
        request = secret_pb.GiveVolumeKeysRequest()
        for one, sealed in seals.items():
            opened = self._open_seal(sealed, one)
            if kind_of(one) == "pool":
                request.pool_secrets.add(pool_id=one, secret=opened)
            else:
                request.keys.add(volume_id=one, key=opened)
        self._send(address, "GiveVolumeKeys", request, DEADLINE_S)

    def _call(
        self, host_id: str, verb: str, request: Any, *, timeout_s: float = DEADLINE_S, waits_for_agent: bool = False
    ) -> Any:
        return self._send(self._address(host_id), verb, request, timeout_s, waits_for_agent=waits_for_agent)

    def _address(self, host_id: str) -> AgentAddress:
        address = self._lookup(host_id)
        if not address.address:
            raise Unavailable("host-has-no-agent", f"host {host_id} never connected", host_id=host_id)
        return address

    def _send(self, address: AgentAddress, verb: str, request: Any, timeout_s: float, *, waits_for_agent: bool = False) -> Any:
        stub = self._stubs(address)[_STUB_OF[verb]]
        started, outcome = time.monotonic(), "ok"
        try:
            return getattr(stub, verb)(request, timeout=timeout_s, wait_for_ready=waits_for_agent)
        except grpc.RpcError as failed:
            error = from_rpc_error(failed, peer=f"agent of {address.host_id}")
            outcome = error.kind.value
            raise error from failed
        finally:
            self._on_call(verb, outcome, time.monotonic() - started)

    def _stubs(self, address: AgentAddress) -> _Stubs:
        """Return the stubs of the host's channel. A stub has an object for each verb: made once, not for each call."""
        key = (address.host_id, address.address)
        evicted = None
        with self._lock:
            line = self._lines.get(key)
            if line is None:
                channel = self._connect(*key)
                line = self._lines[key] = (
                    channel,
                    tuple(stub(channel) for stub, _module, _service in _STUBS),
                )
                if len(self._lines) > CHANNELS_MAX:
                    _, (evicted, _stubs) = self._lines.popitem(last=False)
            self._lines.move_to_end(key)
        if evicted is not None:
            evicted.close()
        return line[1]


def _pool(pool: PoolSpec) -> storage_pb2.PoolSpec:
    return to_proto(pool, storage_pb2.PoolSpec)


def _volume(volume: VolumeSpec) -> storage_pb2.VolumeSpec:
    return to_proto(volume, storage_pb2.VolumeSpec)


def _domain(domain: DomainSpec) -> domain_pb2.DomainSpec:
    return to_proto(domain, domain_pb2.DomainSpec)


def _domain_or_none(domain: DomainSpec | None) -> domain_pb2.DomainSpec | None:
    return _domain(domain) if domain is not None else None


def _format(value: DiskFormat) -> Any:
    return enum_number(storage_pb2.DiskFormat.DESCRIPTOR, value)


def _direction(key: CommandKey) -> Any:
    return enum_number(command_pb2.Direction.DESCRIPTOR, key.direction)
