"""The one libvirt connection of an agent: kept open, watched, and reopened with backoff.

    closed ─open succeeded→ up ─keepalive lost, libvirtd restarted or died→ closed

libvirt has three traps here, each of which once hung a process of ours: the event loop must run *before* the first open; without
keepalive a call to a silent peer never returns; and nothing reconnects or re-registers by itself. State changes while the connection
was down are not replayed, so whoever registers an `on_open` must reconcile from a full list.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import errors
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

KEEPALIVE_INTERVAL_S = 1
KEEPALIVE_COUNT = 3
"""A silent libvirtd is noticed after 4 s; a killed one at once."""
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0

_event_loop_lock = threading.Lock()
_event_loop: threading.Thread | None = None


def ensure_event_loop() -> None:
    """Start libvirt's event loop of this process, once; it cannot be replaced or ended."""
    global _event_loop
    with _event_loop_lock:
        if _event_loop is not None:
            return
        # libvirt prints every error to stderr unless told otherwise; ours come as exceptions.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        _event_loop = threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True)
        _event_loop.start()


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


class Connection:
    """A libvirt connection that survives restarts of libvirtd. Thread-safe."""

    def __init__(self, uri: str, *, on_open: Callable[[Any], None]) -> None:
        """`on_open` gets each newly opened connection before it is used; what it raises closes the connection again."""
        self._uri = uri
        self._on_open = on_open
        self._connection: Any = None
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_failure_logged = False
        self._thread = threading.Thread(target=self._keep_open, name="libvirt-connection", daemon=True)

    def start(self) -> None:
        ensure_event_loop()
        self._thread.start()

    def stop(self) -> None:
        """Close for good."""
        with self._changed:
            self._is_stopping = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is not None:
            _close(connection)

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    def wait_until_up(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._connection is not None, timeout_s)

    @contextlib.contextmanager
    def use(self, doing: str, *, changes: bool = False) -> Iterator[Any]:
        """Lend the connection; libvirt's errors leave the block as errors of ours. `doing` completes "could not …"."""
        connection = self._connection
        if connection is None:
            raise Unavailable("hypervisor-down", f"could not {doing}: libvirt does not answer")
        try:
            yield connection
        except libvirt.libvirtError as error:
            is_lost = not _is_alive(connection)
            if is_lost:
                self._mark_closed()
            raise errors.translate(error, doing=doing, changes=changes, is_connection_lost=is_lost) from error

    def _keep_open(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._is_stopping:
            connection = self._open()
            if connection is None:
                with self._changed:
                    # Jitter, so that the hosts of a rack do not all knock at the same instant.
                    self._changed.wait_for(lambda: self._is_stopping, backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)
                continue
            backoff_s = FIRST_BACKOFF_S
            with self._changed:
                self._changed.wait_for(lambda opened=connection: self._connection is not opened)  # type: ignore[misc]
            _close(connection)

    def _open(self) -> Any:
        connection = None
        try:
            connection = libvirt.open(self._uri)
            _watch(connection)
            connection.registerCloseCallback(self._on_close, None)
            self._on_open(connection)
        except libvirt.libvirtError as error:
            if not self._is_failure_logged:
                log.warning("libvirt cannot be opened", uri=self._uri, error=error.get_error_message())
                self._is_failure_logged = True
            if connection is not None:
                _close(connection)
            return None
        with self._changed:
            if self._is_stopping or not _is_alive(connection):
                _close(connection)
                return None
            self._connection = connection
            self._changed.notify_all()
        self._is_failure_logged = False
        log.info("libvirt is open", uri=self._uri)
        return connection

    def _on_close(self, _connection: Any, reason: int, _opaque: object) -> None:
        log.warning("libvirt closed the connection", uri=self._uri, reason=reason)
        self._mark_closed()

    def _mark_closed(self) -> None:
        with self._changed:
            # A new Python object wraps the same connection in callbacks, so identity is of no use there.
            if self._connection is not None and not _is_alive(self._connection):
                self._connection = None
                self._changed.notify_all()


def _watch(connection: Any) -> None:
    try:
        connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
    except libvirt.libvirtError as error:
        # A driver inside this process has no peer that could fall silent.
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise


def _is_alive(connection: Any) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _close(connection: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        if connection.isAlive():
            connection.unregisterCloseCallback()
        connection.close()
