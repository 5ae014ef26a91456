"""The one stream to the controller: renews the lease, delivers the outbox, and comes back wherever it was cut.

    dial ── Hello ──► Welcome ──► beating ── cut, silent, or asked to move ──► dial the next gateway (full jitter)

The heartbeat waits for nothing but the stream: load, pools and inventory are cached by the observer, and the outbox has its own
task. A gateway that stops acknowledging is left well before the lease ends, so that another one can renew it.
Lives on one event loop; `Lease` is written here only.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from trimtab_agent import edge
from trimtab_agent.clock import Clock
from trimtab_agent.given_numbers import GivenNumbers
from trimtab_agent.guard import NO_WARDEN, Warden
from trimtab_agent.jobs import Jobs
from trimtab_agent.lease import Lease
from trimtab_agent.observer import KnownPools, Observer
from trimtab_agent.outbox import ItemKind, Outbox, StoredItem
from trimtab_agent.workers import WorkerPool
from trimtab_protos.agent.v1 import agent_service_pb2, domain_pb2, inventory_pb2, storage_pb2
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.controller.v1.gateway_service_pb2_grpc import GatewayServiceStub
from trimtab_protos.errors import TrimtabError, Unavailable
from trimtab_protos.messages import Inventory, NetworkSpec, PoolSpec

log = structlog.get_logger(__name__)

OPEN_TIMEOUT_S = 8.0
"""For dial and Welcome together. About half a lease: another gateway can be tried before it ends; and longer than a gateway's
database needs when every host of the fleet comes at once."""
HELLO_OBSERVE_TIMEOUT_S = 2.0
"""How long a Hello waits for a fresh list of domains before it says that the hypervisor does not answer."""
FIRST_OBSERVE_TIMEOUT_S = 6.0
"""The first inventory of a boot probes which acceleration really runs guests, which takes up to 2 s."""
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 5.0
SILENT_BEATS = 2.5
"""Heartbeats without any ack after which the gateway is left."""
OUTBOX_BATCH = 100
OUTBOX_RESEND_S = 10.0
"""A gateway may drop a batch when its database is slow; what was not acknowledged is sent again after this."""
RESYNC_AFTER_S = 10.0
"""A session lives at least this long before a hypervisor that came back makes it be opened anew; the first one of an agent, which
often begins while libvirt is still starting, a fifth of it."""
OUTBOX_RETRY_S = 5.0
"""Between attempts to read an outbox whose disk is full or broken; heartbeats go on meanwhile."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who opens the session."""

    host_id: str
    incarnation: str
    boot_id: str
    agent_address: str


class WelcomeListener(Protocol):
    def __call__(
        self, pools: Sequence[PoolSpec], networks: Sequence[NetworkSpec], ca_bundle_sha256: str, gateways: Sequence[str]
    ) -> None:
        """Called on the event loop with what a Welcome told; must not block."""


class _SessionEnded(Exception):
    """The stream is to be left; `is_planned` means without a back-off."""

    def __init__(self, why: str, *, is_planned: bool = False) -> None:
        super().__init__(why)
        self.is_planned = is_planned


