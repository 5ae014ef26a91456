"""Starts, stops, pauses and resumes domains, ensure-wise.

`virDomainShutdown` waits up to a minute for a guest agent that does not answer, so a stop is asked for on a thread of its own and by
ACPI as well: asking twice is harmless, waiting is not.
"""

import os
import threading
from typing import Any, assert_never

import libvirt
import structlog

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import domain_facts
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domain_facts import DomainFacts
from trimtab_agent.hypervisor.kvm.domains import Domains, require, write_stamp
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys, needed_in
from trimtab_protos.errors import Conflict, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import DomainObservation, DomainState, PowerAction, StateReason

log = structlog.get_logger(__name__)

AGENT_WAIT_S = 2.0
STORAGE_TIMEOUT_S = 2.0
_ALIVE = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})


class Power:
    """Changes the power of domains. Thread-safe."""

    def __init__(
        self,
        connection: Connection,
        domains: Domains,
        observer: Observer,
        networks: Networks,
        keys: VolumeKeys,
        pauses: GuestPauses,
        *,
        boot_id: str,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._domains = domains
        self._observer = observer
        self._networks = networks
        self._pauses = pauses
        self._boot_id = boot_id
        self._guarded = GuardedCalls()

    def change(self, vm_id: str, action: PowerAction, stamp: Stamp) -> DomainObservation:
        """See `Hypervisor.change_power`."""
        with (
            self._domains.locks.hold(vm_id),
            self._connection.use(f"{_doing(action)} {vm_id}", changes=True) as connection,
        ):
            domain = require(connection, vm_id)
            seen = self._observer.observe(domain)
            if seen.state is DomainState.INCOMING:
                raise Conflict(
                    "wrong-domain-state", f"{vm_id} is being received from another host; only the migration may end it"
                )
            facts = domain_facts.read(domain.XMLDesc(0))
            if action is PowerAction.START and seen.state not in _ALIVE:
                self._start(connection, domain, facts, stamp)
            elif action is PowerAction.FORCE_OFF:
                # Killed before it is stamped: a QEMU that hangs takes no stamp, and killing it is what this is for.
                if seen.state in _ALIVE:
                    _destroy(domain)
                if seen.is_persistent:
                    write_stamp(domain, facts, stamp, boot_id="")
            else:
                write_stamp(domain, facts, stamp, boot_id=facts.boot_id)
                self._act(domain, action, seen, facts)
            return self._observer.observe(domain)

    def _start(self, connection: Any, domain: Any, facts: DomainFacts, stamp: Stamp) -> None:
        needs = needed_in(domain.XMLDesc(0))
        for path in facts.disk_paths:
            self._require_file(path, facts.vm_id)
        for network in facts.networks:
            self._networks.start(connection, network)
        self._domains.console_sockets.prepare()  # it may be gone with everything else of the host's last boot
        # Written before the guest runs: after a crash it tells that this host may hold its state.
        write_stamp(domain, facts, stamp, boot_id=self._boot_id)
        self._pauses.give_up(facts.vm_id)  # libvirt numbers its runs anew when it starts without any: a former one's mark may fit
        # A saved memory image, made by hand, would come back with stale disks; it is dropped.
        with self._keys.in_libvirt(connection, needs):
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_FORCE_BOOT)

    def _require_file(self, path: str, vm_id: str) -> None:
        try:
            is_there = self._guarded.run(os.path.dirname(path), lambda: os.path.exists(path), timeout_s=STORAGE_TIMEOUT_S)
        except Hung as error:
            raise Unavailable("pool-hung", f"{vm_id} cannot start: the storage of {path} does not answer", path=path) from error
        if not is_there:
            raise NotFound("volume-not-found", f"{vm_id} cannot start: its disk {path} is not there", path=path)

    def _act(self, domain: Any, action: PowerAction, seen: DomainObservation, facts: DomainFacts) -> None:
        is_alive = seen.state in _ALIVE
        match action:
            case PowerAction.START | PowerAction.FORCE_OFF:
                pass  # it runs; it was killed before
            case PowerAction.SHUT_DOWN:
                if seen.state is DomainState.PAUSED:
                    raise Conflict("wrong-domain-state", f"{seen.vm_id} is paused and cannot hear; resume it or force it off")
                if is_alive:
                    self._ask_guest(domain, facts, is_reboot=False)
            case PowerAction.REBOOT:
                _require_running(seen)
                self._ask_guest(domain, facts, is_reboot=True)
            case PowerAction.RESET:
                _require_alive(seen)
                domain.reset(0)
            case PowerAction.PAUSE:
                _require_alive(seen)
                with self._pauses.taken_over(facts.vm_id):
                    if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                        domain.suspend()
                    self._pauses.keep(domain, facts.vm_id)
            case PowerAction.RESUME:
                _require_alive(seen)
                with self._pauses.taken_over(facts.vm_id):
                    self._pauses.give_up(facts.vm_id)
                    _resume(domain, seen)
            case _:
                assert_never(action)

    def _ask_guest(self, domain: Any, facts: DomainFacts, *, is_reboot: bool) -> None:
        """Ask the guest to end or reboot: by its agent where that has the channel open, else by the power button."""
        if facts.has_guest_agent:
            answer = self._ask_agent(facts.vm_id, is_reboot=is_reboot)
            # A reboot by button is a stop that libvirt turns into a reset; beside a pending one of the agent's it would stay
            # armed and turn the guest's next stop into a reboot.
            if answer or (answer is None and is_reboot):
                return
        try:
            if is_reboot:
                domain.reboot(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)
            else:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or domain.isActive():
                raise  # else: it ended by itself meanwhile

    def _ask_agent(self, vm_id: str, *, is_reboot: bool) -> bool | None:
        """Tell whether the guest's agent took the request; None while it still has not answered."""
        answers: list[bool] = []

        def ask() -> None:
            try:
                # A connection of its own, since this thread may outlive the verb.
                with self._connection.use("ask the guest's agent", changes=True) as connection:
                    domain = require(connection, vm_id)
                    if is_reboot:
                        domain.reboot(libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT)
                    else:
                        domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
                answers.append(True)
            except TrimtabError as error:
                log.info("guest agent did not take the request", vm_id=vm_id, error=str(error))
                answers.append(False)

        thread = threading.Thread(target=ask, name="ask-guest-agent", daemon=True)
        thread.start()
        thread.join(AGENT_WAIT_S)
        return answers[0] if answers else None


def _doing(action: PowerAction) -> str:
    return action.value.replace("_", " ")


def _require_alive(seen: DomainObservation) -> None:
    if seen.state not in _ALIVE:
        raise Conflict("wrong-domain-state", f"{seen.vm_id} is {seen.state.value}; start it first")


def _require_running(seen: DomainObservation) -> None:
    if seen.state is not DomainState.RUNNING:
        raise Conflict("wrong-domain-state", f"{seen.vm_id} is {seen.state.value}, not running")


def _resume(domain: Any, seen: DomainObservation) -> None:
    if seen.state is not DomainState.PAUSED:
        return
    if seen.is_migrating or seen.reason is StateReason.POSTCOPY_FAILED:
        raise Conflict("migration-under-way", f"{seen.vm_id} is paused by a migration; settle that first")
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:  # a backup that held it may have let it go since
        domain.resume()


def _destroy(domain: Any) -> None:
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        # It ended by itself meanwhile.
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or domain.isActive():
            raise
