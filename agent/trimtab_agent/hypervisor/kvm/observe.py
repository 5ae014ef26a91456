"""What a domain is right now, without ever waiting for its QEMU: a guest that hangs must not make the host look dead.

Reading the state, the definition and counters of libvirtd asks no QEMU. What does ask one (addresses from the guest agent, job
statistics of a migration) is asked elsewhere in the background or only where libvirt says that a job runs.
"""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import libvirt

from trimtab_agent.hypervisor.kvm import domain_facts, errors, states
from trimtab_agent.hypervisor.kvm.domain_facts import DomainFacts
from trimtab_agent.hypervisor.kvm.identifiers import vm_id_of
from trimtab_protos.messages import DomainObservation, DomainState

_QEMU_RUN_DIR = Path("/run/libvirt/qemu")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_JOB_OPERATIONS_IN = {libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN}
_JOB_OPERATIONS_MIGRATION = {*_JOB_OPERATIONS_IN, libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT}


class Observer:
    """Observes domains and remembers what libvirt does not: starts, and addresses that the guest agent told. Thread-safe."""

    def __init__(self, boot_id: str) -> None:
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._runs: dict[str, tuple[int, int]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._operations: dict[str, int | None] = {}
        self._silent_agents: set[str] = set()

    def remember_addresses(self, uuid: str, addresses: tuple[str, ...]) -> None:
        with self._lock:
            self._addresses[uuid] = addresses

    def remember_agent(self, uuid: str, *, answers: bool) -> None:
        """Note whether the guest's agent answered when it was last asked: its channel stays open while it hangs."""
        with self._lock:
            (self._silent_agents.discard if answers else self._silent_agents.add)(uuid)

    def forget(self, uuid: str) -> None:
        with self._lock:
            self._silent_agents.discard(uuid)
            self._runs.pop(uuid, None)
            self._addresses.pop(uuid, None)
            self._operations.pop(uuid, None)

    def observe(self, domain: Any) -> DomainObservation:
        """Return the observation; ABSENT where the domain went away meanwhile."""
        try:
            return self._observe(domain, domain_facts.read(domain.XMLDesc(0)))
        except libvirt.libvirtError as error:
            if errors.is_gone(error):
                return absent(vm_id_of(domain.name()))
            raise

    def _observe(self, domain: Any, facts: DomainFacts) -> DomainObservation:
        state_number, reason_number = domain.state()
        is_active = state_number not in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_NOSTATE)
        operation = self._migration_operation(domain, facts.uuid) if is_active else None
        state, reason = states.translate(
            state_number,
            reason_number,
            was_started_in_other_boot=bool(facts.boot_id) and facts.boot_id != self._boot_id,
            # Running already, it is the last moment of a move or a post-copy: then it is a guest like any other.
            is_incoming=operation in _JOB_OPERATIONS_IN and state_number == libvirt.VIR_DOMAIN_PAUSED,
        )
        cpu_time_ns = int(domain.info()[4]) if is_active else 0
        with self._lock:
            starts = self._count_run(facts.uuid, domain.ID())
            addresses = self._addresses.get(facts.uuid, ()) if state is DomainState.RUNNING else ()
            has_guest_agent = facts.has_guest_agent and facts.uuid not in self._silent_agents
        return DomainObservation(
            vm_id=facts.vm_id,
            uuid=facts.uuid,
            name=facts.libvirt_name,
            state=state,
            reason=reason,
            epoch=facts.epoch,
            turn=facts.turn,
            vcpus=facts.vcpus,
            memory_mib=facts.memory_mib,
            macs=facts.macs,
            has_guest_agent=has_guest_agent,
            addresses=addresses,
            cpu_time_ns=cpu_time_ns,
            observed_at_ms=now_ms(),
            is_persistent=bool(domain.isPersistent()),
            is_migrating=operation is not None,
            starts=starts,
            rss_mib=_resident_mib(domain.name()) if is_active else 0,
            restarts_elsewhere=facts.restarts_elsewhere,
            balloon_mib=facts.balloon_mib if is_active else 0,
        )

    def _migration_operation(self, domain: Any, uuid: str) -> int | None:
        if not _is_busy(domain):
            operation = migration_operation(domain)
            with self._lock:
                self._operations[uuid] = operation
            return operation
        # Asking now would wait for whoever is talking to QEMU, half a minute when QEMU hangs. What was seen last stands.
        with self._lock:
            return self._operations.get(uuid)

    def _count_run(self, uuid: str, run: int) -> int:
        """Return how many runs of the domain were seen; libvirt numbers runs, -1 is none."""
        last, starts = self._runs.get(uuid, (-1, 0))
        if run not in (-1, last):
            starts += 1
        self._runs[uuid] = (run, starts)
        return starts


def _is_busy(domain: Any) -> bool:
    """Tell whether libvirt waits for the domain's QEMU at this moment; asks libvirtd only."""
    return bool(domain.controlInfo()[0] != libvirt.VIR_DOMAIN_CONTROL_OK)


def absent(vm_id: str) -> DomainObservation:
    return DomainObservation(vm_id=vm_id, observed_at_ms=now_ms())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def migration_operation(domain: Any) -> int | None:
    """Return libvirt's number of the migration that the active domain is part of, or None."""
    try:
        # Without asking QEMU: libvirt keeps the statistics of its current job, and says NONE where there is none.
        statistics = domain.jobStats(0)
    except libvirt.libvirtError as error:
        match error.get_error_code():
            case libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                # "migration statistics are available only on the source host": said of the receiving half, and only of it.
                return int(libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)
            case libvirt.VIR_ERR_OPERATION_INVALID | libvirt.VIR_ERR_OPERATION_TIMEOUT:
                return None
        raise
    operation = statistics.get("operation")
    is_running = statistics.get("type") in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED)
    return operation if is_running and operation in _JOB_OPERATIONS_MIGRATION else None


def process_id_of(libvirt_name: str) -> int:
    """Return a running domain's QEMU; 0, which no process has, where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int((_QEMU_RUN_DIR / f"{libvirt_name}.pid").read_text())
    return 0


def _resident_mib(libvirt_name: str) -> int:
    """Return the memory that the domain's QEMU holds; from the kernel, since libvirt's way asks QEMU."""
    with contextlib.suppress(OSError):
        resident_pages = int(Path(f"/proc/{process_id_of(libvirt_name)}/statm").read_text().split()[1])
        return resident_pages * _PAGE_BYTES >> 20
    return 0
