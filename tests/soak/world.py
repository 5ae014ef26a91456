"""The world outside of the control plane: simulated hosts in this process, which agents in other processes use over a socket.

As libvirtd does, the hosts outlive every agent that uses them: an agent that is killed leaves its guests and migrations running. The
oracle (`SimulatedFleet.oracle`, `double_runs`) sees every guest start and stop, and nothing under test can write to it.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from trimtab_agent.hypervisor.base import DomainChange, JobControl
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_protos.errors import ErrorKind, TrimtabError, Unavailable, rebuild
from trimtab_protos.messages import JobProgress

# Verbs that take a `JobControl`, by the name of that argument's position: it cannot cross a process, so it is made on either side.
LONG_VERBS = frozenset({"import_image", "migrate"})
POLL_S = 0.05

CALL, CANCEL, PROGRESS, RESULT, ERROR, EVENT, SUBSCRIBE = "call", "cancel", "progress", "result", "error", "event", "subscribe"


@dataclass(slots=True, eq=False)
class _Control:
    """The control of a long verb on the world's side."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    progress: JobProgress | None = None

    def report(self, progress: JobProgress) -> None:
        self.progress = progress


class WorldServer:
    """Serves the hypervisors of `fleet` at a unix socket until closed."""

    def __init__(self, fleet: SimulatedFleet, path: Path) -> None:
        self._fleet = fleet
        self._listener = Listener(str(path), family="AF_UNIX", backlog=256)
        self._is_closed = False
        threading.Thread(target=self._accept, name="world", daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="world-client", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            while True:
                kind, host_id, verb, arguments, options = connection.recv()
                hypervisor: Any = self._fleet.hosts[host_id]
                if kind == SUBSCRIBE:
                    self._tell_events(connection, hypervisor)
                    return
                call = partial(getattr(hypervisor, verb), *arguments, **options)
                if verb in LONG_VERBS:
                    self._serve_long(connection, call)
                else:
                    connection.send(_outcome_of(call))
        except (EOFError, ConnectionError, BrokenPipeError):
            return  # the agent is gone; what it began goes on
        finally:
            connection.close()

    def _serve_long(self, connection: Connection, call: Callable[..., Any]) -> None:
        control = _Control()
        outcomes: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        worker = threading.Thread(
            target=lambda: outcomes.put(_outcome_of(lambda: call(control=control))), name="world-job", daemon=True
        )
        worker.start()
        told: JobProgress | None = None
        while worker.is_alive() or outcomes.empty():
            if wait([connection], timeout=POLL_S) and connection.recv() == CANCEL:
                control.cancelled.set()
            if control.progress is not None and control.progress is not told:
                told = control.progress
                connection.send((PROGRESS, told))
        connection.send(outcomes.get())

    def _tell_events(self, connection: Connection, hypervisor: Any) -> None:
        changes: queue.SimpleQueue[DomainChange] = queue.SimpleQueue()
        hypervisor.subscribe(changes.put)
        try:
            while True:
                connection.send((EVENT, changes.get()))
        finally:
            hypervisor.unsubscribe(changes.put)


def _outcome_of(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return RESULT, call()
    except TrimtabError as error:
        return ERROR, (error.kind.value, error.code, error.message, dict(error.context))


class RemoteHypervisor:
    """The `Hypervisor` of one host as an agent in another process has it; one connection per thread."""

    def __init__(self, path: Path, host_id: str) -> None:
        self._path = path
        self._host_id = host_id
        self._connections = threading.local()

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        """Return a verb of the protocol: every one of them is the same to this class."""
        if verb.startswith("_"):
            raise AttributeError(verb)

        def call(*arguments: Any, control: JobControl | None = None, **options: Any) -> Any:
            given = list(arguments)
            if verb == "import_image" and control is None:
                control = given.pop()  # its last positional argument
            return self._call(verb, tuple(given), options, control)

        return call

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        def listen() -> None:
            connection = Client(str(self._path), family="AF_UNIX")
            connection.send((SUBSCRIBE, self._host_id, "", (), {}))
            while True:
                try:
                    _kind, change = connection.recv()
                except (EOFError, OSError):
                    return
                listener(change)

        threading.Thread(target=listen, name="events", daemon=True).start()

    def _call(self, verb: str, arguments: tuple[Any, ...], options: dict[str, Any], control: JobControl | None) -> Any:
        connection = self._connection()
        try:
            connection.send((CALL, self._host_id, verb, arguments, options))
            kind, content = self._follow(connection, control)
        except (EOFError, OSError) as error:
            del self._connections.open
            raise Unavailable("hypervisor-down", "the simulated world does not answer") from error
        if kind == ERROR:
            error_kind, code, message, context = content
            raise rebuild(ErrorKind(error_kind), code, message, context)
        return content

    def _follow(self, connection: Connection, control: JobControl | None) -> tuple[str, Any]:
        has_cancelled = False
        while True:
            if control is not None and not connection.poll(POLL_S):
                if control.cancelled.is_set() and not has_cancelled:
                    has_cancelled = True
                    connection.send(CANCEL)
                continue
            kind, content = connection.recv()
            if kind != PROGRESS:
                return kind, content
            if control is not None:
                control.report(content)

    def _connection(self) -> Connection:
        found: Connection | None = getattr(self._connections, "open", None)
        if found is None:
            found = self._connections.open = Client(str(self._path), family="AF_UNIX")
        return found
