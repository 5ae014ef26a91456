"""What the store keeps of failover."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FencePathRow:
    """A power device of a host and its last readiness test (`test_power` '' : never tested; a message is what is wrong)."""

    host_id: str
    position: int
    name: str
    agent: str
    options: Mapping[str, str]
    secret_file: str
    secret: str
    test_wanted_at: datetime | None
    tested_at: datetime | None
    test_power: str
    test_message: str

    @property
    def is_test_due(self) -> bool:
        """Somebody asked for a test after the last one."""
        return self.test_wanted_at is not None and (self.tested_at is None or self.tested_at < self.test_wanted_at)

    @property
    def is_ready(self) -> bool:
        """The device answered the last test, and nothing contradicted it."""
        return self.tested_at is not None and self.test_power in {"on", "off"} and not self.test_message


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverRow:
    """One loss of one host. `evidence`: its timeline, oldest first, each {at, what, proof}."""

    id: str
    host_id: str
    state: str
    proof: str
    evidence: tuple[Mapping[str, Any], ...]
    created_at: datetime
    fenced_at: datetime | None
    returned_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverVmRow:
    failover_id: str
    vm_id: str
    operation_id: str
    state: str
    why: str
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverControl:
    """What operators said. `released`, `confirmed_off`: host -> {by, reason}."""

    is_paused: bool = False
    frozen: str = ""
    released: Mapping[str, Any]
    confirmed_off: Mapping[str, Any]
