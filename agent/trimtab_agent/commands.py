"""Runs one mutating command: one at a time per subject, admitted by the journal, in a bounded pool, its outcome recorded.

A command outlives its call: when the caller's deadline ends while a thread is in libvirt, the work goes on and is recorded, and a
repeat of the same key joins it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

import structlog
from google.protobuf.message import Message

from trimtab_agent import edge
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.job_rows import JobName, name_of
from trimtab_agent.replay import Act, Answered, Refused, Replay
from trimtab_agent.workers import WorkerPool
from trimtab_protos.agent.v1 import command_pb2
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import Conflict, DeadlineExceeded, Internal, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import CommandKey

R = TypeVar("R", bound=Message)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _InFlight:
    request_hash: bytes
    task: "asyncio.Task[Any]"


class SubjectLocks:
    """One lock per subject, for as long as somebody holds or wants it. For one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, subject_id: str) -> AsyncIterator[None]:
        lock, wanted = self._locks.get(subject_id, (asyncio.Lock(), 0))
        self._locks[subject_id] = (lock, wanted + 1)
        try:
            async with lock:
                yield
        finally:
            _, wanted = self._locks[subject_id]
            if wanted == 1:
                del self._locks[subject_id]
            else:
                self._locks[subject_id] = (lock, wanted - 1)


class Commands:
    """The mutating commands of one agent; lives on one event loop."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._locks = SubjectLocks()
        self._in_flight: dict[JobName, _InFlight] = {}

    async def run(
        self,
        request: Message,
        response_class: type[R],
        act: Callable[[CommandKey, Stamp], R],
        *,
        pool: WorkerPool,
        needs_lease: bool = False,
        remembers: bool = True,
        is_word_of_the_moment: bool = False,
    ) -> R:
        """Return the response of the command in `request`, acted on now or recorded earlier; `act` runs in `pool`.

        `is_word_of_the_moment`: a repeat may ask for something else, since what it carries is read anew each time and others change it
        too (a vm's spec has its firewall); one that comes while another is under way waits for that and is acted on afterwards.
        """
        key = key_of(request)
        request_hash = hash_of(request)
        name = name_of(key)
        while is_word_of_the_moment and (before := self._in_flight.get(name)) is not None:
            await asyncio.wait([before.task])
        running = self._in_flight.get(name)
        if running is not None:
            await edge.wait(self._replay.check(key))
            if running.request_hash != request_hash:
                raise Conflict("key-reused", "another request came under this operation and step", step=key.step)
            response: R = await asyncio.shield(running.task)
            return response
        work = self._run(
            key,
            request_hash,
            response_class,
            act,
            pool=pool,
            needs_lease=needs_lease,
            remembers=remembers,
            is_word_of_the_moment=is_word_of_the_moment,
        )
        task = asyncio.get_running_loop().create_task(work)
        self._in_flight[name] = _InFlight(request_hash, task)
        task.add_done_callback(lambda _task: self._forget(name))
        return await asyncio.shield(task)

    async def check(self, key: CommandKey) -> None:
        """Raise what refuses a command that leaves no entry of its own."""
        await edge.wait(self._replay.check(key))

    async def drain(self, timeout_s: float) -> None:
        """Wait for the commands that are under way, at most this long; the journal tells the next agent about the rest."""
        tasks = [entry.task for entry in self._in_flight.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    @property
    def under_way(self) -> int:
        return len(self._in_flight)

    async def _run(
        self,
        key: CommandKey,
        request_hash: bytes,
        response_class: type[R],
        act: Callable[[CommandKey, Stamp], R],
        *,
        pool: WorkerPool,
        needs_lease: bool,
        remembers: bool,
        is_word_of_the_moment: bool,
    ) -> R:
        async with self._locks.hold(key.subject_id):
            admission = await edge.wait(
                self._replay.admit(
                    key,
                    request_hash,
                    needs_lease=needs_lease,
                    remembers=remembers,
                    is_word_of_the_moment=is_word_of_the_moment,
                )
            )
            match admission:
                case Answered():
                    return response_class.FromString(admission.response)
                case Refused():
                    raise admission.error
                case Act():
                    pass
                case _:
                    assert_never(admission)

            def call() -> R:
                if needs_lease:
                    # Again, since the disk and the pool's queue may have taken longer than the lease had left.
                    self._replay.require_lease(key)
                return act(key, admission.stamp)

            response = await self._act(key, call, pool)
            if remembers:
                await self._record(key, response)
            return response

    async def _act(self, key: CommandKey, call: Callable[[], R], pool: WorkerPool) -> R:
        try:
            return await edge.in_pool(pool, call)
        except TrimtabError as error:
            if error.code != "no-lease":  # a refusal, not an outcome
                await self._record_failure(key, error)
            raise
        except Exception as error:
            log.exception("command broke", operation_id=key.operation_id, step=key.step, subject_id=key.subject_id)
            broken = Internal("command-broke", "the agent failed at this command; its log says why", step=key.step)
            await self._record_failure(key, broken)
            raise broken from error

    async def _record(self, key: CommandKey, response: Message) -> None:
        try:
            await edge.wait(self._replay.answer(key, response.SerializeToString()))
        except Unavailable as error:
            raise DeadlineExceeded(
                "outcome-not-recorded", "the command took effect but the agent's journal could not record it; send it again"
            ) from error

    async def _record_failure(self, key: CommandKey, error: TrimtabError) -> None:
        try:
            await edge.wait(self._replay.fail(key, error))
        except Unavailable:
            # The entry stays "begun": a repeat acts again, which is what an unrecorded error comes to anyway.
            log.warning("error not recorded", operation_id=key.operation_id, step=key.step, code=error.code)

    def _forget(self, name: JobName) -> None:
        entry = self._in_flight.pop(name)
        if not entry.task.cancelled():
            entry.task.exception()  # taken here, since the caller may be gone


def key_of(request: Message) -> CommandKey:
    """Return the command's key. InvalidRequest where it has none."""
    if not request.HasField("key"):
        raise InvalidRequest("key-missing", "the command has no key", field="key")
    message: command_pb2.CommandKey = request.key  # type: ignore[attr-defined]
    return from_proto(message, CommandKey)


def hash_of(request: Message) -> bytes:
    """Return what two sendings of one command share: everything but the key and what is drawn anew for each (tickets)."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("key")
    for name in ("ticket", "ttl_s"):
        if name in content.DESCRIPTOR.fields_by_name:
            content.ClearField(name)
    if "peer" in content.DESCRIPTOR.fields_by_name and content.HasField("peer"):
        content.peer.ClearField("ticket")  # type: ignore[attr-defined]
    digest = hashlib.sha256(content.DESCRIPTOR.full_name.encode() + b"\0")
    digest.update(content.SerializeToString(deterministic=True))
    return digest.digest()
