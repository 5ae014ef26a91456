"""Counters of running guests, for metrics: optional beside `Hypervisor`, since no command depends on them."""

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class BalloonStatistics:
    """What one guest's balloon leaves it."""

    vm_id: str
    floor_mib: int
    ceiling_mib: int
    given_mib: int
    usable_mib: int | None
    """What its programs could still take; None: it does not say."""


@runtime_checkable
class BalloonSource(Protocol):
    """A hypervisor whose guests have balloons."""

    def balloon_statistics(self) -> tuple[BalloonStatistics, ...]:
        """Return the balloons as last looked at; never blocks."""

    def balloon_changes(self) -> Mapping[str, int]:
        """Return how often a balloon's target was changed, by reason."""


@runtime_checkable
class StatisticsSource(Protocol):
    """A hypervisor that counts."""

    def domain_statistics(self) -> tuple[DomainStatistics, ...]:
        """Return the counters of every running domain of ours; blocks."""
