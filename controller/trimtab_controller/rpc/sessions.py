"""One session of a host with this gateway: Hello, then heartbeats and outbox batches until one side leaves.

    connecting -> (certificate, SQL) -> open -> ended: by the host, by a newer session of it, removal, revocation, our drain

The stream is served by one task. Heartbeats are answered from memory at once; outbox batches are committed by the group committer
in a task of their own and acknowledged after the commit, in order, so that a slow disk never delays a lease.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from trimtab_controller import metrics
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.rpc.host_states import HostState
from trimtab_controller.rpc.peers import Peer
from trimtab_controller.services import behind, sessions
from trimtab_controller.services import outbox as outbox_service
from trimtab_controller.services.job_updates import JobUpdate
from trimtab_controller.services.sessions import Opened, Opening
from trimtab_controller.store import host_guards, host_reports
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.agent.v1 import agent_service_pb2, command_pb2, domain_pb2, inventory_pb2, storage_pb2
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.errors import Conflict, Internal, InvalidRequest, PermissionDenied, TrimtabError, Unavailable
from trimtab_protos.messages import DomainObservation, Inventory, JobProgress, JobState, PoolObservation

if TYPE_CHECKING:
    from trimtab_controller.rpc.gateway import Gateway

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 15.0
MESSAGES_PER_S = 50.0
MESSAGES_BURST = 400.0
"""A healthy agent sends a message every few seconds; more than this is a defect or an attack, and would cost others their leases."""
OUTBOX_ITEMS_MAX = 1000
OUTBOX_BATCHES_WAITING_MAX = 32
OUTBOX_RETRY_S = 1.0
PROGRESS_EVERY_S = 2.0
READS_WITHIN_S = 5.0
"""How long the end of a session waits for a host to take what was being sent to it."""

_GRANTED, _REFUSED = metrics.HEARTBEATS.labels("granted"), metrics.HEARTBEATS.labels("refused")

Context = grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse]


class StreamBroken(Exception):
    """The host is gone; what it was not told it asks for again."""


@dataclass(slots=True)
class Budget:
    """A token bucket."""

    per_s: float
    burst: float
    left: float = field(init=False)
    at_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.burst

    def take(self) -> bool:
        now_s = time.monotonic()
        self.left = min(self.burst, self.left + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        self.left = max(-1.0, self.left - 1)
        return self.left >= 0


class HostSession:
    """Serves one stream. `end` may be called by any task of the loop."""

    def __init__(self, gateway: "Gateway", peer: Peer, context: Context) -> None:
        self.peer = peer
        self.host_id = peer.host_id
        self.state: HostState | None = None
        self._gateway = gateway
        self._context = context
        self._sending = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._budget = Budget(MESSAGES_PER_S, MESSAGES_BURST)
        self._tasks: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[Any] | None = None
        self._ended_with: TrimtabError | None = None
        self._batches: asyncio.Queue[tuple[int, pb.Outbox]] = asyncio.Queue(OUTBOX_BATCHES_WAITING_MAX)
        self._queued_up_to = 0
        self._acknowledged_up_to = 0

    def end(self, why: TrimtabError) -> None:
        """End the stream with a typed error; the host connects again if it still may."""
        if self._ended_with is None and self._task is not None:
            self._ended_with = why
            self._task.cancel()

    async def serve(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Run the session to its end. Raises the typed error that ended it, if one did."""
        self._task = asyncio.current_task()
        try:
            opened = await self._open(requests)
            await self._send(pb.SessionResponse(welcome=self._gateway.welcome(opened)))
            self._start(self._drain_outbox())
            async for request in requests:
                if not self._budget.take():
                    raise InvalidRequest("session-flooded", f"at most {MESSAGES_PER_S:g} messages a second on a session")
                await self._dispatch(request)
        except asyncio.CancelledError:
            if self._ended_with is None:
                raise
            assert self._task is not None
            self._task.uncancel()
            raise self._ended_with from None
        finally:
            self._gateway.leave(self)
            self._is_over = True
            for task in self._tasks:
                task.cancel()
            if self._writes:
                await asyncio.wait(self._writes, timeout=READS_WITHIN_S)

    # --- Hello -----------------------------------------------------------------------------------------------------------

    async def _open(self, requests: AsyncIterator[pb.SessionRequest]) -> Opened:
        try:
            first = await asyncio.wait_for(anext(requests), timeout=HELLO_TIMEOUT_S)
        except (StopAsyncIteration, TimeoutError) as error:
            raise InvalidRequest("hello-missing", "a session starts with a Hello") from error
        if first.WhichOneof("body") != "hello":
            raise InvalidRequest("hello-missing", "a session starts with a Hello")
        if not self._gateway.may_open(self.host_id):
            raise Unavailable("session-too-soon", "this host opens sessions too fast; retry later", host_id=self.host_id)
        hello = first.hello
        if hello.host_id != self.host_id:
            raise PermissionDenied("host-id-mismatch", "the Hello names another host than its certificate", host_id=self.host_id)
        opening = Opening(
            host_id=self.host_id,
            certificate_serial=self.peer.serial,
            gateway_id=self._gateway.gateway_id,
            incarnation=hello.incarnation,
            boot_id=hello.boot_id,
            agent_address=hello.agent_address,
            inventory=from_proto(hello.inventory, Inventory) if hello.HasField("inventory") else None,
            domains=tuple(from_proto(domain, DomainObservation) for domain in hello.domains),
            lease_number=hello.lease_number,
            database_mark=hello.database_mark,
            certificate_dates=self.peer.dates,
        )
        clock = self._gateway.clock
        opened = await self._gateway.committer.commit(lambda session: sessions.open_session(session, opening, clock.now()))
        self.state = HostState(
            host_id=self.host_id,
            name=opened.name,
            lease_number=opened.lease_number,
            connectivity=HostConnectivity.UP,
            heard_boottime_s=clock.boottime_s(),
            heard_unix_ms=_unix_ms(clock.now().timestamp()),
            inventory_digest=hello.inventory.digest,
            is_hypervisor_up=hello.HasField("inventory"),
            guards=(opened.guard,),
        )
        self._gateway.enter(self)
        log.info("session opened", host_id=self.host_id, host=opened.name, lease_number=opened.lease_number)
        return opened

    # --- messages --------------------------------------------------------------------------------------------------------

    async def _dispatch(self, request: pb.SessionRequest) -> None:
        match request.WhichOneof("body"):
            case "heartbeat":
                await self._heartbeat(request.heartbeat)
            case "outbox":
                self._outbox(request.outbox)
            case _:
                raise InvalidRequest("message-unexpected", "an open session takes heartbeats and outbox batches")

    async def _heartbeat(self, beat: pb.Heartbeat) -> None:
        state, gateway = self.state, self._gateway
        assert state is not None
        now_ms = _unix_ms(gateway.clock.now().timestamp())
        state.heard_boottime_s = gateway.clock.boottime_s()
        state.heard_unix_ms = now_ms
        state.skew_ms = beat.sent_unix_ms - now_ms if beat.sent_unix_ms else 0
        state.is_hypervisor_up = beat.is_hypervisor_up
        state.is_warden_armed = beat.is_warden_armed
        state.kill_ms = beat.kill_ms
        state.load.CopyFrom(beat.load)
        state.clock_rate_ppm = beat.clock_rate_ppm
        state.warden_missing = tuple(beat.warden_missing)
        state.warden_vm_ids = tuple(beat.warden_vm_ids)
        state.beacon_age_ms, state.beacon_problem = beat.beacon_age_ms, beat.beacon_problem[:200]
        is_granted = self._may_count_on(state, beat) and gateway.right.may_grant(self.host_id)
        state.refused_sequence = 0 if is_granted else beat.sequence
        if is_granted:
            state.granted_boottime_s = gateway.clock.boottime_s()
        (_GRANTED if is_granted else _REFUSED).inc()
        await self._send(
            pb.SessionResponse(
                heartbeat_ack=pb.HeartbeatAck(
                    sequence=beat.sequence,
                    lease_number=state.lease_number,
                    is_granted=is_granted,
                    database_mark=gateway.database_mark,
                )
            )
        )
        if beat.lease_number > state.lease_number and not state.is_overtaking:
            state.is_overtaking = True
            self._start(self._overtake(state, beat.lease_number))
        gateway.note_heartbeat(state)
        for pool in beat.pools:
            gateway.note_pool(self.host_id, pool)
        if beat.HasField("inventory") and beat.inventory.digest != state.inventory_digest:
            state.inventory_digest = beat.inventory.digest
            self._start(self._commit_inventory(beat.inventory))

    def _may_count_on(self, state: HostState, beat: pb.Heartbeat) -> bool:
        """Tell whether what is recorded of the host's warden covers this renewal; where it changed, begin to record it.

        A renewal that says less than the record is granted only after the record says so too: whoever counts on the lease after
        our own end reads the record.
        """
        heard = HostGuard.heard(is_armed=beat.is_warden_armed, kill_ms=beat.kill_ms, beacon_pool_id=beat.beacon_pool_id)
        if state.guards != (heard,) and not state.is_recording_guard:
            state.is_recording_guard = True
            state.guards = (*state.guards, heard)
            self._start(self._record_guard(state, heard))
        return all(guard.covers(heard) for guard in state.guards)

    async def _record_guard(self, state: HostState, heard: HostGuard) -> None:
        now = self._gateway.clock.now()
        try:
            is_written = await self._gateway.committer.commit(
                lambda session: host_guards.write(session, self.host_id, heard, lease_number=state.lease_number, now=now)
            )
        finally:
            state.is_recording_guard = False
        if not is_written:
            return  # a newer session speaks for the host
        state.guards = (heard,)
        await self._grant_late(state)
        log.info("host guard recorded", host_id=self.host_id, is_armed=heard.is_armed, kill_ms=heard.kill_ms)

    async def _overtake(self, state: HostState, lease_number: int) -> None:
        """Take a number above the one that the host holds: of an agent that did not say it in its Hello."""
        now = self._gateway.clock.now()
        try:
            number = await self._gateway.committer.commit(
                lambda session: behind.overtake(
                    session, self.host_id, lease_number=lease_number, session_number=state.lease_number, now=now
                )
            )
        finally:
            state.is_overtaking = False
        if number is not None:
            state.lease_number = number

    async def _grant_late(self, state: HostState) -> None:
        """Grant the heartbeat that waited for the record: a host whose warden is to end nobody any more needs to know it soon."""
        sequence = state.refused_sequence
        if not sequence or not self._gateway.right.may_grant(self.host_id):
            return
        state.refused_sequence, state.granted_boottime_s = 0, self._gateway.clock.boottime_s()
        ack = pb.HeartbeatAck(sequence=sequence, lease_number=state.lease_number, is_granted=True)
        await self._send(pb.SessionResponse(heartbeat_ack=ack))

    async def _commit_inventory(self, message: inventory_pb2.Inventory) -> None:
        inventory, now = from_proto(message, Inventory), self._gateway.clock.now()
        await self._gateway.committer.commit(
            lambda session: host_reports.store_inventory(session, self.host_id, inventory, now=now)
        )

    # --- outbox ------------------------------------------------------------------------------------------------------------

    def _outbox(self, outbox: pb.Outbox) -> None:
        """Queue a batch. Batches are committed one after the other: an acknowledgement speaks for everything before it."""
        if len(outbox.items) > OUTBOX_ITEMS_MAX:
            raise InvalidRequest("outbox-too-large", f"at most {OUTBOX_ITEMS_MAX} items in a batch")
        sequence = max((item.sequence for item in outbox.items), default=0)
        if sequence == 0 and not self._batches.empty():
            return  # figures of running jobs only; newer ones follow
        if 0 < sequence <= self._acknowledged_up_to:
            self._start(self._acknowledge(sequence))
        elif sequence == 0 or sequence > self._queued_up_to:
            try:
                self._batches.put_nowait((sequence, outbox))
            except asyncio.QueueFull:
                raise Unavailable(
                    "outbox-behind", "the controller cannot keep up with this host's reports; retry later"
                ) from None
            self._queued_up_to = max(self._queued_up_to, sequence)
        # Else it is queued already and will be acknowledged: the host grew impatient.

    async def _drain_outbox(self) -> None:
        while True:
            sequence, outbox = await self._batches.get()
            await self._commit_outbox(outbox)
            if sequence:
                await self._acknowledge(sequence)

    async def _commit_outbox(self, outbox: pb.Outbox) -> None:
        """Commit a batch, however long the database is away. An item that can never be taken is logged and counts as taken."""
        now = self._gateway.clock.now()
        works = [work for work in (self._read_item(item) for item in outbox.items) if work is not None]
        while works:
            try:
                recorded = await self._gateway.committer.commit(
                    lambda session: outbox_service.record(session, self.host_id, works, now)
                )
            except Unavailable as error:
                log.warning("outbox waits", host_id=self.host_id, items=len(works), error=error.message)
                await asyncio.sleep(OUTBOX_RETRY_S)
                continue
            for item in recorded.taken:
                metrics.OUTBOX_ITEMS.labels(_kind(item), "recorded").inc()
            for item in recorded.refused:
                metrics.OUTBOX_ITEMS.labels(_kind(item), "refused").inc()
            if recorded.has_woken:
                self._gateway.nudge()
            return

    async def _acknowledge(self, sequence: int) -> None:
        self._acknowledged_up_to = max(self._acknowledged_up_to, sequence)
        await self._send(pb.SessionResponse(outbox_ack=pb.OutboxAck(sequence=self._acknowledged_up_to)))

    def _read_item(self, item: pb.OutboxItem) -> JobUpdate | DomainObservation | None:
        kind = item.WhichOneof("body") or "unknown"
        try:
            match kind:
                case "job":
                    update = _job_update(item.job)
                    is_due = update.state is not JobState.RUNNING or self._gateway.is_progress_due(update.operation_id)
                    return update if is_due else None
                case "domain_event":
                    return from_proto(item.domain_event.domain, DomainObservation)
        except TrimtabError as error:
            log.warning("outbox item not understood", host_id=self.host_id, kind=kind, error=error.message)
        metrics.OUTBOX_ITEMS.labels(kind, "refused").inc()
        return None

    # --- plumbing ----------------------------------------------------------------------------------------------------------

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Any) -> None:
        """What is not acknowledged comes again; a failure here only needs to be seen."""
        try:
            await work
        except TrimtabError as error:
            log.warning("report not committed", host_id=self.host_id, error=error.message, code=error.code)
        except StreamBroken:
            log.debug("stream broke before an acknowledgement", host_id=self.host_id)
        except Exception:
            log.exception("report failed", host_id=self.host_id)
            self.end(Internal("internal", "the controller failed; its log has the cause"))

    async def ask_to_reconnect(self, within_ms: int) -> None:
        """Tell the host to go elsewhere before we stop."""
        try:
            await self._send(pb.SessionResponse(reconnect=pb.Reconnect(within_ms=within_ms)))
        except StreamBroken:
            log.debug("host left before it could be told", host_id=self.host_id)

    async def _send(self, response: pb.SessionResponse) -> None:
        """Send. Whoever waits for it may be cancelled, a write that has begun is not: gRPC takes no status while one is out
        (TOO_MANY_OPERATIONS), and the host would be left on a stream that nobody serves.
        """
        write = asyncio.create_task(self._write(response))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        await asyncio.shield(write)

    async def _write(self, response: pb.SessionResponse) -> None:
        async with self._sending:  # one write at a time on a stream
            if self._is_over:
                raise StreamBroken(self.host_id)
            try:
                await self._context.write(response)
            except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
                raise StreamBroken(self.host_id) from error


