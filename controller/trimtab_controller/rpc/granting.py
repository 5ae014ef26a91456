"""The gateway's own right to grant leases: a row that it keeps alive, and the revocations that end granting to one host.

The engine may start a vm elsewhere once every gateway has acknowledged a revocation or has lost its row. So a gateway grants
only while its last renewal, counted from before it was sent, is younger than the ttl; it stops for a revoked host first and
acknowledges afterwards, with how long ago it last granted that host a renewal: an age, since no two machines share a clock.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.store import leases
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.leases import BeatWatch, Lease
from trimtab_protos.errors import Unavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)

DRIFT_ALLOWANCE = 0.03
"""Part of the ttl that is never used: the engine counts it on another clock."""
FORGOTTEN_AFTER_S = 600.0
"""A gateway whose row was seen unchanged for so long is gone; its row is removed."""


class GrantingRight:
    """Everything but the two threads' SQL happens in the event loop's thread, so that a check and an answer cannot be torn apart."""

    def __init__(self, database: Database, clock: Clock, *, gateway_id: str, address: str, ttl_s: float) -> None:
        self.gateway_id = gateway_id
        self._name = leases.GATEWAY_PREFIX + gateway_id
        self._database = database
        self._clock = clock
        self._context = {"address": address}
        self._ttl_s = ttl_s
        self._held: Lease | None = None
        self._until_s = 0.0
        self._revoked: dict[str, int] = {}
        self._others = BeatWatch()
        self._live_others: frozenset[str] = frozenset()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="granting")

    # Asked at every heartbeat.

    @property
    def is_alive(self) -> bool:
        return self._clock.boottime_s() < self._until_s

    def may_grant(self, host_id: str) -> bool:
        return host_id not in self._revoked and self.is_alive

    @property
    def live_peers(self) -> frozenset[str]:
        """The ids of the other gateways that seem to live; each may have sessions that we do not see."""
        return self._live_others

    # Kept up by the gateway's tasks.

    async def renew(self) -> bool:
        """Renew our row, or take a new term of it where somebody removed it. False where the database does not answer."""
        started_s = self._clock.boottime_s()
        try:
            held, others = await self._in_thread(lambda: self._database.write(self._renew, durable=False))
            if held is None:
                # A taken row must survive a power cut, else the engine would believe that nobody grants.
                held = await self._in_thread(lambda: self._database.write(self._take))
        except Unavailable as error:
            log.warning("granting right not renewed", error=error.message, alive_for_s=round(self._until_s - started_s, 1))
            metrics.GRANTING.set(self.is_alive)
            return False
        self._held = held
        if held is not None:
            self._until_s = started_s + self._ttl_s * (1 - DRIFT_ALLOWANCE)
        now_s = self._clock.boottime_s()
        self._live_others = frozenset(
            other.name.removeprefix(leases.GATEWAY_PREFIX) for other in others if not self._others.is_expired(other, now_s)
        )
        forgotten = [other for other in others if self._others.unchanged_for_s(other, now_s) > FORGOTTEN_AFTER_S]
        if forgotten:
            await self._in_thread(lambda: self._database.write(lambda session: _remove_all(session, forgotten), durable=False))
        metrics.GRANTING.set(self.is_alive)
        return held is not None

    def _renew(self, session: Session) -> tuple[Lease | None, list[Lease]]:
        now = self._clock.now()
        held = leases.renew(session, self._held, now=now) if self._held else None
        others = [one for one in leases.named(session, leases.GATEWAY_PREFIX) if one.name != self._name]
        return held, others

    def _take(self, session: Session) -> Lease | None:
        """Take our row where it is new or was removed; one that somebody else holds under our name is theirs."""
        now = self._clock.now()
        seen = leases.read(session, self._name)
        if seen is not None and seen.owner != self.gateway_id:
            return None
        ttl_ms = int(self._ttl_s * 1000)
        return leases.take(session, self._name, owner=self.gateway_id, seen=seen, ttl_ms=ttl_ms, now=now, context=self._context)

    async def learn_revocations(self, granted_ago_ms: Callable[[str], int]) -> None:
        """Read the committed revocations, stop granting to those hosts, then acknowledge what is new."""
        known = await self._in_thread(lambda: self._database.read(leases.revocations))
        self._revoked = {one.host_id: one.number for one in known}
        fresh = {one.host_id: one.number for one in known if self.gateway_id not in one.acknowledgements}
        if not fresh:
            return
        # No grant can follow: the host is in `_revoked`, and we are in the loop's thread.
        ago_ms = {host: granted_ago_ms(host) for host in fresh}

        def acknowledge(session: Session) -> None:
            for host_id, number in sorted(fresh.items()):
                leases.acknowledge(session, host_id, number=number, gateway_id=self.gateway_id, granted_ago_ms=ago_ms[host_id])

        await self._in_thread(lambda: self._database.write(acknowledge))
        log.info("revocations acknowledged", host_ids=sorted(fresh))

    async def give_up(self) -> None:
        """Stop granting now and remove our row: nobody has to wait for its end."""
        self._until_s = 0.0
        held, self._held = self._held, None
        if held is None:
            return
        seen = held

        def remove(session: Session) -> None:
            present = leases.read(session, seen.name)
            if present is not None and (present.owner, present.term) == (seen.owner, seen.term):
                leases.remove(session, present)

        try:
            await self._in_thread(lambda: self._database.write(remove, durable=False))
        except Unavailable as error:
            log.warning("granting right not given back; it ends by itself", error=error.message)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _remove_all(session: Session, forgotten: list[Lease]) -> None:
    for lease in forgotten:
        leases.remove(session, lease)
