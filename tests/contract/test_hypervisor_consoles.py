"""What every hypervisor promises about the consoles of its guests. See `hosts.py` for the hosts."""

import socket
import time

import pytest

from tests.contract.hosts import Hosts, Vm, define, power, refusal, until
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import PowerAction

pytestmark = [pytest.mark.timeout(900)]
LOOK_S = 0.5


def heard(joined: socket.socket, wanted: bytes, *, deadline_s: float) -> bytes:
    """Return what the console said until `wanted` was among it, or until it ended."""
    said, end_s = b"", time.monotonic() + deadline_s
    joined.settimeout(LOOK_S)
    while wanted not in said and time.monotonic() < end_s:
        try:
            piece = joined.recv(4096)
        except TimeoutError:
            continue
        if not piece:
            break
        said += piece
    return said


def has_ended(joined: socket.socket) -> bool:
    joined.settimeout(LOOK_S)
    try:
        return joined.recv(65536) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_the_serial_console_speaks_while_its_log_is_kept_and_ends_with_the_guest(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    with side.hypervisor.open_console(vm.id, ConsoleKind.SERIAL) as joined:
        joined.sendall(b"hello\r")
        patience_s = max(150, side.patience_s)
        said = heard(joined, b"tick " if hosts.boots else b"heard: hello\r\n", deadline_s=patience_s)
        word = b"tick " if hosts.boots else b"heard: hello"
        assert word in said
        until(
            lambda: word in side.hypervisor.read_console(vm.id, 0, 65536)[0],
            what="the same in the log: who is at the console takes nothing from it",
            deadline_s=side.patience_s,
        )
        power(side, vm, PowerAction.FORCE_OFF)
        until(lambda: has_ended(joined), what="the end of the session", deadline_s=side.patience_s)


def test_the_screen_speaks_rfb_to_one_after_another(hosts: Hosts, vm: Vm) -> None:
    side = hosts.first
    power(side, vm, PowerAction.START)
    for _ in range(2):
        with side.hypervisor.open_console(vm.id, ConsoleKind.VNC) as joined:
            assert heard(joined, b"\n", deadline_s=side.patience_s) == b"RFB 003.008\n"
    power(side, vm, PowerAction.FORCE_OFF)


@pytest.mark.parametrize("kind", ConsoleKind)
def test_a_guest_that_does_not_run_has_no_console(hosts: Hosts, vm: Vm, kind: ConsoleKind) -> None:
    side = hosts.first
    assert refusal(lambda: side.hypervisor.open_console("vm-none", kind))[0] is NotFound
    define(side, vm)
    assert refusal(lambda: side.hypervisor.open_console(vm.id, kind)) == (Conflict, "wrong-domain-state")
