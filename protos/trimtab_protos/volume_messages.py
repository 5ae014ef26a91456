"""The messages of volumes that move between pools. As `messages.py`, which is full."""

from dataclasses import dataclass

from trimtab_protos.messages import DiskFormat, PoolSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMove:
    volume_id: str
    source_pool: PoolSpec
    target_pool: PoolSpec
    source_format: DiskFormat
    target_format: DiskFormat
    size_bytes: int
    vm_id: str = ""
    keeps_running: bool = False
    bandwidth_bytes_s: int = 0
    takes_state_files: bool = False
