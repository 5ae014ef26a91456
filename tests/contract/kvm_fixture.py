"""A KvmHypervisor that runs inside a host of the lab and is used from a test's process.

The hypervisor works on its host's own files, so it must live in that host's namespaces; the test must not. This file is both ends:
run as a program it serves one hypervisor on a unix socket (a connection per call, pickled dataclasses of the contract); imported, it
starts that program with `lab.command` and lends a `Hypervisor` that calls it.

    with kvm_host(lab, "node1", scratch) as host:
        host.hypervisor.ensure_pool(host.local_pool)

`scratch` is a directory below /tmp, which every host of the lab shares with the machine. Image sources: an upload's id, and a peer's
address, are paths of files below `scratch`.
"""

import argparse
import contextlib
import faulthandler
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, cast

from trimtab_agent.hypervisor.base import DomainChange, Hypervisor, JobControl
from trimtab_protos.errors import ErrorKind, Internal, InvalidRequest, TrimtabError, rebuild
from trimtab_protos.messages import (
    HostFileSource,
    ImageSource,
    JobProgress,
    NetworkKind,
    NetworkSpec,
    PeerSource,
    PoolSpec,
    UploadSource,
)

# A console is answered as an open socket, which the two processes hand over under one key.
multiprocessing.current_process().authkey = b"contract"

START_TIMEOUT_S = 180.0
_BLOCK_BYTES = 1 << 20
_WITH_CONTROL = ("import_image", "migrate", "snapshot_memory", "restore_memory", "merge_layer", "copy_volume", "move_volume")


