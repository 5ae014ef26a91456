"""Carries libvirt's domain events to listeners, each with a fresh observation.

libvirt calls back on its event loop, where calling libvirt again would wait for the very loop that is waiting. So a callback only
queues what happened; one dispatcher thread observes and tells the listeners. Events during a lost connection are never replayed:
after each reopen every domain is told as `resync`, and those that are gone as absent.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.base import DomainChange
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.identifiers import vm_id_of
from trimtab_agent.hypervisor.kvm.observe import Observer, absent
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import DomainObservation

log = structlog.get_logger(__name__)

_LIFECYCLE_KINDS = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}
RESYNC = "resync"
_EVERY_DOMAIN = ("", "", RESYNC)

Event = tuple[str, str, str]
"""(uuid, libvirt's name, kind)"""


class DomainEvents:
    """Registers for events on each new connection and dispatches them. Thread-safe."""

    def __init__(self, observer: Observer, *, on_stopped: Callable[[Any], None]) -> None:
        """`on_stopped` gets each domain that was seen to stop, on the dispatcher's thread."""
        self._observer = observer
        self._on_stopped = on_stopped
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._listeners: list[Callable[[DomainChange], None]] = []
        self._known: dict[str, str] = {}
        self._started: set[str] = set()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._dispatch, name="libvirt-dispatch", daemon=True)

    def start(self, connection: Connection) -> None:
        self._connection = connection
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        # Replaced, not appended to: the dispatcher may be walking the list.
        self._listeners = [*self._listeners, listener]

    def register(self, connection: Any) -> None:
        """Ask a new connection for events; its own loss forgets the registration."""
        for number, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._on_reboot),
            (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, self._on_io_error),
            (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._on_agent),
            (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._on_job_completed),
        ):
            connection.domainEventRegisterAny(None, number, callback, None)

    def resync(self) -> None:
        """Have every domain observed and told: what happened while the connection was down is not told by libvirt."""
        self._queue.put(_EVERY_DOMAIN)

    # --- on libvirt's event loop: queue and return ------------------------------------------------------------------------

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: object) -> None:
        self._queue_event(domain, _LIFECYCLE_KINDS.get(event, "changed"))

    def _on_reboot(self, _connection: Any, domain: Any, _opaque: object) -> None:
        self._queue_event(domain, "rebooted")

    def _on_io_error(
        self, _connection: Any, domain: Any, _path: str, _device: str, _action: int, _reason: str, _opaque: object
    ) -> None:
        self._queue_event(domain, "io-error")

    def _on_agent(self, _connection: Any, domain: Any, _state: int, _reason: int, _opaque: object) -> None:
        self._queue_event(domain, "agent")

    def _on_job_completed(self, _connection: Any, domain: Any, _statistics: object, _opaque: object) -> None:
        self._queue_event(domain, "job-completed")

    def _queue_event(self, domain: Any, kind: str) -> None:
        # Name and UUID are local to the object; nothing here asks libvirtd.
        self._queue.put((domain.UUIDString(), domain.name(), kind))

    # --- on the dispatcher's thread ------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                if event == _EVERY_DOMAIN:
                    self._resync()
                else:
                    self._tell_one(event)
            except TrimtabError as error:
                # libvirt went away again; the reopening queues a resync.
                log.info("domain event not observed", kind=event[2], error=error.code)
            except Exception:
                # Told and gone on: without this thread the agent would be deaf.
                log.exception("domain event failed", kind=event[2])

    def _tell_one(self, event: Event) -> None:
        uuid, name, kind = event
        if not self._is_news(uuid, kind):
            return
        assert self._connection is not None
        with self._connection.use("observe a changed domain") as connection:
            domain = _lookup(connection, uuid)
            if domain is not None and kind in ("stopped", "crashed"):
                self._on_stopped(domain)
            known = self._known.pop(uuid, "") or vm_id_of(name)
            seen = self._observer.observe(domain) if domain is not None else absent(known)
        if domain is not None:
            self._known[uuid] = seen.vm_id
        self._tell(kind, seen)

    def _is_news(self, uuid: str, kind: str) -> bool:
        """Tell whether a listener needs it: a start is told by libvirt as a resume first, and as a start only then."""
        if kind == "started":
            self._started.add(uuid)
        elif kind in ("stopped", "crashed", "undefined"):
            self._started.discard(uuid)
        return kind != "resumed" or uuid in self._started

    def _resync(self) -> None:
        assert self._connection is not None
        with self._connection.use("observe every domain") as connection:
            domains = {domain.UUIDString(): domain for domain in connection.listAllDomains()}
            vanished = {uuid: vm_id for uuid, vm_id in self._known.items() if uuid not in domains}
            self._started = {uuid for uuid, domain in domains.items() if domain.isActive()}
            seen = [self._observer.observe(domain) for domain in domains.values()]
        self._known = {each.uuid: each.vm_id for each in seen if each.uuid}
        for each in (*seen, *(absent(vm_id) for vm_id in vanished.values())):
            self._tell(RESYNC, each)

    def _tell(self, kind: str, seen: DomainObservation) -> None:
        for listener in self._listeners:
            try:
                listener(DomainChange(kind=kind, domain=seen))
            except Exception:
                # A listener's defect is its own: the others are told all the same.
                log.exception("listener of domain changes failed", kind=kind)


def _lookup(connection: Any, uuid: str) -> Any:
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
