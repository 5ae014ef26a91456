"""Counters of running guests, for metrics: optional beside `Hypervisor`, since no command depends on them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    device: str
    read_bytes: int
    read_requests: int
    written_bytes: int
    write_requests: int


@dataclass(frozen=True, slots=True)
class NicStatistics:
    mac: str
    received_bytes: int
    received_packets: int
    transmitted_bytes: int
    transmitted_packets: int
    dropped_packets: int


@dataclass(frozen=True, slots=True)
class DomainStatistics:
    """What one guest used since its process started."""

    vm_id: str
    blocks: tuple[BlockStatistics, ...] = ()
    nics: tuple[NicStatistics, ...] = ()


@runtime_checkable
class StatisticsSource(Protocol):
    """A hypervisor that counts."""

    def domain_statistics(self) -> tuple[DomainStatistics, ...]:
        """Return the counters of every running domain of ours; blocks."""
