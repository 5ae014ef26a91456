"""What a gateway knows of its hosts right now, and the copy of it in Redis that the other processes read.

The copy is write-behind: changed hosts each second, everything each 10 s, each value with the time it was heard at, so that a
reader tells its age. Losing Redis loses nothing: the next write after its return has everything.
"""

import asyncio
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from trimtab_controller import metrics
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb

log = structlog.get_logger(__name__)

HOSTS_KEY = "trimtab:hosts"
REDIS_TIMEOUT_S = 1.0
PAUSE_AFTER_FAILURE_S = 5.0
EVERYTHING_EVERY_S = 10.0


@dataclass(slots=True)
class HostState:
    """One host of this gateway; outlives its session, so that silence is judged after the stream broke too."""

    host_id: str
    name: str
    lease_number: int
    connectivity: HostConnectivity
    heard_boottime_s: float
    heard_unix_ms: int
    granted_boottime_s: float | None = None
    """When a renewal was last granted; its age is what a revocation is acknowledged with."""
    guards: tuple[HostGuard, ...] = (HostGuard(),)
    """What the lease is counted on for, as recorded; several while a record is under way or its outcome is unknown."""
    is_recording_guard: bool = False
    refused_sequence: int = 0
    """The newest heartbeat, where it was not granted."""
    clock_rate_ppm: int = 0
    warden_missing: tuple[str, ...] = ()
    warden_vm_ids: tuple[str, ...] = ()
    beacon_age_ms: int = 0
    """As the host said with its last heartbeat; 0: it did not renew since it booted."""
    beacon_problem: str = ""
    skew_ms: int = 0
    is_hypervisor_up: bool = True
    is_warden_armed: bool = False
    kill_ms: int = 0
    load: pb.HostLoad = field(default_factory=pb.HostLoad)
    inventory_digest: str = ""
    is_changing: bool = False
    """A transition is being committed."""
    is_overtaking: bool = False
    """A lease number above the one that the host holds is being committed."""

    def as_json(self, gateway_id: str) -> str:
        load = self.load
        return json.dumps(
            {
                "gateway": gateway_id,
                "at_ms": self.heard_unix_ms,
                "connectivity": self.connectivity.value,
                "lease_number": self.lease_number,
                "skew_ms": self.skew_ms,
                "is_hypervisor_up": self.is_hypervisor_up,
                "is_warden_armed": self.is_warden_armed,
                "kill_ms": self.kill_ms,
                "clock_rate_ppm": self.clock_rate_ppm,
                "warden_missing": self.warden_missing,
                "warden_vm_ids": self.warden_vm_ids,
                "beacon_pool_id": self.guards[-1].beacon_pool_id,
                "beacon_age_ms": self.beacon_age_ms,
                "beacon_problem": self.beacon_problem,
                "load": {
                    "cpu_used_permille": load.cpu_used_permille,
                    "cpu_steal_permille": load.cpu_steal_permille,
                    "memory_available_mib": load.memory_available_mib,
                    "cpu_pressure": load.cpu_pressure,
                    "memory_pressure": load.memory_pressure,
                    "io_pressure": load.io_pressure,
                    "running_domains": load.running_domains,
                    "has_uplink_carrier": load.has_uplink_carrier,
                },
            },
            separators=(",", ":"),
        )


class HostStateMirror:
    """Writes host states to Redis; a failure is counted, waited out for a few seconds, and otherwise ignored."""

    def __init__(self, url: str, *, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._broken_until_s = 0.0
        self._everything_at_s = 0.0

    async def write(self, states: Mapping[str, HostState], changed: Iterable[str], *, boottime_s: float) -> bool:
        """Write the changed hosts, or all of them when that is due; False where nothing was written."""
        if boottime_s < self._broken_until_s:
            return False
        is_everything = boottime_s >= self._everything_at_s
        chosen = states if is_everything else {host_id: states[host_id] for host_id in changed if host_id in states}
        if not chosen:
            return True
        document: dict[Any, Any] = {host_id: state.as_json(self._gateway_id) for host_id, state in chosen.items()}
        if await self._attempt(boottime_s, self._redis.hset(HOSTS_KEY, mapping=document)) is None:
            return False
        if is_everything:
            self._everything_at_s = boottime_s + EVERYTHING_EVERY_S
        return True

    async def forget_all_but(self, members: Collection[str], *, boottime_s: float) -> None:
        """Drop what is left of hosts that were removed while no gateway knew them."""
        found = await self._attempt(boottime_s, self._redis.hkeys(HOSTS_KEY))
        strangers = [key.decode() for key in found or () if key.decode() not in members]
        await self.forget(strangers, boottime_s=boottime_s)

    async def forget(self, host_ids: Iterable[str], *, boottime_s: float) -> None:
        """Drop hosts that were removed from the fleet."""
        if gone := list(host_ids):
            await self._attempt(boottime_s, self._redis.hdel(HOSTS_KEY, *gone))

    async def _attempt(self, boottime_s: float, command: Any) -> Any:
        """Return Redis' answer, None where it gave none."""
        try:
            answer = await asyncio.wait_for(command, timeout=2 * REDIS_TIMEOUT_S)
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REDIS_FAILURES.inc()
            if self._broken_until_s == 0.0:
                log.warning("redis does not take host states", error=str(error)[:200])
            self._broken_until_s = boottime_s + PAUSE_AFTER_FAILURE_S
            self._everything_at_s = 0.0  # whatever it lost, it gets again
            return None
        self._broken_until_s = 0.0
        return answer

    async def close(self) -> None:
        await self._redis.aclose()


def decode(document: Mapping[bytes | str, bytes | str]) -> dict[str, dict[str, Any]]:
    """Return host states by host id from what `HGETALL trimtab:hosts` answered."""
    return {(host_id if isinstance(host_id, str) else host_id.decode()): json.loads(state) for host_id, state in document.items()}