def superseded(host_id: str) -> TrimtabError:
    return Conflict("session-superseded", "a newer session of this host was opened", host_id=host_id)


def welcome_of(
    opened: Opened, *, lease_ttl_ms: int, heartbeat_every_ms: int, gateway_addresses: tuple[str, ...], bundle_sha256: str
) -> pb.Welcome:
    return pb.Welcome(
        lease_ttl_ms=lease_ttl_ms,
        heartbeat_every_ms=heartbeat_every_ms,
        gateway_addresses=gateway_addresses,
        pools=[to_proto(pool, storage_pb2.PoolSpec) for pool in opened.pools],
        networks=[to_proto(network, domain_pb2.NetworkSpec) for network in opened.networks],
        ca_bundle_sha256=bundle_sha256,
        database_mark=opened.database_mark,
    )


def pool_of(message: storage_pb2.PoolObservation) -> PoolObservation:
    return from_proto(message, PoolObservation)


def _job_update(job: agent_service_pb2.Job) -> JobUpdate:
    number = command_pb2.JobState.DESCRIPTOR.values_by_number.get(job.state)
    state = number.name.removeprefix("JOB_STATE_") if number else ""
    if state not in JobState.__members__:
        raise InvalidRequest("job-state-unknown", f"a job has state {job.state}, which this release does not know")
    return JobUpdate(
        operation_id=job.operation_id[:40],
        subject_id=job.subject_id[:40],
        step=job.step[:40],
        state=JobState[state],
        progress=from_proto(job.progress, JobProgress),
    )


def _kind(item: JobUpdate | DomainObservation) -> str:
    return "job" if isinstance(item, JobUpdate) else "domain_event"


def _unix_ms(timestamp_s: float) -> int:
    return int(timestamp_s * 1000)