class Session:
    """Keeps one host's session open until it is stopped."""

    def __init__(
        self,
        identity: Identity,
        *,
        gateways: Sequence[str],
        dial: Callable[[str], grpc.aio.Channel],
        lease: Lease,
        observer: Observer,
        outbox: Outbox,
        jobs: Jobs,
        known_pools: KnownPools,
        query: WorkerPool,
        clock: Clock,
        rng: random.Random,
        on_welcome: WelcomeListener,
        warden: Warden = NO_WARDEN,
        given: GivenNumbers,
    ) -> None:
        """`dial` makes a channel with the credentials in force; it is called for every session."""
        self._identity = identity
        self._gateways = list(gateways)
        rng.shuffle(self._gateways)
        self._dial = dial
        self._lease = lease
        self._observer = observer
        self._outbox = outbox
        self._jobs = jobs
        self._known_pools = known_pools
        self._query = query
        self._clock = clock
        self._rng = rng
        self._on_welcome = on_welcome
        self._warden = warden
        self._given = given
        self._sequence = 0
        self._sent_digest = ""
        self._was_up_at_hello = False
        self._acknowledged = 0
        self._is_stopping = False
        self._leave = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._wake_outbox = asyncio.Event()
        self._failed_in_a_row = 0
        self._told_failure: str | None = ""
        self.gateway = ""
        """Address of the gateway whose Welcome is in force; empty without a session."""
        self.reconnects = 0
        self.last_ack_boottime = 0.0
        self.last_heartbeat_s = 0.0
        """From sending the newest acknowledged heartbeat to its ack."""
        outbox.notify(self._wake_from_thread)

    async def run(self) -> None:
        """Keep a session open; returns after `stop`."""
        while not self._is_stopping:
            if not self._gateways:
                raise Unavailable("no-gateways", "the agent's configuration names no gateway")
            address = self._gateways[0]
            is_planned = False
            try:
                await self._serve(address)
            except _SessionEnded as end:
                is_planned = end.is_planned
                log.info("session left", gateway=address, why=str(end))
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError, TrimtabError) as error:
                self._log_failure(address, error)
            except Exception:
                # A host that stops trying would lose its lease and its guests: log the defect, try the next gateway.
                log.exception("session broke", gateway=address)
            self.gateway = ""
            self._lease.forget_sent()
            if self._is_stopping:
                return
            self.reconnects += 1
            self._gateways.append(self._gateways.pop(0))
            if not is_planned:
                await self._back_off()

    async def stop(self) -> None:
        """Close the stream, so that the gateway learns it at once; the lease runs to its end."""
        self._is_stopping = True
        self._leave.set()

    def resync(self) -> None:
        """Open the session anew now: the certificate changed, or the hypervisor came back and every domain must be told."""
        self._leave.set()

    # One session.

    async def _serve(self, address: str) -> None:
        self._leave.clear()
        channel = self._dial(address)
        try:
            call = GatewayServiceStub(channel).Session()
            try:
                welcome = await self._open(call)
                self.gateway = address
                self._failed_in_a_row, self._told_failure = 0, ""
                log.info("session opened", gateway=address, host_id=self._identity.host_id)
                await self._keep(_Stream(call), welcome)
            finally:
                call.cancel()
        finally:
            await channel.close()

    async def _open(self, call: "grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]") -> pb.Welcome:
        hello = await self._hello()
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            await call.write(pb.SessionRequest(hello=hello))
            answer = await _read(call)
        if answer is None or answer.WhichOneof("body") != "welcome":
            # The status says why (revoked, wrong certificate); asking for it raises it.
            await _raise_status(call)
            raise _SessionEnded("the gateway answered no Welcome")
        self._take_welcome(answer.welcome)
        return answer.welcome

    async def _hello(self) -> pb.Hello:
        domains = await self._observe_domains()
        inventory = self._observer.inventory if domains is not None else None
        self._sent_digest = inventory.digest if inventory else ""
        self._was_up_at_hello = domains is not None
        given = self._given.highest
        return pb.Hello(
            host_id=self._identity.host_id,
            incarnation=self._identity.incarnation,
            boot_id=self._identity.boot_id,
            agent_address=self._identity.agent_address,
            # A Hello without inventory says that the hypervisor does not answer: its domains are unknown, not absent.
            inventory=_inventory_message(inventory),
            domains=domains or (),
            lease_number=given.lease_number,
            database_mark=given.database_mark,
        )

    async def _observe_domains(self) -> list[domain_pb2.DomainObservation] | None:
        """Return every domain; None where the hypervisor does not say. Never waits long: the lease runs."""
        try:
            is_first = self._observer.inventory is None
            async with asyncio.timeout(FIRST_OBSERVE_TIMEOUT_S if is_first else HELLO_OBSERVE_TIMEOUT_S):
                if self._observer.inventory is None:
                    await edge.in_pool(self._query, self._observer.refresh_inventory)
                domains = await edge.in_pool(self._query, self._observer.refresh_domains)
        except (TimeoutError, TrimtabError) as error:
            log.warning("hypervisor does not answer for Hello", error=str(error) or type(error).__name__)
            return None
        return [to_proto(domain, domain_pb2.DomainObservation) for domain in domains]

    def _take_welcome(self, welcome: pb.Welcome) -> None:
        self._given.take(database_mark=welcome.database_mark)
        if welcome.gateway_addresses:
            others = [address for address in welcome.gateway_addresses if address != self._gateways[0]]
            self._rng.shuffle(others)
            self._gateways = [self._gateways[0], *others]
        pools = [from_proto(pool, PoolSpec) for pool in welcome.pools]
        networks = [from_proto(network, NetworkSpec) for network in welcome.networks]
        self._known_pools.replace_all(pools)
        self._observer.pools_changed()
        self._on_welcome(pools, networks, welcome.ca_bundle_sha256, tuple(welcome.gateway_addresses))

    async def _keep(self, stream: "_Stream", welcome: pb.Welcome) -> None:
        ttl_s, every_s = welcome.lease_ttl_ms / 1000, welcome.heartbeat_every_ms / 1000
        if ttl_s <= 0 or every_s <= 0:
            raise _SessionEnded("the gateway's Welcome has no lease time or no heartbeat period")
        self.last_ack_boottime = self._clock.boottime_s()
        tasks = [
            asyncio.create_task(self._read(stream, ttl_s)),
            asyncio.create_task(self._beat(stream, every_s)),
            asyncio.create_task(self._deliver(stream)),
            asyncio.create_task(self._wait_to_leave()),
        ]
        try:
            done, _pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # every task ends only by raising

    async def _wait_to_leave(self) -> None:
        await self._leave.wait()
        raise _SessionEnded("stopping" if self._is_stopping else "asked to open it anew", is_planned=True)

    async def _beat(self, stream: "_Stream", every_s: float) -> None:
        was_up = self._was_up_at_hello
        opened_s = due_s = self._clock.boottime_s()
        while True:
            silent_s = self._clock.boottime_s() - self.last_ack_boottime
            if silent_s > SILENT_BEATS * every_s:
                raise _SessionEnded(f"no ack for {silent_s:.1f} s")
            is_up = self._observer.is_hypervisor_up
            is_known = is_up and self._observer.inventory is not None
            if is_known and not was_up and self._clock.boottime_s() - opened_s > self._resync_after_s():
                # Events of the gap are lost; a Hello carries every domain.
                raise _SessionEnded("the hypervisor is back", is_planned=True)
            was_up = was_up and is_up
            async with asyncio.timeout(SILENT_BEATS * every_s):
                await stream.write(lambda: pb.SessionRequest(heartbeat=self._heartbeat()))
            self._observer.refresh()
            if self._jobs.running():
                self._wake_outbox.set()
            due_s = max(due_s + every_s, self._clock.boottime_s())
            await asyncio.sleep(due_s - self._clock.boottime_s())

    def _resync_after_s(self) -> float:
        return RESYNC_AFTER_S / 5 if self.reconnects == 0 else RESYNC_AFTER_S

    def _heartbeat(self) -> pb.Heartbeat:
        """Return the next heartbeat; its sending time counts for the lease, so call it immediately before writing."""
        self._sequence += 1
        now_s = self._clock.boottime_s()
        self._lease.sent(self._sequence, at_boottime=now_s)
        warden = self._warden.report
        self._warden.told(self._sequence, warden)
        inventory = self._observer.inventory
        is_new = inventory is not None and inventory.digest != self._sent_digest
        if inventory is not None and is_new:
            self._sent_digest = inventory.digest
        return pb.Heartbeat(
            sequence=self._sequence,
            sent_boottime_ms=int(now_s * 1000),
            sent_unix_ms=self._clock.now_ms(),
            lease_number=self._lease.current(now=now_s).number,
            load=to_proto(self._observer.load, pb.HostLoad),
            pools=[to_proto(pool, storage_pb2.PoolObservation) for pool in self._observer.pools()],
            inventory=_inventory_message(inventory) if is_new else None,
            is_hypervisor_up=self._observer.is_hypervisor_up,
            is_warden_armed=warden.is_armed,
            kill_ms=warden.kill_ms,
            clock_rate_ppm=warden.clock_rate_ppm,
            warden_missing=warden.missing,
            warden_vm_ids=warden.vm_ids,
            beacon_pool_id=warden.beacon_pool_id,
            beacon_age_ms=int(warden.beacon_age_s * 1000) + 1 if warden.beacon_age_s is not None else 0,
            beacon_problem=warden.beacon_problem,
        )

    async def _read(self, stream: "_Stream", ttl_s: float) -> None:
        async for response in stream.responses():
            match response.WhichOneof("body"):
                case "heartbeat_ack":
                    self._take_ack(response.heartbeat_ack, ttl_s)
                case "outbox_ack":
                    self._acknowledged = max(self._acknowledged, response.outbox_ack.sequence)
                    self._outbox.acknowledge(response.outbox_ack.sequence)
                case "reconnect":
                    delay_s = self._rng.uniform(0, max(0, response.reconnect.within_ms) / 1000)
                    self._loop.call_later(delay_s, self._leave.set)
                case _:
                    pass  # a newer gateway's message; what must be understood is announced by capability flags
        raise _SessionEnded("the gateway closed the stream")

    def _take_ack(self, ack: pb.HeartbeatAck, ttl_s: float) -> None:
        now_s = self._clock.boottime_s()
        before = self._lease.current(now=now_s)
        sent_at = self._lease.sent_at(ack.sequence)
        if sent_at is not None:
            self.last_heartbeat_s = now_s - sent_at
        self.last_ack_boottime = now_s
        self._given.take(lease_number=ack.lease_number, database_mark=ack.database_mark)
        if ack.is_granted:
            self._warden.heard(ack.sequence)
        is_extended = self._lease.acknowledged(ack.sequence, number=ack.lease_number, is_granted=ack.is_granted, ttl_s=ttl_s)
        after = self._lease.current(now=now_s)
        if is_extended:
            self._warden.renewed(after.expires_at_boottime, ttl_s=ttl_s, lease_number=after.number)
        if (before.number, before.is_live) != (after.number, after.is_live):
            log.info("lease changed", number=after.number, is_live=after.is_live)

    async def _deliver(self, stream: "_Stream") -> None:
        sent = self._acknowledged
        sent_at_s = self._clock.boottime_s()
        while True:
            self._wake_outbox.clear()
            if sent > self._acknowledged and self._clock.boottime_s() - sent_at_s > OUTBOX_RESEND_S:
                sent = self._acknowledged
            try:
                items = await edge.wait(self._outbox.read(after=sent, limit=OUTBOX_BATCH))
            except TrimtabError as error:
                log.warning("outbox cannot be read", code=error.code)
                await asyncio.sleep(OUTBOX_RETRY_S)
                continue
            if items:
                sent, sent_at_s = items[-1].sequence, self._clock.boottime_s()
                await stream.write_outbox([_item_message(item) for item in items])
                continue
            if progress := self._progress():
                await stream.write_outbox(progress)
            is_owed = sent > self._acknowledged
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OUTBOX_RESEND_S if is_owed else None):
                    await self._wake_outbox.wait()

    def _progress(self) -> list[pb.OutboxItem]:
        """Running jobs as items of sequence 0: not durable, not acknowledged, superseded by the next."""
        return [pb.OutboxItem(sequence=0, job=job) for job in self._jobs.running()]

    # Between sessions.

    async def _back_off(self) -> None:
        ceiling_s = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2**self._failed_in_a_row)
        self._failed_in_a_row = min(self._failed_in_a_row + 1, 10)
        with contextlib.suppress(TimeoutError):
            # Full jitter: ten thousand agents of a gateway that died must not dial its successor at once.
            async with asyncio.timeout(self._rng.uniform(0, ceiling_s)):
                await self._leave.wait()

    def _log_failure(self, address: str, error: BaseException) -> None:
        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or type(error).__name__
        # Once per reason: a host that was cut and then revoked must say the second too, and none says it each half minute.
        write = log.debug if reason == self._told_failure else log.warning
        self._told_failure = reason
        write("session failed", gateway=address, why=reason)

    def _wake_from_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent is stopping
            self._loop.call_soon_threadsafe(self._wake_outbox.set)


