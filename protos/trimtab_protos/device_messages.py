"""Messages about a guest's devices and resources as frozen dataclasses; see `messages.py`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CdromSpec:
    image_id: str = ""
    pool_id: str = ""
    boot_order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestResources:
    balloon_min_mib: int = 0
    cpu_weight: int = 0
    cpu_limit_percent: int = 0
