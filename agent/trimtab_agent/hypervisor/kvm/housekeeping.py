"""What the host's guests need now and then: logs kept under their caps, addresses asked of guest agents, a count for the heartbeat.

Each kind of work has a thread of its own, so that a guest agent that answers slowly cannot let a log grow.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import ballooning
from trimtab_agent.hypervisor.kvm.ballooning import Balloons
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.domain_facts import read
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

LOGS_EVERY_S = 2.0
"""A guest that floods its serial port writes a few MiB in this time, no more."""
ADDRESSES_EVERY_S = 10.0
PAUSES_EVERY_S = 2.0
"""How long a guest stays paused once the process that held it for a backup has died and the agent is back."""
FIREWALL_EVERY_S = 5.0
"""How long guests' packets may pass unseen after somebody flushed all rules."""
_AGENT_TIMEOUT_S = 1
_AGENT_REST_S = 60.0
"""How long a guest agent that did not answer is left alone."""
_LINK_LOCAL = ("127.", "::1", "fe80:", "169.254.")


class Housekeeping:
    """The periodic work. Its threads end with `stop`."""

    def __init__(
        self,
        connection: Connection,
        observer: Observer,
        logs: ConsoleLogs,
        firewall: Firewall,
        balloons: Balloons,
        pauses: GuestPauses,
    ) -> None:
        self._connection = connection
        self._observer = observer
        self._logs = logs
        self._firewall = firewall
        self._balloons = balloons
        self._pauses = pauses
        self._stopping = threading.Event()
        self._silent_until: dict[str, float] = {}
        self.running_domains = 0

    def start(self) -> None:
        self._run_every(LOGS_EVERY_S, self._keep_logs, "console-logs")
        self._run_every(FIREWALL_EVERY_S, self._firewall.repair, "packet-rules")
        self._run_every(PAUSES_EVERY_S, self._settle_pauses, "held-guests")
        self._run_every(ADDRESSES_EVERY_S, self._ask_addresses, "guest-addresses")
        self._run_every(ballooning.EVERY_S, self._balloons.look, "balloons")

    def stop(self) -> None:
        self._stopping.set()

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

    def _settle_pauses(self) -> None:
        if self._connection.is_up:
            self._pauses.settle_all(self._connection)

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
        if time.monotonic() < self._silent_until.get(uuid, 0.0):
            return
        try:
            facts = read(domain.XMLDesc(0))
            if facts.vm_id and facts.has_guest_agent:
                domain.agentSetResponseTimeout(_AGENT_TIMEOUT_S, 0)
                interfaces = domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT, 0)
                self._observer.remember_addresses(uuid, _addresses(interfaces))
        except libvirt.libvirtError as error:
            log.debug("guest agent gave no addresses", domain=domain.name(), error=error.get_error_message())
            self._silent_until[uuid] = time.monotonic() + _AGENT_REST_S


def _addresses(interfaces: dict[str, Any]) -> tuple[str, ...]:
    found = [address["addr"] for interface in interfaces.values() for address in interface.get("addrs") or ()]
    return tuple(sorted(address for address in found if not address.startswith(_LINK_LOCAL)))
