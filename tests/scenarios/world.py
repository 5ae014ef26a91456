"""The simulated world on a virtual clock: hosts, network, storage, gateways, the engine process, and what each does to the other.

Only the engine's decisions are real: `core.failover.step`. Everything else here is the adversary. After every event the invariants
are checked; the first violation ends the run.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.scenarios.hosts import Domain, Double, SimHost
from tests.scenarios.process import EngineProcess
from trimtab_controller.core.failover.events import Observed, Renewed, SessionOpened
from trimtab_controller.core.failover.records import Seen
from trimtab_controller.core.failover.settings import FailoverSettings

LATENCY_S = 0.05
BOOT_GUEST_S = 2.0
MIGRATE_S = 10.0
POWER_S = 1.5
WRITE_INTENT_S = 0.2
REVOKE_S = 0.5


@dataclass(frozen=True)
class Happening:
    """One line of the world's own log: what really happened, whoever knows of it."""

    t: float
    what: str
    subject: str
    host: str = ""
    detail: Any = None


@dataclass
class World:
    settings: FailoverSettings
    seed: int = 0
    now: float = 0.0
    hosts: dict[str, SimHost] = field(default_factory=dict)
    doubles: dict[str, Double] = field(default_factory=dict)
    log: list[Happening] = field(default_factory=list)
    locks_disks: bool = False
    gateway_is_alive: bool = True
    has_sql: bool = True
    intents: set[str] = field(default_factory=set)
    slots: dict[str, float] = field(default_factory=dict)
    locked_vms: set[str] = field(default_factory=set)
    unmanaged: set[str] = field(default_factory=set)
    checks: list[Callable[["World"], None]] = field(default_factory=list)
    faults: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._triggers: dict[str, list[Callable[[], None]]] = {}
        self.engine = EngineProcess(self)

    # --- time ----------------------------------------------------------------------------------------------------------------

    def at(self, t: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (max(t, self.now), self._sequence, act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.at(self.now + delay_s, act)

    def on(self, trigger: str, act: Callable[[], None]) -> None:
        """Act once, when `trigger` is told."""
        self._triggers.setdefault(trigger, []).append(act)

    def tell(self, what: str, subject: str = "", host: str = "", detail: Any = None) -> None:
        self.log.append(Happening(self.now, what, subject, host, detail))
        for act in self._triggers.pop(what, []):
            act()

    def run_until(self, end_s: float) -> None:
        while self._queue and self._queue[0][0] <= end_s:
            self.now, _sequence, act = heapq.heappop(self._queue)
            act()
            for check in self.checks:
                check(self)
        self.now = max(self.now, end_s)

    def begin(self) -> None:
        """Start the engine and every host's processes, out of step with one another as real ones are."""
        self.engine.boot()
        for index, name in enumerate(sorted(self.hosts)):
            self.after(0.1 + self.rng.random() * self.settings.renew_every_s, lambda name=name: self._agent_loop(name))
            self.after(0.01 * index, lambda name=name: self._warden_loop(name))
            self.after(0.3 + self.rng.random() * self.settings.renew_every_s, lambda name=name: self._beacon_loop(name))
            self.after(1.0 + self.rng.random(), lambda name=name: self._report_loop(name))

    # --- what really runs ------------------------------------------------------------------------------------------------------

    def running_on(self, vm: str) -> list[str]:
        return [name for name in sorted(self.hosts) if vm in self.hosts[name].writers()]

    def happened(self, what: str, subject: str = "", host: str = "") -> list[Happening]:
        return [
            one
            for one in self.log
            if one.what == what and (not subject or one.subject == subject) and (not host or one.host == host)
        ]

    # --- the agent -------------------------------------------------------------------------------------------------------------

    def _agent_loop(self, name: str) -> None:
        host = self.hosts[name]
        self.after(
            1.0 if self._is_unacknowledged(host) else self.settings.renew_every_s / host.rate, lambda: self._agent_loop(name)
        )
        if host.agent_acts and not host.goes_down:
            self._send_renewal(host)

    def _is_unacknowledged(self, host: SimHost) -> bool:
        return host.lease_sent_s is None or self.now - host.lease_sent_s > self.settings.renew_every_s * 1.5

    def _send_renewal(self, host: SimHost) -> None:
        if host.link_is_cut or not host.renewals_arrive:
            host.session_is_open = False
            return
        sent_s, boot = self.now, host.boot
        self.after(LATENCY_S * (0.5 + self.rng.random()), lambda: self._handle_renewal(host, sent_s, boot))

    def _handle_renewal(self, host: SimHost, sent_s: float, boot: int) -> None:
        if not self.gateway_is_alive or host.link_is_cut or host.boot != boot:
            return
        if not host.session_is_open and host.agent_acts:
            self._open_session(host)
        is_granted = host.name not in self.engine.revoked and self.has_sql
        self.engine.gateway_handled(host, self.now, is_granted=is_granted)
        self.engine.feed(
            Renewed(
                host=host.name,
                at_s=self.now,
                boot_id=host.boot_id,
                is_granted=is_granted,
                is_lease_live=host.has_lease(self.now, self.settings.lease_ttl_s),
                is_armed=host.warden_is_alive,
                kill_s=host.kill_s,
                has_uplink=host.has_uplink,
                has_storage=host.has_storage,
                takes_commands=host.takes_commands,
            )
        )
        if is_granted:
            self.after(LATENCY_S * (0.5 + self.rng.random()), lambda: self._acknowledge(host, sent_s, boot))

    def _acknowledge(self, host: SimHost, sent_s: float, boot: int) -> None:
        if host.link_is_cut or not host.replies_arrive or host.boot != boot or not host.agent_acts:
            return
        if host.lease_sent_s is None or sent_s > host.lease_sent_s:
            host.lease_sent_s = sent_s

    def _open_session(self, host: SimHost) -> None:
        if not self.engine.is_alive:
            return
        host.session_is_open = True
        listed = tuple((one.vm, one.epoch, one.seen) for one in sorted(host.domains.values(), key=lambda one: one.vm))
        self.engine.feed(SessionOpened(host=host.name, boot_id=host.boot_id, domains=listed))
        record = self.engine.state.hosts.get(host.name)
        if record is not None and record.power is not None and record.power.is_under_way:
            host.session_is_open = False  # refused while it may be switched off at any instant; it tries again

    def _report_loop(self, name: str) -> None:
        """Tell of every domain every few seconds: the drift loop's poll, and events that were lost."""
        self.after(3.0, lambda: self._report_loop(name))
        host = self.hosts[name]
        if host.agent_acts and host.session_is_open and not host.link_is_cut and host.renewals_arrive and self.gateway_is_alive:
            for domain in list(host.domains.values()):
                self.report(host, domain)

    def report(self, host: SimHost, domain: Domain, *, was_crash: bool = False) -> None:
        if host.agent_acts and not host.link_is_cut and host.renewals_arrive:
            self.engine.feed(
                Observed(
                    vm=domain.vm,
                    host=host.name,
                    epoch=domain.epoch,
                    seen=domain.seen,
                    is_io_error=domain.is_io_error,
                    was_crash=was_crash,
                )
            )

    # --- warden and beacon -------------------------------------------------------------------------------------------------------

    def _warden_loop(self, name: str) -> None:
        self.after(0.25, lambda: self._warden_loop(name))
        self.warden_looks(self.hosts[name])

    def warden_looks(self, host: SimHost) -> None:
        """Kill what may be restarted elsewhere once the lease has ended. The kill itself takes a while: that is K."""
        if not host.runs or not host.warden_is_alive or host.is_killing or host.lease_sent_s is None:
            return
        if host.has_lease(self.now, self.settings.lease_ttl_s) or not any(self._is_killed(one) for one in host.domains.values()):
            return
        host.is_killing = True
        boot = host.boot
        self.tell("warden_kills", host=host.name)
        self.after(host.kill_s * 0.9, lambda: self._killed(host, boot))

    def _is_killed(self, domain: Domain) -> bool:
        if domain.vm in self.unmanaged or domain.seen in {Seen.STOPPED, Seen.ABSENT}:
            return False
        vm = self.engine.state.vms.get(domain.vm)
        return vm is None or (not vm.is_local and vm.desired.value != "ignored")

    def _killed(self, host: SimHost, boot: int) -> None:
        host.is_killing = False
        if host.boot != boot or not host.is_powered:
            return
        for domain in list(host.domains.values()):
            if self._is_killed(domain):
                self.end_guest(host, domain.vm, "killed_by_warden")

    def end_guest(self, host: SimHost, vm: str, what: str) -> None:
        """The process ends; the agent notices where it can."""
        domain = host.domains.pop(vm, None)
        if domain is None:
            return
        self.tell(what, vm, host.name, domain.epoch)
        domain.seen, domain.is_io_error = Seen.ABSENT, False
        self.after(LATENCY_S, lambda: self.report(host, domain, was_crash=True))

    def _beacon_loop(self, name: str) -> None:
        host = self.hosts[name]
        self.after(self.settings.renew_every_s / host.rate, lambda: self._beacon_loop(name))
        if not (host.runs and host.has_beacon and host.has_storage):
            return
        started_s, boot = self.now, host.boot
        self.after(LATENCY_S, lambda: self._beacon_wrote(host, started_s, boot))

    def _beacon_wrote(self, host: SimHost, started_s: float, boot: int) -> None:
        """The slot is written; now the intent is read. Without one the lease counts from before the write."""
        if host.boot != boot or not host.runs or not host.has_storage:
            return
        self.slots[host.name] = self.now
        if host.name in self.intents or host.lease_sent_s is None:
            return
        host.lease_sent_s = max(host.lease_sent_s, started_s)

    # --- commands ----------------------------------------------------------------------------------------------------------------

    def call(self, name: str, act: Callable[[SimHost], None]) -> bool:
        """Deliver a command to an agent after the latency, if it can be delivered; the answer may be lost on its own."""
        host = self.hosts[name]
        if not host.hears_controller:
            return False
        self.after(LATENCY_S, lambda: act(host) if host.hears_controller else None)
        return True
