"""The consoles of simulated guests: a log that is cut, and a guest that answers who types at its serial port.

It says back what is typed, as a terminal's line does, and to every line `heard: LINE`; its screen says only which protocol it speaks.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

RFB_GREETING = b"RFB 003.008\n"
Answer = Callable[["SimulatedHypervisor", SimulatedDomain, socket.socket], None]


def read(domain: SimulatedDomain, offset: int, max_bytes: int) -> tuple[bytes, int]:
    """Return a piece of the log and where it ends. Under the fleet's lock."""
    end = domain.console_base + len(domain.console)
    start = max(domain.console_base, end + offset if offset < 0 else min(offset, end))
    content = bytes(domain.console[start - domain.console_base :][:max_bytes])
    return content, start + len(content)


def join(host: "SimulatedHypervisor", domain: SimulatedDomain, kind: ConsoleKind) -> socket.socket:
    """Return one end of the console; the guest is at the other. Under the fleet's lock."""
    if domain.state not in ACTIVE:
        raise Conflict("wrong-domain-state", f"the vm is {domain.state.value}", state=domain.state.value)
    ours, theirs = socket.socketpair()
    domain.open_consoles.append(theirs)
    answer = _answer_screen if kind is ConsoleKind.VNC else _answer_serial
    threading.Thread(target=_serve, args=(host, domain, theirs, answer), name="simulated-console", daemon=True).start()
    return ours


def _serve(host: "SimulatedHypervisor", domain: SimulatedDomain, line: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(OSError), line:  # whoever was at the console went, or the guest's process ended
        answer(host, domain, line)
    with host.fleet.lock, contextlib.suppress(ValueError):
        domain.open_consoles.remove(line)


def _answer_serial(host: "SimulatedHypervisor", domain: SimulatedDomain, line: socket.socket) -> None:
    typed = b""
    while piece := line.recv(4096):
        typed += piece
        said = piece.replace(b"\r", b"\r\n")
        while b"\r" in typed:
            word, _, typed = typed.partition(b"\r")
            said += b"heard: " + word + b"\r\n"
        with host.fleet.lock:
            domain.write_console(said.decode(errors="replace"))
        line.sendall(said)


def _answer_screen(_host: "SimulatedHypervisor", _domain: SimulatedDomain, line: socket.socket) -> None:
    line.sendall(RFB_GREETING)
    while line.recv(4096):
        pass
