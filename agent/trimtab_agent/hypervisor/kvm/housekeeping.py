"""What the host's guests need now and then: logs kept under their caps, addresses asked of guest agents, a count for the heartbeat.

Each kind of work has a thread of its own, so that a guest agent that answers slowly cannot let a log grow.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import ballooning
from trimtab_agent.hypervisor.kvm.backup_hooks import GuestHooks
from trimtab_agent.hypervisor.kvm.ballooning import Balloons
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.domain_facts import read
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.freezes import GuestFreezes
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pull_jobs import PullJobs
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

LOGS_EVERY_S = 2.0
"""A guest that floods its serial port writes a few MiB in this time, no more."""
ADDRESSES_EVERY_S = 10.0
HELD_EVERY_S = 2.0
"""How long a guest stays paused or frozen, or its backup's job stays, once the process behind it has died and the agent is back."""
THAW_S = 3.0
"""What an agent that is told to stop gives a backup or snapshot to thaw its guest; one of several vms at one instant may need longer."""
FIREWALL_EVERY_S = 5.0
"""How long guests' packets may pass unseen after somebody flushed all rules."""
_AGENT_TIMEOUT_S = 1
_AGENT_REST_S = 60.0
"""How long a guest agent that did not answer is left alone."""
# Newer libvirt tells an agent that took the command from one that is not there.
_SILENCE = frozenset({libvirt.VIR_ERR_AGENT_UNRESPONSIVE, getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", -1)})
_LINK_LOCAL = ("127.", "::1", "fe80:", "169.254.")


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """What an agent that died may have left guests in, by kind; each is settled by who finds it."""

    pauses: GuestPauses
    freezes: GuestFreezes
    hooks: GuestHooks
    jobs: PullJobs


class Housekeeping:
    """The periodic work. Its threads end with `stop`, which waits for guests that are frozen just then."""

    def __init__(
        self,
        connection: Connection,
        observer: Observer,
        logs: ConsoleLogs,
        firewall: Firewall,
        balloons: Balloons,
        left: LeftBehind,
    ) -> None:
        self._connection = connection
        self._observer = observer
        self._logs = logs
        self._firewall = firewall
        self._balloons = balloons
        self._left = left
        self._stopping = threading.Event()
        self._silent_until: dict[str, float] = {}
        self.running_domains = 0

    def start(self) -> None:
        self._run_every(LOGS_EVERY_S, self._keep_logs, "console-logs")
        self._run_every(FIREWALL_EVERY_S, self._firewall.repair, "packet-rules")
        # Each in a thread of its own: a guest agent that is silent keeps nobody from being let go on.
        self._run_every(HELD_EVERY_S, partial(self._settle, self._left.pauses), "held-guests")
        self._run_every(HELD_EVERY_S, partial(self._settle, self._left.freezes), "frozen-guests")
        self._run_every(HELD_EVERY_S, partial(self._settle, self._left.hooks), "hooked-guests")
        self._run_every(HELD_EVERY_S, partial(self._settle, self._left.jobs), "pulled-guests")
        self._run_every(ADDRESSES_EVERY_S, self._ask_addresses, "guest-addresses")
        self._run_every(ballooning.EVERY_S, self._balloons.look, "balloons")

    def stop(self) -> None:
        self._stopping.set()
        # A job's thread dies with the process, and nobody knows when the next agent comes.
        if not self._left.freezes.wait_until_none(THAW_S):
            log.warning("the agent stops while a guest is frozen, and thaws it when it is back")
        if not self._left.hooks.wait_until_none(THAW_S):
            log.warning("the agent stops while a guest's applications are held, and lets them go on when it is back")

    def _run_every(self, period_s: float, work: Callable[[], object], name: str) -> None:
        def loop() -> None:
            while not self._stopping.wait(period_s):
                try:
                    work()
                except (TrimtabError, OSError) as error:
                    log.info("housekeeping put off", work=name, error=str(error))
                except Exception:
                    # The thread's edge: a defect in one round must not end the rounds.
                    log.exception("housekeeping failed", work=name)

        threading.Thread(target=loop, name=name, daemon=True).start()

    def _settle(self, kind: GuestPauses | GuestFreezes | GuestHooks | PullJobs) -> None:
        if self._connection.is_up:
            kind.settle_all(self._connection)

    def _keep_logs(self) -> None:
        if self._connection.is_up:
            with self._connection.use("count running domains") as connection:
                self.running_domains = connection.numOfDomains()
        for vm_id in self._logs.known():
            self._logs.bound(vm_id)

    def _ask_addresses(self) -> None:
        if not self._connection.is_up:
            return
        with self._connection.use("ask guest agents") as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING):
                self._ask_one(domain)

    def _ask_one(self, domain: Any) -> None:
        uuid = domain.UUIDString()
        if time.monotonic() >= self._silent_until.get(uuid, 0.0) and not ask_agent(domain, self._observer):
            self._silent_until[uuid] = time.monotonic() + _AGENT_REST_S


def ask_agent(domain: Any, observer: Observer) -> bool:
    """Have the observer know what the guest's agent says of its addresses, or that it says nothing; tell whether it gave them."""
    try:
        facts = read(domain.XMLDesc(0))
        if facts.vm_id and facts.has_guest_agent:
            domain.agentSetResponseTimeout(_AGENT_TIMEOUT_S, 0)
            interfaces = domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT, 0)
            observer.remember_addresses(facts.uuid, _addresses(interfaces))
            observer.remember_agent(facts.uuid, answers=True)
    except libvirt.libvirtError as error:
        log.debug("guest agent gave no addresses", domain=domain.name(), error=error.get_error_message())
        # A refusal is an answer too.
        if error.get_error_code() in _SILENCE:
            observer.remember_agent(domain.UUIDString(), answers=False)
        return False
    return True


def _addresses(interfaces: dict[str, Any]) -> tuple[str, ...]:
    found = [address["addr"] for interface in interfaces.values() for address in interface.get("addrs") or ()]
    return tuple(sorted(address for address in found if not address.startswith(_LINK_LOCAL)))
