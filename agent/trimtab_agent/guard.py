"""The agent's side of the warden: which guests may start elsewhere, the lease that covers them, and whether the warden is armed.

    a vm that is kept is defined here ─► on the list, and the warden has said so, before anything may start it
    lease renewed ─► handed over     warden answers ─► "armed" in the next heartbeat     it does not ─► "not armed"

Fencing by lease is `on`, `off`, or `auto`: armed while the beacon renews, so that losing the controllers ends nobody. A host that is not
to be armed says so first, and only once a renewal that said it was granted does the warden get an empty list.

The controller counts on a lease only where the warden was armed with it. So while any heartbeat that may have been counted said
"armed", nothing is defined that the warden does not know, and where the warden is silent at the end of the lease the agent kills
in its place. A list may name more than what runs here: a guest is looked for when it is killed.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from trimtab_agent import beacon_state, warden_guests, warden_state
from trimtab_agent.beacon_state import Task
from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import restarts_elsewhere
from trimtab_agent.warden_guests import Guest
from trimtab_agent.warden_state import HandOver
from trimtab_protos.errors import TrimtabError, Unavailable
from trimtab_protos.messages import DomainObservation, DomainSpec, DomainState

log = structlog.get_logger(__name__)

HAND_OVER_EVERY_S = 1.0
ANSWER_TIMEOUT_S = 2.0
"""A warden that has not answered for so long is not armed. It answers within a millisecond."""
RECONNECT_S = 0.2
STAND_IN_AFTER_S = 1.0
"""After the end of the lease: how long the warden is left to do its work before the agent does it."""
DEFAULT_TTL_S = 15.0
BEACON_ROUNDS = 5
"""Renewals of a beacon in one lease."""
EXPECTED_S = 120.0
"""How long a vm stays on the list that was announced and is not in the hypervisor's list yet."""


class Warden(Protocol):
    """What session and servicer know of the warden."""

    @property
    def report(self) -> "WardenReport": ...

    def told(self, sequence: int, report: "WardenReport") -> None:
        """A heartbeat that says so is about to leave."""

    def heard(self, sequence: int) -> None:
        """The controller has granted that heartbeat: what it said is on record."""

    def renewed(self, deadline_s: float, *, ttl_s: float, lease_number: int) -> None:
        """The lease ends then, by CLOCK_BOOTTIME; it was renewed for `ttl_s`."""

    def expect(self, domain: DomainSpec, epoch: int) -> None:
        """Put a vm that is about to be defined here on the list; blocks for the warden's word. Unavailable: it gave none."""

    def listed(self, domains: Iterable[DomainObservation]) -> None:
        """The hypervisor listed all its domains. From any thread."""

    def seen(self, domain: DomainObservation) -> None:
        """One domain changed. From any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WardenReport:
    """What the heartbeat says of the warden."""

    is_armed: bool = False
    kill_ms: int = 0
    clock_rate_ppm: int = 0
    missing: tuple[str, ...] = ()
    """Rights that the kernel did not give, in words."""
    vm_ids: tuple[str, ...] = ()
    """Whom it would kill now."""
    beacon_pool_id: str = ""
    """Where the host wants to renew its lease as well; it does so once a renewal that said it was granted."""
    beacon_age_s: float | None = None
    """Since the beacon renewed last; None: it did not since the host booted."""
    beacon_problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaconPlace:
    """Where a host's beacon is to renew."""

    host_id: str
    boot_id: str
    pool_id: str
    pool_path: str


class NoWarden:
    """Of a host without one: simulated, or joined with `--no-lease-fencing`. Never armed, so it is recovered only after power fencing."""

    def __init__(self, why: str = "") -> None:
        self.report = WardenReport(missing=(why,) if why else ())

    def told(self, sequence: int, report: WardenReport) -> None: ...

    def heard(self, sequence: int) -> None: ...

    def renewed(self, deadline_s: float, *, ttl_s: float, lease_number: int) -> None: ...

    def expect(self, domain: DomainSpec, epoch: int) -> None: ...

    def listed(self, domains: Iterable[DomainObservation]) -> None: ...

    def seen(self, domain: DomainObservation) -> None: ...


NO_WARDEN = NoWarden()
NOT_ASKED_FOR = NoWarden("fencing by lease is off: lease_fencing in agent.toml")


