"""The agent's connections to libvirt: one that watches and hears events, and for each user one of its own.

    watch: closed ─open succeeded→ up ─keepalive lost, libvirtd restarted or died→ closed

What libvirt's client library does to the careless, each of which hung or ended a process of ours:
- the event loop must run *before* the first open;
- without keepalive a call to a silent libvirtd never returns, and an open never has any;
- nothing reconnects or re-registers by itself, and what happened while the connection was down is not told: `on_up` must reconcile
  from a full list;
- two threads inside calls on one connection corrupt it (a leaked event source with a pointer into a stack that is gone,
  CVE-2024-4418, not fixed in Debian 12), which shows as a crash or a hang when a call fails much later. Keepalive, sent from the
  event loop beside a call of over a second, is such a second thread. So a connection is lent to one user at a time, a use that
  took long is its connection's last, and nobody closes one that another may be in.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import errors
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

KEEPALIVE_INTERVAL_S = 1
KEEPALIVE_COUNT = 3
"""A silent libvirtd is noticed after 4 s; a killed one at once."""
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
OPEN_TIMEOUT_S = 5.0
_LONG_USE_S = 0.5 * KEEPALIVE_INTERVAL_S
_MAX_IDLE = 8

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
    """Access to one libvirt, across restarts of libvirtd. Thread-safe."""

    def __init__(self, uri: str, *, on_open: Callable[[Any], None], on_up: Callable[[], None] = lambda: None) -> None:
        """`on_open` gets each new watching connection, to register for events and for nothing else; what it raises discards it.
        `on_up` is called once libvirt can be used."""
        self._uri = uri
        self._on_open = on_open
        self._on_up = on_up
        self._changed = threading.Condition()
        self._watch: Any = None
        self._idle: list[Any] = []
        self._is_stopping = False
        self._is_failure_logged = False
        self._opening = GuardedCalls()
        self._thread = threading.Thread(target=self._keep_watching, name="libvirt-watch", daemon=True)

    def start(self) -> None:
        ensure_event_loop()
        self._thread.start()

    def stop(self) -> None:
        """Lend nothing any more."""
        with self._changed:
            self._is_stopping = True
            self._forget_watch()

    @property
    def is_up(self) -> bool:
        return self._watch is not None

    def wait_until_up(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._watch is not None, timeout_s)

    @contextlib.contextmanager
    def use(self, doing: str, *, changes: bool = False) -> Iterator[Any]:
        """Lend a connection for this thread alone; objects got from it must not outlive the block or leave the thread.

        libvirt's errors leave the block as errors of ours; `doing` completes "could not …".
        """
        connection = self._take(doing)
        began_at = time.monotonic()
        try:
            yield connection
        except libvirt.libvirtError as error:
            is_lost = not _is_alive(connection)
            raise errors.translate(error, doing=doing, changes=changes, is_connection_lost=is_lost) from error
        finally:
            if time.monotonic() - began_at < _LONG_USE_S:
                self._give_back(connection)

    def _take(self, doing: str) -> Any:
        with self._changed:
            if self._watch is None:
                raise _down(doing)
            while self._idle:
                connection = self._idle.pop()
                if _is_alive(connection):
                    return connection
        try:
            # Guarded by the thread's own name: a libvirtd that hangs from now on hangs this open, not its caller.
            return self._opening.run(f"open-{threading.get_ident()}", self._open, timeout_s=OPEN_TIMEOUT_S)
        except (Hung, libvirt.libvirtError) as error:
            raise _down(doing) from error

    def _give_back(self, connection: Any) -> None:
        with self._changed:
            if self._watch is not None and len(self._idle) < _MAX_IDLE and _is_alive(connection):
                self._idle.append(connection)

    def _open(self) -> Any:
        connection = libvirt.open(self._uri)
        try:
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        except libvirt.libvirtError as error:
            # A driver inside this process has no peer that could fall silent.
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
        return connection

    def _keep_watching(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._is_stopping:
            watch = self._open_watch()
            if watch is None:
                with self._changed:
                    # Jitter, so that the hosts of a rack do not all knock at the same instant.
                    self._changed.wait_for(lambda: self._is_stopping, backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)
                continue
            backoff_s = FIRST_BACKOFF_S
            log.info("libvirt is open", uri=self._uri)
            self._on_up()
            with self._changed:
                self._changed.wait_for(lambda opened=watch: self._watch is not opened)  # type: ignore[misc]

    def _open_watch(self) -> Any:
        try:
            watch = self._open()
            watch.registerCloseCallback(self._on_close, None)
            self._on_open(watch)
        except libvirt.libvirtError as error:
            if not self._is_failure_logged:
                log.warning("libvirt cannot be opened", uri=self._uri, error=error.get_error_message())
                self._is_failure_logged = True
            return None
        with self._changed:
            if self._is_stopping or not _is_alive(watch):
                return None
            self._watch = watch
            self._is_failure_logged = False
            self._changed.notify_all()
        return watch

    def _on_close(self, _connection: Any, reason: int, _opaque: object) -> None:
        log.warning("libvirt closed the connection", uri=self._uri, reason=reason)
        with self._changed:
            # The object that comes here may be a new wrapper of the same connection, so it is not compared.
            if self._watch is not None and not _is_alive(self._watch):
                self._forget_watch()

    def _forget_watch(self) -> None:
        self._watch = None
        self._idle.clear()
        self._changed.notify_all()


def _down(doing: str) -> Unavailable:
    return Unavailable("hypervisor-down", f"could not {doing}: libvirt does not answer")


def _is_alive(connection: Any) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False
