"""Messages of the upkeep of backup repositories, as `messages.py` has the others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    removed_bytes: int
    condemned_bytes: int
    repacked_bytes: int
    kept_bytes: int
    waits_for: tuple[str, ...]
    retired_data_keys: tuple[int, ...] = ()