class Guard:
    """Lives on the agent's event loop; `expect`, `listed` and `seen` may be called from any thread."""

    def __init__(
        self,
        *,
        runtime_dir: Path,
        state_dir: Path,
        clock: Clock,
        on_killed: Callable[[Sequence[str]], Awaitable[None]],
        needs_beacon: bool = False,
        beacon: Callable[[], BeaconPlace | None] = lambda: None,
        on_forbidden: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_killed` is told the vms that were killed, again until it returns without an error.

        `needs_beacon`: armed only while the beacon renews. `beacon`: where it is to, None: nowhere. `on_forbidden`: an intent of
        the controller's forbids the lease that it renews with us again; a session that is opened anew brings a higher one.
        """
        self._runtime_dir = runtime_dir
        self._killed_path = state_dir / warden_state.KILLED_NAME
        self._clock = clock
        self._on_killed = on_killed
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._guests: dict[str, tuple[Guest, float]] = {}
        self._is_known = False
        left = warden_state.read(runtime_dir)
        # A lease that a former agent of this boot handed over runs on.
        self._deadline_s = left.deadline_s if left is not None else 0.0
        self._sequence = 0
        self._changed_at = 0
        self._answer: dict[str, Any] = {}
        self._answered_s = float("-inf")
        self._waiting: dict[int, concurrent.futures.Future[None]] = {}
        self._wake = asyncio.Event()
        self._promises: dict[int, WardenReport] = {}
        self._promised = -1 if left is not None else 0
        """Newest heartbeat that said "armed" and may have been counted; 0: the controller knows that none holds; -1: a former agent's."""
        self._has_stood_in = False
        self._needs_beacon, self._beacon, self._on_forbidden = needs_beacon, beacon, on_forbidden
        self._was_wanted = not needs_beacon
        self._is_whole = False
        """Whether the newest list that was handed over names those whom the warden may have to end."""
        self._ttl_s = DEFAULT_TTL_S
        self._recorded_pool_id = ""
        """The beacon's pool in the newest renewal that was granted."""
        self._forbidden_lease = 0
        # A task of a former agent runs on until we know better: the controllers may be away while an agent is upgraded.
        self._task = beacon_state.read_task(runtime_dir)

    # --- what heartbeats say ---------------------------------------------------------------------------------------------------

    @property
    def report(self) -> WardenReport:
        place, state = self._beacon(), beacon_state.read_state(self._runtime_dir)
        # A pool in which no slot ever worked is none: to wait for an intent there would be in vain.
        pool_id = place.pool_id if place is not None and place.pool_id == state.pool_id and state.counter else ""
        is_wanted = self._is_wanted(pool_id, state)
        answer, is_fresh = self._answer, self._is_fresh()
        missing = () if is_wanted else (_why_not_wanted(pool_id, state),)
        return WardenReport(
            is_armed=is_wanted
            and is_fresh
            and self._is_whole
            and bool(answer.get("armed"))
            and int(answer["seq"]) >= self._changed_at,
            kill_ms=int(answer.get("kill_ms", 0)),
            clock_rate_ppm=int(answer.get("rate_ppm", 0)),
            missing=(*missing, *(str(word) for word in answer.get("missing", ()))),
            vm_ids=tuple(str(vm_id) for vm_id in answer.get("guests", ())) if is_fresh else (),
            beacon_pool_id=pool_id,
            beacon_age_s=self._clock.boottime_s() - state.renewed_s if pool_id and state.deadline_s else None,
            beacon_problem=_problem(state, age_s=self._clock.boottime_s() - state.renewed_s, ttl_s=self._ttl_s) if place else "",
        )

    def _is_wanted(self, pool_id: str, state: beacon_state.State) -> bool:
        """Tell whether the host is to be armed. A change is told to the warden before it is told to anybody else."""
        age_s = self._clock.boottime_s() - state.renewed_s
        is_wanted = not self._needs_beacon or (bool(pool_id) and state.pool_id == pool_id and age_s <= self._ttl_s)
        if is_wanted != self._was_wanted:
            self._was_wanted = is_wanted
            log.info("fencing by lease is to be armed" if is_wanted else "fencing by lease is to end", beacon=state.problem)
            self._changed_at = self._sequence + 1
            self._touch()
        return is_wanted

    @property
    def _may_kill(self) -> bool:
        """Whether the warden has to know our guests: the controller counts on it, or is to while the lease lives.

        Once the controller knows that none holds, a warden that is started late, with the lease long over, must find nobody to end.
        """
        ends_s = self._ends_s()
        return self._promised != 0 or (self._was_wanted and (ends_s == 0 or self._clock.boottime_s() < ends_s))

    def _ends_s(self) -> float:
        """Return when the lease ends by the later of its channels; with the controllers away the beacon alone keeps the guests."""
        return max(self._deadline_s, beacon_state.read_state(self._runtime_dir).deadline_s)

    def _is_fresh(self) -> bool:
        return self._is_known and self._clock.boottime_s() - self._answered_s <= ANSWER_TIMEOUT_S

    def told(self, sequence: int, report: WardenReport) -> None:
        self._promises[sequence] = report
        if report.is_armed:
            self._promised = sequence
        while len(self._promises) > 256:
            del self._promises[next(iter(self._promises))]

    def heard(self, sequence: int) -> None:
        # Heartbeats are handled in order: one that said "not armed" takes back every earlier word.
        report = self._promises.pop(sequence, None)
        if report is None:
            return
        self._recorded_pool_id = report.beacon_pool_id
        if not report.is_armed and sequence > self._promised and self._promised:
            self._promised = 0
            self._wake.set()

    # --- lease and list --------------------------------------------------------------------------------------------------------

    def renewed(self, deadline_s: float, *, ttl_s: float, lease_number: int) -> None:
        self._ttl_s = ttl_s
        self._task_beacon(lease_number)
        if beacon_state.read_state(self._runtime_dir).forbidden_lease >= lease_number > self._forbidden_lease:
            self._forbidden_lease = lease_number
            self._on_forbidden()
        if deadline_s > self._deadline_s:
            self._deadline_s = deadline_s
            self._has_stood_in = False
            self._wake.set()

    def _task_beacon(self, lease_number: int) -> None:
        """Let the beacon renew this lease where the controller has recorded that it must write its intent."""
        place = self._beacon()
        task = None
        if place is not None:
            task = Task(
                host_id=place.host_id,
                boot_id=place.boot_id,
                lease_number=lease_number if place.pool_id == self._recorded_pool_id else 0,
                pool_id=place.pool_id,
                pool_path=place.pool_path,
                ttl_s=self._ttl_s,
                every_s=self._ttl_s / BEACON_ROUNDS,
            )
        if task != self._task:
            beacon_state.write_task(self._runtime_dir, task)
            self._task = task

    def expect(self, domain: DomainSpec, epoch: int) -> None:
        if not restarts_elsewhere(domain):
            self._forget(domain.vm_id)
            return
        guest = Guest(domain.vm_id, domain.uuid, epoch)
        with self._lock:
            known = self._guests.get(domain.vm_id)
            self._guests[domain.vm_id] = (guest, self._clock.boottime_s())
        if not self._may_kill or (known is not None and known[0].uuid == guest.uuid and self.report.is_armed):
            return
        answered: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._announce, answered)
        try:
            answered.result(ANSWER_TIMEOUT_S)
        except concurrent.futures.TimeoutError as error:
            if self._promised:
                raise Unavailable(
                    "warden-silent",
                    f"{domain.vm_id} is not defined: this host's warden does not answer, and its lease is still counted on; "
                    "see `systemctl status trimtab-warden`",
                    vm_id=domain.vm_id,
                ) from error

    def listed(self, domains: Iterable[DomainObservation]) -> None:
        """Take the hypervisor's whole list: what is neither in it nor expected leaves ours."""
        now_s = self._clock.boottime_s()
        found = {seen.vm_id: _guest(seen) for seen in domains if seen.vm_id and seen.restarts_elsewhere}
        with self._lock:
            expected = {vm_id: entry for vm_id, entry in self._guests.items() if now_s - entry[1] < EXPECTED_S}
            self._guests = {**{vm_id: (guest, float("-inf")) for vm_id, guest in found.items()}, **expected}
        self._is_known = True
        self._touch()

    def seen(self, domain: DomainObservation) -> None:
        """Take one domain's change; an absent one leaves the list with the next whole list."""
        if domain.vm_id and domain.restarts_elsewhere and domain.state is not DomainState.ABSENT:
            with self._lock:
                self._guests.setdefault(domain.vm_id, (_guest(domain), float("-inf")))
            self._touch()

    def stand_down(self) -> None:
        """Clear the list: the host leaves its fleet, and its guests go on as nobody's."""
        with self._lock:
            self._guests = {}
        self._touch()

    def _forget(self, vm_id: str) -> None:
        with self._lock:
            gone = self._guests.pop(vm_id, None)
        if gone is not None:
            self._touch()

    def _touch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent is stopping
            self._loop.call_soon_threadsafe(self._announce, None)

    def _announce(self, answered: "concurrent.futures.Future[None] | None") -> None:
        self._changed_at = self._sequence + 1
        if answered is not None:
            self._waiting[self._changed_at] = answered
        self._wake.set()

    # --- the connection --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the warden informed until cancelled, and stand in for it where it is silent."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_connected())
            group.create_task(self._watch())

    async def _keep_connected(self) -> None:
        was_connected = True
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    str(self._runtime_dir / warden_state.SOCKET_NAME), limit=warden_state.LINE_MAX_BYTES
                )
            except OSError as error:
                if was_connected:
                    log.warning("warden is not there", error=str(error))
                was_connected = False
                if self._is_known:
                    # What a warden goes by that starts before we reach it.
                    warden_state.write(self._runtime_dir, self._next())
                await asyncio.sleep(RECONNECT_S)
                continue
            was_connected = True
            try:
                await self._converse(reader, writer)
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("warden is silent", error=str(error) or type(error).__name__)
            finally:
                writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            self._wake.clear()
            if self._is_known:
                handed = self._next()
                warden_state.write(self._runtime_dir, handed)
                writer.write(handed.as_line())
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    line = await reader.readline()
                if not line:
                    raise OSError("it closed the connection")
                self._take(json.loads(line))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HAND_OVER_EVERY_S):
                    await self._wake.wait()

    def _next(self) -> HandOver:
        self._sequence += 1
        may_kill = self._may_kill
        if may_kill and not self._is_whole:
            self._changed_at = self._sequence
        self._is_whole = may_kill
        with self._lock:
            guests = tuple(guest for _vm_id, (guest, _since_s) in sorted(self._guests.items())) if may_kill else ()
        return HandOver(self._sequence, self._deadline_s, guests)

    def _take(self, answer: dict[str, Any]) -> None:
        was_armed = bool(self._answer.get("armed"))
        self._answer, self._answered_s = answer, self._clock.boottime_s()
        if answer.get("armed") and not was_armed:
            log.info("warden is armed", pid=answer.get("pid"), missing=answer.get("missing"), kill_ms=answer.get("kill_ms"))
        for sequence in [number for number in self._waiting if number <= int(answer["seq"]) and answer.get("armed")]:
            waiting = self._waiting.pop(sequence)
            if not waiting.done():
                waiting.set_result(None)

    # --- standing in, and reporting ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(HAND_OVER_EVERY_S / 2)
            overdue_s = self._clock.boottime_s() - self._ends_s()
            is_over = self._deadline_s > 0 and overdue_s > STAND_IN_AFTER_S
            if is_over and self._promised and not self._has_stood_in and not self._is_fresh():
                with self._lock:
                    guests = [guest for guest, _since_s in self._guests.values()]
                log.error("the lease ended and the warden is silent: killing in its place", guests=len(guests))
                self._has_stood_in = await asyncio.to_thread(_kill, guests, self._killed_path, self._deadline_s)
            try:
                await self._report_killed()
            except (OSError, TrimtabError, KeyError) as error:
                log.warning("killed guests not reported yet", error=str(error))

    async def _report_killed(self) -> None:
        lines = warden_state.take_killed(self._killed_path)
        if lines:
            log.warning("guests were killed at the end of the lease", vm_ids=[line["vm_id"] for line in lines])
            await self._on_killed([str(line["vm_id"]) for line in lines])
            warden_state.forget_killed(self._killed_path)


def _problem(state: beacon_state.State, *, age_s: float, ttl_s: float) -> str:
    """Return why the beacon does not renew; one that hangs with its storage cannot say so itself."""
    if state.problem or age_s <= ttl_s:
        return state.problem
    return "it has not renewed for longer than a lease: the storage hangs, or trimtab-beacon does not run"


def _why_not_wanted(pool_id: str, state: beacon_state.State) -> str:
    if not pool_id and not state.problem:
        return "armed only where a beacon renews, and this host has no shared pool for one; `--lease-fencing` arms it without"
    return f"armed only while its beacon renews on shared storage: {state.problem or 'it has not yet'}"


def _guest(seen: DomainObservation) -> Guest:
    return Guest(seen.vm_id, seen.uuid, seen.epoch)


def _kill(guests: Sequence[Guest], killed_path: Path, deadline_s: float) -> bool:
    """Kill what runs of these; True once nothing does."""
    held = warden_guests.find(guests)
    for each in held:
        each.kill()
    deadline = warden_guests.boottime_s() + ANSWER_TIMEOUT_S
    while any(not each.has_ended for each in held) and warden_guests.boottime_s() < deadline:
        threading.Event().wait(0.02)
    ended = [each.guest for each in held if each.has_ended]
    for each in held:
        each.close()
    if ended:
        now_s = warden_guests.boottime_s()
        lines = [{"vm_id": one.vm_id, "epoch": one.epoch, "boottime_s": now_s, "deadline_s": deadline_s} for one in ended]
        warden_state.append_killed(killed_path, lines)
    return len(ended) == len(held)