class _Stream:
    """Writes of several tasks, one at a time as gRPC wants it."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]") -> None:
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, build: Callable[[], pb.SessionRequest]) -> None:
        """Write what `build` returns when it is this caller's turn."""
        async with self._writing:
            await self._call.write(build())

    async def write_outbox(self, items: Sequence[pb.OutboxItem]) -> None:
        await self.write(lambda: pb.SessionRequest(outbox=pb.Outbox(items=items)))

    async def responses(self) -> AsyncIterator[pb.SessionResponse]:
        while (response := await _read(self._call)) is not None:
            yield response
        await _raise_status(self._call)


async def _read(call: "grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]") -> pb.SessionResponse | None:
    response = await call.read()
    return response if isinstance(response, pb.SessionResponse) else None


async def _raise_status(call: "grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]") -> None:
    """Raise the status with which the gateway ended the stream, unless it is OK."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise _SessionEnded(f"the gateway ended the stream: {code.name} {await call.details()}")


def _inventory_message(inventory: Inventory | None) -> inventory_pb2.Inventory | None:
    return to_proto(inventory, inventory_pb2.Inventory) if inventory is not None else None


def _item_message(item: StoredItem) -> pb.OutboxItem:
    match item.kind:
        case ItemKind.JOB:
            return pb.OutboxItem(sequence=item.sequence, job=agent_service_pb2.Job.FromString(item.body))
        case ItemKind.DOMAIN_EVENT:
            return pb.OutboxItem(sequence=item.sequence, domain_event=pb.DomainEvent.FromString(item.body))