@dataclass(frozen=True, slots=True)
class KvmHost:
    """A lab host with its hypervisor, and what a test needs to know of it."""

    name: str
    hypervisor: Hypervisor
    local_pool: PoolSpec
    shared_pool: PoolSpec
    network: NetworkSpec
    """The bridge that all hosts of the lab share."""
    scratch: Path
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def kvm_host(lab: Any, name: str, scratch: Path, *, has_tls: bool = False, is_short: bool = False) -> Iterator[KvmHost]:
    """Run a hypervisor inside host `name` of a lab that is up; `is_short`: one for which no memory is ever enough."""
    scratch.mkdir(parents=True, exist_ok=True)
    socket = scratch / f"{name}-{time.monotonic_ns()}.sock"
    serve = [sys.executable, str(Path(__file__).resolve()), "--socket", str(socket), "--address", lab.spec.host(name).address]
    command = lab.command(name, [*serve, *(["--tls"] if has_tls else []), *(["--short"] if is_short else [])])
    with (scratch / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=lab.environment(name))
    try:
        _await_socket(socket, process)
        yield KvmHost(
            name=name,
            hypervisor=cast(Hypervisor, RemoteHypervisor(socket)),
            local_pool=PoolSpec(pool_id="pool-local", path="/srv/trimtab-local", name="local"),
            shared_pool=PoolSpec(pool_id="pool-shared", path="/srv/trimtab-shared", name="shared", is_shared=True),
            network=NetworkSpec(network_id="net-guests", kind=NetworkKind.BRIDGE, name="guests", bridge="br-guest"),
            scratch=scratch,
            process=process,
        )
    finally:
        # Its end of file tells the program to end: signals do not reach it through the wrapper that entered the host.
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def _await_socket(socket: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the hypervisor's program did not start; see {socket.parent}/*.log")
        time.sleep(0.05)


class RemoteHypervisor:
    """Every attribute is a verb, carried to the program and back."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            control = kwargs.pop("control", None)
            if control is None and verb in _WITH_CONTROL:
                *rest, control = args
                args = tuple(rest)
            with Client(self._socket, "AF_UNIX") as connection:
                connection.send((verb, args, kwargs))
                return _await_answer(connection, control)

        return call

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        connection = Client(self._socket, "AF_UNIX")
        connection.send(("subscribe", (), {}))
        assert connection.recv() == ("result", None)

        def listen() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    listener(connection.recv())

        threading.Thread(target=listen, name="remote-changes", daemon=True).start()


def _await_answer(connection: Any, control: JobControl | None) -> Any:
    has_cancelled = False
    while True:
        if control is not None and control.cancelled.is_set() and not has_cancelled:
            connection.send("cancel")
            has_cancelled = True
        if not connection.poll(0.05 if control is not None else None):
            continue
        kind, *content = connection.recv()
        match kind:
            case "result":
                return content[0]
            case "progress":
                assert control is not None
                control.report(content[0])
            case "error":
                error_kind, code, message, context = content
                raise rebuild(ErrorKind(error_kind), code, message, context)
            case "defect":
                raise AssertionError(f"the verb raised what the contract does not know:\n{content[0]}")


# --- the program inside the host -------------------------------------------------------------------------------------------


class FileReader:
    """Reads image sources from files: of the pool's import directory, or wherever an id or address says."""

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        match source:
            case HostFileSource(file_name=name):
                path = Path(pool.path) / "import" / name
            case UploadSource(upload_id=name):
                path = Path(name)
            case PeerSource(address=name):
                path = Path(name)
            case _:
                raise InvalidRequest("source-unknown", "tests read files only")
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block


class RemoteControl:
    """The server's end of a test's `JobControl`."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.cancelled = threading.Event()
        threading.Thread(target=self._await_cancel, name="await-cancel", daemon=True).start()

    def _await_cancel(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            if self._connection.recv() == "cancel":
                self.cancelled.set()

    def report(self, progress: JobProgress) -> None:
        self.send(("progress", progress))

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send(message)


def _serve_one(hypervisor: Any, connection: "Connection[Any, Any]") -> None:
    with contextlib.suppress(EOFError, OSError):
        verb, args, kwargs = connection.recv()
        if verb == "subscribe":
            _serve_changes(hypervisor, connection)
            return
        send: Callable[[object], None] = connection.send
        if verb in _WITH_CONTROL:
            control = RemoteControl(connection)
            kwargs["control"], send = control, control.send
        send(_answer(hypervisor, verb, args, kwargs))


def _answer(hypervisor: Any, verb: str, args: Any, kwargs: Any) -> tuple[object, ...]:
    try:
        return "result", getattr(hypervisor, verb)(*args, **kwargs)
    except TrimtabError as error:
        return "error", error.kind.value, error.code, error.message, dict(error.context)
    except Exception:
        import traceback

        return "defect", traceback.format_exc()


def _serve_changes(hypervisor: Any, connection: "Connection[Any, Any]") -> None:
    # Answered first: what the test does next must be seen by the listener.
    hypervisor.subscribe(lambda change: _send_change(connection, change))
    connection.send(("result", None))
    connection.poll(None)


def _send_change(connection: "Connection[Any, Any]", change: DomainChange) -> None:
    with contextlib.suppress(OSError):
        connection.send_bytes(pickle.dumps(change))


def main() -> None:
    from trimtab_agent.hypervisor.kvm.config import KvmConfig
    from trimtab_agent.hypervisor.kvm.hypervisor import KvmHypervisor

    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    marks = {"balloon_low_permille": 999, "balloon_high_permille": 1000} if options.short else {}
    hypervisor = KvmHypervisor(KvmConfig(migration_address=options.address, has_tls=options.tls, **marks), FileReader())
    hypervisor.start()
    if not hypervisor.wait_until_up(START_TIMEOUT_S):
        raise Internal("lab-libvirt-down", "the lab host's libvirt does not answer")
    with Listener(options.socket, "AF_UNIX", backlog=64) as listener:
        threading.Thread(target=_accept, args=(hypervisor, listener), name="accept", daemon=True).start()
        sys.stdin.buffer.read()
    hypervisor.stop()


def _accept(hypervisor: Any, listener: Listener) -> None:
    while True:
        connection = listener.accept()
        threading.Thread(target=_serve_and_close, args=(hypervisor, connection), daemon=True).start()


def _serve_and_close(hypervisor: Any, connection: "Connection[Any, Any]") -> None:
    with connection:
        _serve_one(hypervisor, connection)


if __name__ == "__main__":
    main()
