"""Valid objects for tests of the libvirt implementation; a test says only what matters to it."""

import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab_agent.hypervisor.base import JobControl
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainSpec,
    ImageSource,
    JobProgress,
    NetworkKind,
    NetworkSpec,
    NicSpec,
    PoolSpec,
    SeedSpec,
    UploadSource,
)

CLUSTER_BYTES = 65536
MIB = 1 << 20


def pool(path: Path | str = "/srv/pools/fast", **changes: Any) -> PoolSpec:
    return replace(PoolSpec(pool_id="pool-fast", path=str(path), name="fast"), **changes)


def disk(index: int = 0, **changes: Any) -> DiskSpec:
    return replace(
        DiskSpec(volume_id=f"vol-01hdisk{index}", pool_id="pool-fast", format=DiskFormat.QCOW2, index=index), **changes
    )


def bridge_network(**changes: Any) -> NetworkSpec:
    return replace(NetworkSpec(network_id="net-lan", kind=NetworkKind.BRIDGE, name="lan", bridge="br0"), **changes)


def nat_network(**changes: Any) -> NetworkSpec:
    network = NetworkSpec(network_id="net-nat", kind=NetworkKind.NAT, name="nat", subnet="10.20.0.0/24", has_dhcp=True)
    return replace(network, **changes)


def nic(index: int = 0, **changes: Any) -> NicSpec:
    return replace(
        NicSpec(nic_id=f"nic-01hcard{index}", network_id="net-lan", mac=f"52:54:00:00:00:0{index + 1}", index=index), **changes
    )


def domain(**changes: Any) -> DomainSpec:
    spec = DomainSpec(
        vm_id="vm-01hweb",
        uuid="6f1b3c1e-7c1f-5d0a-9a53-0a4b5c6d7e8f",
        name="web1",
        project="default",
        machine="pc-q35-7.2",
        cpu_model="Nehalem",
        vcpus=1,
        vcpus_max=1,
        memory_mib=96,
        memory_max_mib=96,
        disks=(disk(),),
        nics=(nic(),),
        seed=SeedSpec(meta_yaml="instance-id: i-1\n"),
        networks=(bridge_network(),),
        pools=(pool(),),
    )
    return replace(spec, **changes)


def qcow2_header(
    *,
    version: int = 3,
    backing: bytes = b"",
    backing_offset: int | None = None,
    cluster_bits: int = 16,
    virtual_size_bytes: int = 64 * MIB,
    crypt_method: int = 0,
    l1_entries: int = 1,
    l1_offset: int = 3 * CLUSTER_BYTES,
    refcount_offset: int = CLUSTER_BYTES,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    incompatible: int = 0,
    autoclear: int = 0,
    header_length: int = 104,
    extensions: bytes = b"",
    file_bytes: int = 4 * CLUSTER_BYTES,
) -> bytes:
    """Return a qcow2 file whose header says just this."""
    offset = (512 if backing else 0) if backing_offset is None else backing_offset
    header = struct.pack(
        ">4sIQIIQIIQ",
        b"QFI\xfb",
        version,
        offset,
        len(backing),
        cluster_bits,
        virtual_size_bytes,
        crypt_method,
        l1_entries,
        l1_offset,
    )
    header += struct.pack(">QIIQ", refcount_offset, refcount_clusters, snapshots, 0)
    if version >= 3:
        header += struct.pack(">QQQII", incompatible, 0, autoclear, 4, header_length)
    content = bytearray(file_bytes)
    content[: len(header)] = header
    start = header_length if version >= 3 else 72
    content[start : start + len(extensions)] = extensions
    if backing:
        content[512 : 512 + len(backing)] = backing
    return bytes(content)


@dataclass
class Control:
    """A `JobControl` that remembers."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    reports: list[JobProgress] = field(default_factory=list)

    def report(self, progress: JobProgress) -> None:
        self.reports.append(progress)


@dataclass
class BytesReader:
    """A `SourceReader` that yields what it was given, whatever the source says."""

    content: bytes
    block_bytes: int = MIB

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        for start in range(0, len(self.content), self.block_bytes):
            yield self.content[start : start + self.block_bytes]


def upload(content: bytes) -> UploadSource:
    return UploadSource(upload_id="up-1", size_bytes=len(content))
