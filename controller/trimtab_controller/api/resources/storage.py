"""Pools, images, uploads, volumes and networks as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.render import etag_of
from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.services.images import ImageView
from trimtab_controller.services.networks import NetworkView
from trimtab_controller.services.pools import PoolView, source_name
from trimtab_controller.services.volumes import VolumeView


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceResource:
    capacity_bytes: int
    available_bytes: int
    claimed_bytes: int
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHostResource:
    host: str
    # unknown, ready, failed, or unresponsive: its storage does not answer there.
    state: str
    problem: str
    observed_at: datetime | None
    # None for a shared pool, whose space is one, and where nothing was observed.
    space: SpaceResource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolVmResource:
    name: str
    project: str
    # '' where it has no home.
    host: str
    state: str
    # What becomes of it where the pool is not usable there; '' where nothing is wrong.
    way_back: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolResource:
    id: str
    name: str
    kind: str
    path: str
    # What is mounted there; '' for a directory of the hosts.
    source: str
    is_shared: bool
    is_default: bool
    # What placement leaves free, in thousandths of the capacity.
    reserve_permille: int
    # When each host had read a marker that another wrote; None: not proven, so no volumes yet.
    sharing_proven_at: datetime | None
    # Of a shared pool, else the sum over its hosts.
    space: SpaceResource
    hosts: tuple[PoolHostResource, ...]
    # With disks in it; of a pool that was asked for by name.
    vms: tuple[PoolVmResource, ...]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAnswer:
    operation: OperationResource
    pool: PoolResource


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaResource:
    pool: str
    # '' on a shared pool.
    host: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResource:
    id: str
    name: str
    project: str
    is_shared: bool
    kind: str
    format: str
    virtual_size_bytes: int
    file_size_bytes: int
    source_sha256: str
    stored_sha256: str
    # importing, ready or failed.
    state: str
    labels: dict[str, str]
    replicas: tuple[ReplicaResource, ...]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAnswer:
    operation: OperationResource
    image: ImageResource


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadResource:
    upload_id: str
    size_bytes: int
    sha256: str
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeResource:
    id: str
    name: str
    project: str
    pool: str
    # '' on a shared pool or not yet made.
    host: str
    format: str
    size_bytes: int
    allocated_bytes: int
    # '' for one that stands alone.
    image: str
    generation: int
    # absent, present or unknown.
    state: str
    # '' where no vm has it.
    vm: str
    index: int | None
    is_deleted_with_vm: bool
    # How fast a guest may use it; 0: as fast as the pool.
    iops_limit: int
    bandwidth_limit_mib_s: int
    is_encrypted: bool
    # Of an iSCSI pool.
    lun: int | None
    # '' where it does not move; else the pool that it is going to, or what is left of it in the one that it has left.
    moving_to: str
    leaving: str
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeAnswer:
    operation: OperationResource
    volume: VolumeResource


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkHostResource:
    host: str
    bridge: str
    # unknown, ready or failed.
    state: str
    problem: str
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterResource:
    gateway: str
    # The addresses that are given to routers and as floating ones, both ends among them.
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkResource:
    id: str
    name: str
    project: str
    is_shared: bool
    kind: str
    bridge: str
    vlan: int
    mtu: int
    subnet: str
    # Of an overlay network; '' for none. `ipv6`: slaac or dhcp, how guests come by their addresses there.
    subnet6: str
    ipv6: str
    dhcp: bool
    # Of an overlay network: others of its project that name the same one are reached by it.
    router: str
    # Of the way out of overlay networks; null of every other network.
    outer: OuterResource | None
    # Of the LAN of another network on a bridge, which seeds say; '' and none where the operator named none.
    gateway: str
    dns: tuple[str, ...]
    hosts: tuple[NetworkHostResource, ...]
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkAnswer:
    operation: OperationResource
    network: NetworkResource


def render_pool(view: PoolView) -> PoolResource:
    pool = view.pool
    spaces = {
        name: SpaceResource(
            capacity_bytes=one.capacity_bytes,
            available_bytes=one.available_bytes,
            claimed_bytes=one.claimed_bytes,
            observed_at=one.observed_at,
        )
        for name, one in view.spaces.items()
    }
    seen = [space.observed_at for space in spaces.values() if space.observed_at is not None]
    return PoolResource(
        id=pool.id,
        name=pool.name,
        kind=pool.kind.value,
        path=pool.path,
        source=source_name(pool.kind.value, pool.settings),
        reserve_permille=pool.reserve_permille,
        is_shared=pool.is_shared,
        is_default=view.is_default,
        sharing_proven_at=pool.sharing_proven_at,
        space=SpaceResource(
            capacity_bytes=sum(space.capacity_bytes for space in spaces.values()),
            available_bytes=sum(space.available_bytes for space in spaces.values()),
            claimed_bytes=sum(space.claimed_bytes for space in spaces.values()),
            observed_at=min(seen) if seen else None,
        ),
        hosts=tuple(
            PoolHostResource(host=name, state=one.state, problem=one.problem, observed_at=one.observed_at, space=spaces.get(name))
            for name, one in sorted(view.hosts.items())
        ),
        vms=tuple(
            PoolVmResource(name=one.name, project=one.project, host=one.host, state=one.state, way_back=one.way_back)
            for one in view.vms
        ),
        version=pool.version,
        etag=etag_of(pool.version),
        created_at=pool.created_at,
    )


def render_image(view: ImageView) -> ImageResource:
    image = view.image
    return ImageResource(
        id=image.id,
        name=image.name,
        project=view.project_name,
        is_shared=image.project_id == "",
        kind=image.kind,
        format=image.format.value,
        virtual_size_bytes=image.virtual_size_bytes,
        file_size_bytes=image.file_size_bytes,
        source_sha256=image.source_sha256,
        stored_sha256=image.stored_sha256,
        state=image.state,
        labels=dict(image.labels),
        replicas=tuple(ReplicaResource(pool=one.pool_name, host=one.host_name, state=one.replica.state) for one in view.replicas),
        version=image.version,
        etag=etag_of(image.version),
        created_at=image.created_at,
    )


def render_volume(view: VolumeView) -> VolumeResource:
    volume = view.volume
    return VolumeResource(
        id=volume.id,
        name=volume.name,
        project=view.project_name,
        pool=view.pool_name,
        host=view.host_name,
        format=volume.format.value,
        size_bytes=volume.size_bytes,
        allocated_bytes=volume.allocated_bytes,
        image=view.image_name,
        generation=volume.generation,
        state=volume.observed_state,
        vm=view.vm_name,
        index=volume.disk_index,
        is_deleted_with_vm=volume.is_deleted_with_vm,
        iops_limit=volume.iops_limit,
        bandwidth_limit_mib_s=volume.bandwidth_limit_mib_s,
        is_encrypted=volume.is_encrypted,
        lun=int(volume.unit) if volume.unit else None,
        moving_to=view.other_pool_name if volume.move_state == "going" else "",
        leaving=view.other_pool_name if volume.move_state == "left" else "",
        version=volume.version,
        etag=etag_of(volume.version),
        created_at=volume.created_at,
    )


def render_network(view: NetworkView) -> NetworkResource:
    network = view.network
    return NetworkResource(
        id=network.id,
        name=network.name,
        project=view.project_name,
        is_shared=network.project_id == "",
        kind=network.kind,
        bridge=network.bridge,
        vlan=network.vlan,
        mtu=network.mtu,
        subnet=network.subnet,
        subnet6=network.subnet6,
        ipv6=("dhcp" if network.settings["has_dhcp6"] else "slaac") if network.subnet6 else "",
        dhcp=network.has_dhcp,
        router=str(network.settings.get("router", "")),
        outer=OuterResource(**network.settings["outer"]) if "outer" in network.settings else None,
        gateway=network.gateway,
        dns=network.dns,
        hosts=tuple(
            NetworkHostResource(
                host=name,
                bridge=one.bridge or network.bridge,
                state=one.state,
                problem=one.problem,
                observed_at=one.observed_at,
            )
            for name, one in sorted(view.hosts.items())
        ),
        version=network.version,
        etag=etag_of(network.version),
        created_at=network.created_at,
    )
