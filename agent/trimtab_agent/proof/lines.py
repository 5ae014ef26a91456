"""The lines to the cards of proof guests: each a stream of frames to QEMU, with a thread that stands at its other end for as long as
somebody asks.

QEMU puts four bytes of length before each frame and serves one connection at a time. Nothing of this host's networks is involved: what
a guest sends ends in this process.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from trimtab_agent.proof.station import Finding, Station
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import NicSpec

KNOCK_S = 0.5
IDLE_S = 60.0
"""A line that nobody has asked about for so long is let go of; the next question joins it anew."""
FRAME_MAX_BYTES = 70_000
PIECE_BYTES = 64 << 10
FLOOD_PAUSE_S = 0.1
"""A guest that fills a whole piece at once waits: reading what it sends takes this process's time."""

log = structlog.get_logger(__name__)
Open = Callable[[str, str], socket.socket]
"""`Hypervisor.open_wire`."""


class Lines:
    """Of one host. Thread-safe."""

    def __init__(self, open_wire: Open) -> None:
        self._open = open_wire
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, str], _Line] = {}

    def knock(self, vm_id: str, nics: Sequence[NicSpec], port: int, *, timeout_s: float) -> Finding:
        """Return what is known of the port on any of the cards, once one answers or all refuse, or after the time.

        Raises what joining a card raises: NotFound, Conflict `wrong-domain-state`, Unavailable."""
        deadline_s = time.monotonic() + timeout_s
        lines = [self._line(vm_id, nic, port) for nic in nics]
        findings = [Finding(problem="it has no network card")]
        for line in lines:
            finding = line.wait(max(0.0, deadline_s - time.monotonic()))
            if finding.has_answered:
                return finding
            findings.append(finding)
        return findings[-1] if len(findings) < 3 else Finding(problem="; ".join(one.problem for one in findings[1:]))

    def _line(self, vm_id: str, nic: NicSpec, port: int) -> "_Line":
        with self._lock:
            self._lines = {key: line for key, line in self._lines.items() if not line.has_ended}
            line = self._lines.get((vm_id, nic.nic_id))
            if line is not None and line.port != port:
                line.end()
                line = None
            if line is None:
                station = Station(addresses=nic.addresses, port=port)
                line = self._lines[vm_id, nic.nic_id] = _Line(self._open(vm_id, nic.nic_id), station, port)
                log.info("a proof guest's card is joined", vm_id=vm_id, nic_id=nic.nic_id, port=port)
            return line


class _Line:
    def __init__(self, joined: socket.socket, station: Station, port: int) -> None:
        self.port = port
        self._socket = joined
        self._station = station
        self._changed = threading.Condition()
        self._finding = station.finding
        self._ending = threading.Event()
        self._asked_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="proof-line", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> Finding:
        with self._changed:
            self._asked_s = time.monotonic()
            self._changed.wait_for(lambda: self._finding.is_final or self._ending.is_set(), timeout_s)
            return self._finding

    def end(self) -> None:
        """Let go of the card; returns when QEMU serves the next one."""
        self._ending.set()
        self._thread.join(2 * KNOCK_S)

    def _run(self) -> None:
        try:
            with self._socket:
                self._serve()
        except (OSError, TrimtabError) as error:
            log.info("a proof guest's card is gone", error=str(error))
        finally:
            with self._changed:
                self._ending.set()
                self._changed.notify_all()

    def _serve(self) -> None:
        self._socket.settimeout(KNOCK_S)
        pending, next_knock_s, reachable = b"", 0.0, 0
        while not self._ending.is_set() and time.monotonic() - self._asked_s < IDLE_S:
            if time.monotonic() >= next_knock_s:
                self._send(self._station.knock())
                next_knock_s = time.monotonic() + KNOCK_S
            try:
                piece = self._socket.recv(PIECE_BYTES)
            except TimeoutError:
                continue
            if not piece:
                return
            frames, pending = split(pending + piece)
            for frame in frames:
                self._send(self._station.hear(frame))
            if self._station.reachable > reachable:
                reachable, next_knock_s = self._station.reachable, 0.0
            with self._changed:
                self._finding = self._station.finding
                self._changed.notify_all()
            if len(piece) == PIECE_BYTES:
                self._ending.wait(FLOOD_PAUSE_S)

    def _send(self, frames: Sequence[bytes]) -> None:
        if frames:
            self._socket.sendall(b"".join(join(frame) for frame in frames))


def join(frame: bytes) -> bytes:
    """Return the frame as it goes over the line."""
    return len(frame).to_bytes(4) + frame


def split(content: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole frames and what is left of one that is not. OSError for what cannot be QEMU's."""
    frames, at = [], 0
    while len(content) - at >= 4:
        size = int.from_bytes(content[at : at + 4])
        if size > FRAME_MAX_BYTES:
            raise OSError(f"a frame of {size} bytes")
        if len(content) - at - 4 < size:
            break
        frames.append(content[at + 4 : at + 4 + size])
        at += 4 + size
    return frames, content[at:]
